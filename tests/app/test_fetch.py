"""`darkroom fetch`, against a stand-in of the Hugging Face Hub."""

from __future__ import annotations

import fcntl
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from app.cli import cli
from app.fetch import FetchRequest, TerminalMeter, fetch
from app.hub import DiskFailed, FetchFailed, Hub, HubAway, RemoteFile
from app.weights import ModelFolder, needed
from model.layouts import Fetched, find
from model.weights import CheckpointError
from tests.hub import MAIN, HubServer, files_of, serving

ROOT = Path(__file__).parents[2]
LARGE = "stabilityai/stable-diffusion-3.5-large"
INDEX = json.dumps({"_class_name": "StableDiffusion3Pipeline"}).encode()
MMDIT = "transformer/diffusion_pytorch_model.safetensors"
TOKEN = "hf_" + "s" * 34

NEEDED = {
    "model_index.json": INDEX,
    "LICENSE.md": b"the licence",
    "scheduler/scheduler_config.json": b"{}",
    MMDIT: b"mmdit " * 20_000,
    "transformer/config.json": b'{"t": 1}',
    "vae/diffusion_pytorch_model.safetensors": b"vae " * 5000,
    "vae/config.json": b'{"v": 1}',
    "text_encoder/model.safetensors": b"clip l " * 3000,
    "text_encoder/config.json": b'{"l": 1}',
    "text_encoder_2/model.safetensors": b"clip g " * 3000,
    "text_encoder_2/config.json": b'{"g": 1}',
    "text_encoder_3/model.safetensors.index.json": b'{"weight_map": {}}',
    "text_encoder_3/model-00001-of-00002.safetensors": b"t5 one " * 3000,
    "text_encoder_3/model-00002-of-00002.safetensors": b"t5 two " * 3000,
    "text_encoder_3/config.json": b'{"t5": 1}',
    "tokenizer/vocab.json": b'{"a": 1}',
    "tokenizer/merges.txt": b"a b",
    "tokenizer_2/vocab.json": b'{"a": 1}',
    "tokenizer_2/merges.txt": b"a b",
    "tokenizer_2/tokenizer_config.json": b'{"b": 1}',
    "tokenizer_3/spiece.model": b"pieces",
}
NOT_NEEDED = {
    "README.md": b"read me",
    ".gitattributes": b"lfs",
    "sd3.5_large.safetensors": b"all in one " * 9000,
    "text_encoders/clip_l.safetensors": b"clip again " * 9000,
    "text_encoder/model.fp16.safetensors": b"half " * 3000,
    "text_encoder_3/model.fp16-00001-of-00002.safetensors": b"half of t5 " * 3000,
    "text_encoder_3/model.safetensors.index.fp16.json": b"{}",
    "transformer/diffusion_pytorch_model.bin": b"pickle",
    "tokenizer/evil.pkl": b"pickle",
    "demo.png": b"picture",
}


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with serving() as hub:
        hub.add(LARGE, NEEDED | NOT_NEEDED)
        yield hub


def run(hub: HubServer, *options: object, model: str = "sd3.5-large", **env: str) -> Result:
    given = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "", "HF_HOME": "/nonexistent"}
    return CliRunner(env=given | env).invoke(cli, ["fetch", model, *map(str, options)])


def process(hub: HubServer, to: Path) -> subprocess.Popen[str]:
    env = os.environ | {"HF_ENDPOINT": hub.url, "HF_TOKEN": "", "HF_HOME": "/nonexistent"}
    argv = [sys.executable, "-m", "app.cli", "fetch", "sd3.5-large", "--to", str(to)]
    return subprocess.Popen(argv, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def held(folder: Path) -> dict[str, bytes]:
    return {path: data for path, data in files_of(folder).items() if not path.startswith(".fetch/")}


def at_once(hub: HubServer, request: FetchRequest) -> None:
    """Fetches without a pause between tries."""
    with TerminalMeter() as terminal, Hub(hub.url, first_pause_s=0) as asked:
        fetch(request, asked, terminal)


@pytest.mark.slow
def test_fetched_model_loads_in_the_worker(tmp_path: Path) -> None:
    from worker.models import Loader
    from worker.settings import WorkerSettings

    with serving() as hub:
        hub.add("someone/Demo_Model", files_of(ROOT / "model" / "bundles" / "demo") | NOT_NEEDED)
        result = run(hub, "--to", tmp_path / "demo", model="someone/Demo_Model")
    assert result.exit_code == 0, result.output
    assert result.stdout == f"DARKROOM_MODELS=demo_model={tmp_path}/demo\n"
    settings = WorkerSettings(models=result.stdout.strip().partition("=")[2], device="cpu")  # type: ignore[arg-type]
    model = Loader(settings).load(settings.models[0])
    assert model.card.name == "demo_model"


def test_stand_in_serves_huggingfaces_own_client(hub: HubServer, tmp_path: Path) -> None:
    from huggingface_hub import HfApi, hf_hub_download

    info = HfApi(endpoint=hub.url, token=False).model_info(LARGE, files_metadata=True)
    listed = {one.rfilename: one.size for one in info.siblings or []}
    assert listed == {path: len(data) for path, data in (NEEDED | NOT_NEEDED).items()}
    for name in ("transformer/config.json", MMDIT):
        path = hf_hub_download(LARGE, name, endpoint=hub.url, local_dir=tmp_path, token=False)
        assert Path(path).read_bytes() == NEEDED[name]


def test_fetch_brings_what_the_worker_loads_and_nothing_else(hub: HubServer, tmp_path: Path) -> None:
    result = run(hub, "--to", tmp_path / "new" / "large")
    assert result.exit_code == 0, result.output
    assert held(tmp_path / "new" / "large") == NEEDED
    assert result.stdout == f"DARKROOM_MODELS=sd3.5-large={tmp_path}/new/large\n"
    assert f"{LARGE} at commit {MAIN}: 21 files, every sum right" in result.stderr
    assert "less with DARKROOM_T5=no" in result.stderr
    assert not list((tmp_path / "new" / "large" / ".fetch").glob("*.part"))


def test_a_second_fetch_asks_the_hub_for_nothing(hub: HubServer, tmp_path: Path) -> None:
    run(hub, "--to", tmp_path)
    hub.requests.clear()
    result = run(hub, "--to", tmp_path)
    assert (result.exit_code, hub.requests) == (0, [])
    assert "is complete" in result.stderr
    assert result.stdout == f"DARKROOM_MODELS=sd3.5-large={tmp_path}\n"


def test_a_complete_folder_needs_no_lock(hub: HubServer, tmp_path: Path) -> None:
    run(hub, "--to", tmp_path)
    with (tmp_path / ".fetch" / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert run(hub, "--to", tmp_path).exit_code == 0


def test_token_goes_to_the_hub_and_not_to_its_cdn(hub: HubServer, tmp_path: Path) -> None:
    hub.tokens = {TOKEN}
    assert run(hub, "--to", tmp_path, HF_TOKEN=TOKEN).exit_code == 0
    sent = {(one.host, one.authorization) for one in hub.requests}
    assert sent == {("127.0.0.1", f"Bearer {TOKEN}"), ("localhost", None)}


@pytest.mark.parametrize("knows_ranges", [True, False])
def test_a_cut_connection_goes_on_where_it_was(hub: HubServer, tmp_path: Path, knows_ranges: bool) -> None:
    hub.knows_ranges = knows_ranges
    hub.cuts = {MMDIT: [50_000, 60_000 if not knows_ranges else 10_000]}
    at_once(hub, FetchRequest("sd3.5-large", tmp_path))
    assert held(tmp_path) == NEEDED
    assert [one.range for one in hub.asked(MMDIT)] == [None, "bytes=50000-", "bytes=60000-"]


def test_a_hub_that_breaks_off_again_and_again_is_left_and_the_next_fetch_goes_on(
    hub: HubServer, tmp_path: Path
) -> None:
    hub.cuts = {MMDIT: [50_000] + [0] * 8}
    with pytest.raises(HubAway, match="goes on from there"):
        at_once(hub, FetchRequest("sd3.5-large", tmp_path))
    assert MMDIT not in held(tmp_path)
    hub.requests.clear()
    hub.cuts = {}
    assert run(hub, "--to", tmp_path).exit_code == 0
    assert held(tmp_path) == NEEDED
    assert [one.range for one in hub.asked(MMDIT)] == ["bytes=50000-"]


def test_a_hub_that_is_busy_is_asked_again(hub: HubServer, tmp_path: Path) -> None:
    hub.failures = [(503, {}), (429, {"retry-after": "0"}), (500, {})]
    at_once(hub, FetchRequest("sd3.5-large", tmp_path))
    assert held(tmp_path) == NEEDED


def test_wrong_bytes_are_refused_and_not_kept(hub: HubServer, tmp_path: Path) -> None:
    hub.lies = {MMDIT}
    result = run(hub, "--to", tmp_path)
    assert result.exit_code == 7
    assert f"{MMDIT} arrived with other bytes than {hub.url} lists" in result.stderr
    assert MMDIT not in held(tmp_path)
    assert result.stdout == ""
    hub.lies = set()
    assert run(hub, "--to", tmp_path).exit_code == 0
    assert held(tmp_path) == NEEDED


def test_wrong_bytes_of_a_small_file_are_refused_too(hub: HubServer, tmp_path: Path) -> None:
    hub.lies = {"vae/config.json"}
    assert run(hub, "--to", tmp_path).exit_code == 7


def test_a_damaged_beginning_is_thrown_away(hub: HubServer, tmp_path: Path) -> None:
    with Hub(hub.url) as asked:
        file = next(file for file in asked.listing(LARGE, "main").files if file.path == MMDIT)
    (tmp_path / ".fetch").mkdir()
    name = f"transformer--diffusion_pytorch_model.safetensors.{file.sum[:16]}.part"
    (tmp_path / ".fetch" / name).write_bytes(b"x" * 1000)
    assert run(hub, "--to", tmp_path).exit_code == 0
    assert held(tmp_path) == NEEDED
    assert [one.range for one in hub.asked(MMDIT)] == ["bytes=1000-", None]


def test_files_that_are_there_are_read_and_only_the_wrong_ones_fetched(hub: HubServer, tmp_path: Path) -> None:
    for path, data in NEEDED.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(data if path != MMDIT else b"x" * len(data))
    assert run(hub, "--to", tmp_path).exit_code == 0
    assert held(tmp_path) == NEEDED
    assert {one.path for one in hub.requests if "/resolve/" in one.path} == {f"/{LARGE}/resolve/{MAIN}/{MMDIT}"}


def test_check_tells_what_is_wrong_and_changes_nothing(hub: HubServer, tmp_path: Path) -> None:
    run(hub, "--to", tmp_path)
    assert run(hub, "--to", tmp_path, "--check").exit_code == 0
    (tmp_path / MMDIT).write_bytes(b"x" * len(NEEDED[MMDIT]))
    (tmp_path / "vae/config.json").unlink()
    before = files_of(tmp_path)
    result = run(hub, "--to", tmp_path, "--check")
    assert result.exit_code == 7
    assert f"{MMDIT} is wrong, vae/config.json is missing" in result.stderr
    assert files_of(tmp_path) == before
    assert run(hub, "--to", tmp_path).exit_code == 0
    assert held(tmp_path) == NEEDED


def test_check_of_a_folder_that_is_not_there_makes_none(hub: HubServer, tmp_path: Path) -> None:
    result = run(hub, "--to", tmp_path / "none", "--check")
    assert result.exit_code == 7
    assert not (tmp_path / "none").exists()


def test_check_works_while_the_hub_is_away(hub: HubServer, tmp_path: Path) -> None:
    run(hub, "--to", tmp_path)
    hub.failures = [(503, {})] * 8
    at_once(hub, FetchRequest("sd3.5-large", tmp_path, check=True))
    assert hub.failures == []


def test_a_gated_model_without_a_token_says_where_to_accept_and_how_to_give_one(hub: HubServer, tmp_path: Path) -> None:
    hub.repos[LARGE].gated = True
    result = run(hub, "--to", tmp_path)
    assert result.exit_code == 3
    for words in (f"accept its licence at {hub.url}/{LARGE}", f"{hub.url}/settings/tokens", "--token-file", "HF_TOKEN"):
        assert words in result.stderr


def test_a_token_whose_account_has_not_accepted_is_told_so(hub: HubServer, tmp_path: Path) -> None:
    hub.repos[LARGE].gated, hub.tokens = True, {TOKEN}
    result = run(hub, "--to", tmp_path, HF_TOKEN=TOKEN)
    assert result.exit_code == 3
    assert f"accept its licence at {hub.url}/{LARGE} with that account" in result.stderr
    assert "fine-grained" in result.stderr
    assert f"it says: Access to model {LARGE} is restricted." in result.stderr
    assert TOKEN not in result.output


@pytest.mark.parametrize("way", ["--token-file", "DARKROOM_HF_TOKEN_FILE", "HF_TOKEN"])
def test_a_token_comes_from_file_or_environment(hub: HubServer, tmp_path: Path, way: str) -> None:
    hub.repos[LARGE].gated, hub.tokens, hub.repos[LARGE].admitted = True, {TOKEN}, {TOKEN}
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    options = ["--token-file", file] if way == "--token-file" else []
    env = {} if options else {way: TOKEN if way == "HF_TOKEN" else str(file)}
    result = run(hub, "--to", tmp_path / "m", *options, **env)
    assert result.exit_code == 0, result.output
    assert TOKEN not in result.output
    assert all(TOKEN.encode() not in data for data in files_of(tmp_path / "m").values())


def test_an_unknown_token_is_told_apart_from_a_missing_model(hub: HubServer, tmp_path: Path) -> None:
    result = run(hub, "--to", tmp_path, HF_TOKEN=TOKEN)
    assert result.exit_code == 3
    assert "does not know this token" in result.stderr
    assert TOKEN not in result.output


@pytest.mark.parametrize("content", ["", "two words", "zwei\nzeilen"])
def test_a_token_file_without_a_token_is_refused(hub: HubServer, tmp_path: Path, content: str) -> None:
    (tmp_path / "token").write_text(content)
    result = run(hub, "--to", tmp_path / "m", "--token-file", tmp_path / "token")
    assert (result.exit_code, hub.requests) == (3, [])
    assert "holds no token" in result.stderr


def test_a_token_file_that_cannot_be_read_is_named(hub: HubServer, tmp_path: Path) -> None:
    result = run(hub, "--to", tmp_path, "--token-file", tmp_path / "none")
    assert result.exit_code == 3
    assert f"{tmp_path}/none cannot be read: No such file" in result.stderr


def test_unknown_repository_and_revision_are_told(hub: HubServer, tmp_path: Path) -> None:
    hub.tokens = {TOKEN}
    result = run(hub, "--to", tmp_path, model="no/such")
    assert result.exit_code == 4
    assert f"there is no model 'no/such' at {hub.url}, or it is private and needs a token" in result.stderr
    result = run(hub, "--to", tmp_path, model="no/such", HF_TOKEN=TOKEN)
    assert (result.exit_code, "or this token may not see it" in result.stderr) == (4, True)
    result = run(hub, "--to", tmp_path, "--revision", "v9/x")
    assert result.exit_code == 4
    assert f"{LARGE} has no revision 'v9/x'" in result.stderr


@pytest.mark.parametrize("model", ["sd3.5", "a/b/c", "../etc", ""])
def test_what_is_no_model_is_refused_with_what_is_allowed(hub: HubServer, tmp_path: Path, model: str) -> None:
    result = run(hub, "--to", tmp_path, model=model)
    assert (result.exit_code, hub.requests) == (1, [])
    assert (
        f"the model is {model!r}; allowed: sd3.5-large, sd3.5-large-turbo, sd3.5-medium, or owner/name" in result.stderr
    )


def test_a_hub_that_is_not_there_is_told(tmp_path: Path) -> None:
    with (
        pytest.raises(HubAway, match=r"http://127\.0\.0\.1:9 cannot be reached"),
        TerminalMeter() as terminal,
        Hub("http://127.0.0.1:9", first_pause_s=0) as asked,
    ):
        fetch(FetchRequest("sd3.5-large", tmp_path), asked, terminal)


def test_what_answers_and_is_no_hub_is_told(hub: HubServer, tmp_path: Path) -> None:
    hub.failures = [(200, {"content-type": "text/html"})]
    result = run(hub, "--to", tmp_path)
    assert result.exit_code == 5
    assert "is no Hugging Face Hub" in result.stderr


def test_an_endpoint_that_is_no_url_is_refused(hub: HubServer, tmp_path: Path) -> None:
    result = run(hub, "--to", tmp_path, HF_ENDPOINT="huggingface.co")
    assert result.exit_code == 1
    assert "HF_ENDPOINT is 'huggingface.co'; allowed: a url" in result.stderr


def test_too_small_a_disk_is_told_before_anything_is_fetched(tmp_path: Path) -> None:
    files = [RemoteFile("a", 50_000_000_000, "0" * 64)]
    folder = ModelFolder(tmp_path)
    with pytest.raises(DiskFailed, match=r"50\.0 GB are still to come, and .* has 2\.0 GB free"):
        folder.require_room(files, free=lambda _: 2_000_000_000)
    folder.require_room(files, free=lambda _: 51_000_000_000)


@pytest.mark.slow
def test_a_disk_that_fills_up_is_told(hub: HubServer, tmp_path: Path) -> None:
    env = os.environ | {"HF_ENDPOINT": hub.url, "HF_TOKEN": ""}
    limited = 'ulimit -f 40; exec "$0" -m app.cli fetch sd3.5-large --to "$1"'  # files of 40 KiB at most
    argv = ["bash", "-c", limited, sys.executable, str(tmp_path / "m")]
    done = subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 6, done.stderr
    assert f"the disk of {tmp_path}/m is full" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_folder_that_cannot_be_written_to_is_told(hub: HubServer, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = run(hub, "--to", tmp_path / "file" / "m")
    assert result.exit_code == 6
    assert "cannot be written to" in result.stderr


def test_a_path_that_the_setting_cannot_hold_is_refused(hub: HubServer, tmp_path: Path) -> None:
    result = run(hub, "--to", tmp_path / "a,b")
    assert (result.exit_code, hub.requests) == (1, [])
    assert "a path without commas" in result.stderr


@pytest.mark.slow
def test_two_fetches_at_once_bring_each_file_once(hub: HubServer, tmp_path: Path) -> None:
    hub.hold.clear()
    with process(hub, tmp_path) as first:
        assert hub.holding.wait(30)
        with process(hub, tmp_path) as second:
            assert second.stderr is not None
            assert "another fetch into" in second.stderr.readline()
            hub.hold.set()
            ends = [one.wait(30) for one in (first, second)]
    assert ends == [0, 0]
    assert held(tmp_path) == NEEDED
    assert {path: len(hub.asked(path)) for path in NEEDED} == dict.fromkeys(NEEDED, 1)


@pytest.mark.slow
def test_sigterm_ends_it_at_once_and_the_next_fetch_goes_on(hub: HubServer, tmp_path: Path) -> None:
    hub.hold.clear()
    with process(hub, tmp_path) as child:
        assert hub.holding.wait(30)
        child.send_signal(signal.SIGTERM)
        hub.hold.set()
        _, errors = child.communicate(timeout=30)
    assert (child.returncode, "Traceback" in errors) == (130, False)
    assert "the same command goes on from there" in errors
    assert run(hub, "--to", tmp_path).exit_code == 0
    assert held(tmp_path) == NEEDED


def test_a_folder_of_another_model_is_left_alone(hub: HubServer, tmp_path: Path) -> None:
    hub.add("other/model", NEEDED)
    run(hub, "--to", tmp_path)
    result = run(hub, "--to", tmp_path, model="other/model")
    assert result.exit_code == 1
    assert f"{tmp_path} holds {LARGE}; name another folder for other/model" in result.stderr


def test_another_revision_replaces_the_files_of_the_one_before(hub: HubServer, tmp_path: Path) -> None:
    run(hub, "--to", tmp_path)
    shards = {f"transformer/diffusion_pytorch_model-0000{n}-of-00002.safetensors": b"s" * n * 999 for n in (1, 2)}
    index = "transformer/diffusion_pytorch_model.safetensors.index.json"
    fresh = {path: data for path, data in NEEDED.items() if path != MMDIT} | shards | {index: b"{}"}
    (tmp_path / ".fetch" / f"{'0' * 64}.part").write_bytes(b"begun of yet another")
    repo = hub.repos[LARGE]
    repo.commits["2" * 40], repo.branches["main"] = fresh, "2" * 40
    assert run(hub, "--to", tmp_path).exit_code == 0
    assert held(tmp_path) == NEEDED  # as long as nobody asks for another
    hub.requests.clear()
    assert run(hub, "--to", tmp_path, "--revision", "main").exit_code == 0
    assert held(tmp_path) == fresh
    assert not list((tmp_path / ".fetch").glob("*.part"))
    assert len([one for one in hub.requests if "/resolve/" in one.path]) == 3


def changed(hub: HubServer) -> dict[str, bytes]:
    """The files of `main` from now on: of the same names and sizes as before, with other weights."""
    fresh = {path: data.upper() if path.endswith(".safetensors") else data for path, data in NEEDED.items()}
    repo = hub.repos[LARGE]
    repo.commits["2" * 40], repo.branches["main"] = fresh, "2" * 40
    return fresh


def test_another_revision_that_is_cut_off_leaves_the_one_before_whole(hub: HubServer, tmp_path: Path) -> None:
    run(hub, "--to", tmp_path)
    fresh = changed(hub)
    hub.cuts = {MMDIT: [50_000] + [0] * 8}
    with pytest.raises(HubAway):
        at_once(hub, FetchRequest("sd3.5-large", tmp_path, revision="main"))
    assert held(tmp_path) == NEEDED
    assert Fetched.of(tmp_path).record
    assert run(hub, "--to", tmp_path, "--check", "--revision", MAIN).exit_code == 0
    hub.requests.clear()
    hub.cuts = {}
    assert run(hub, "--to", tmp_path, "--revision", "main").exit_code == 0
    assert held(tmp_path) == fresh
    assert [one.range for one in hub.asked(MMDIT)] == ["bytes=50000-"]


def test_a_folder_whose_files_are_being_put_in_place_is_refused_by_the_loader_until_a_fetch_goes_on(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(hub, "--to", tmp_path)
    fresh = changed(hub)
    with monkeypatch.context() as patch:
        patch.setattr(ModelFolder, "_name", named_until("text_encoder_3/model-00002-of-00002.safetensors"))
        with pytest.raises(KeyboardInterrupt):
            at_once(hub, FetchRequest("sd3.5-large", tmp_path, revision="main"))
    assert held(tmp_path) not in (NEEDED, fresh)
    with pytest.raises(CheckpointError, match=f"{tmp_path} is not complete.*the same `darkroom fetch` goes on"):
        find(tmp_path)
    hub.requests.clear()
    assert run(hub, "--to", tmp_path).exit_code == 0
    assert (held(tmp_path), hub.requests) == (fresh, [])
    assert Fetched.of(tmp_path).record


def named_until(last: str) -> Callable[[ModelFolder, RemoteFile], None]:
    """`ModelFolder._name`, cut off after a file."""
    name = ModelFolder._name

    def named(folder: ModelFolder, file: RemoteFile) -> None:
        if file.path > last:
            raise KeyboardInterrupt
        name(folder, file)

    return named


def test_a_first_fetch_that_is_cut_off_goes_on_with_its_commit_and_is_refused_by_the_loader(
    hub: HubServer, tmp_path: Path
) -> None:
    hub.cuts = {MMDIT: [50_000] + [0] * 8}
    with pytest.raises(HubAway):
        at_once(hub, FetchRequest("sd3.5-large", tmp_path))
    with pytest.raises(CheckpointError, match="is not complete"):
        find(tmp_path)
    changed(hub)
    hub.cuts = {}
    assert run(hub, "--to", tmp_path).exit_code == 0
    assert held(tmp_path) == NEEDED


def test_files_without_a_record_stay_loadable_until_all_others_are_here(hub: HubServer, tmp_path: Path) -> None:
    for path, data in (NEEDED | {"vae/config.json": b"{}"}).items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(data)
    before = held(tmp_path)
    hub.lies = {"vae/config.json"}
    assert run(hub, "--to", tmp_path).exit_code == 7
    assert held(tmp_path) == before
    assert Fetched.of(tmp_path).record is None


def test_another_kind_of_model_is_refused_before_its_weights_are_fetched(hub: HubServer, tmp_path: Path) -> None:
    hub.add("other/flux", NEEDED | {"model_index.json": b'{"_class_name": "FluxPipeline"}'})
    result = run(hub, "--to", tmp_path, model="other/flux")
    assert result.exit_code == 1
    assert "other/flux is a FluxPipeline; Darkroom serves StableDiffusion3Pipeline alone" in result.stderr
    assert hub.asked(MMDIT) == []
    assert run(hub, "--to", tmp_path).exit_code == 0  # the folder is not spoilt


def test_progress_is_a_line_now_and_then_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    times = iter([0.0, 1.0, 10.0, 11.0, 25.0])
    with TerminalMeter(clock=lambda: next(times)) as terminal:
        terminal.begin("fetching", 10_000_000)
        for _ in range(4):
            terminal.advance(1_000_000)
    assert capsys.readouterr().err.splitlines() == [
        "fetching 10.0 MB",
        "fetching: 2.0 MB of 10.0 MB, 0.2 MB/s",
        "fetching: 4.0 MB of 10.0 MB, 0.2 MB/s",
    ]


def test_progress_is_a_bar_on_a_terminal() -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100, markup=False)
    with TerminalMeter(console) as terminal:
        terminal.begin("fetching", 2_000_000)
        terminal.advance(1_000_000)
        terminal.say("vae/config.json, 3 bytes [not markup]")
        terminal.advance(1_000_000)
    shown = screen.getvalue()
    assert "vae/config.json, 3 bytes [not markup]" in shown
    assert "2.0/2.0 MB" in shown


def test_missing_huggingface_hub_is_named_with_the_command_that_mends_it(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['huggingface_hub'] = None; from app.cli import main;"
        "sys.argv = ['darkroom', 'fetch', 'sd3.5-large', '--to', 'x']; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "pip install huggingface_hub" in done.stderr


def test_of_a_whole_model_everything_that_it_is_loaded_from_is_chosen() -> None:
    files = files_of(ROOT / "model" / "bundles" / "demo")
    chosen = needed([RemoteFile(path, len(data), "0" * 64) for path, data in files.items()])
    assert {file.path for file in chosen} == files.keys() - {"training.json", "evaluation.json"}


def listed(*paths: str) -> list[RemoteFile]:
    return [RemoteFile(path, 1, "0" * 64) for path in paths]


def chosen_of(folder: str, *names: str) -> set[str]:
    """What is chosen of one net's folder that holds these files, among others that are as they should be."""
    others = [path for path in NEEDED if not path.startswith(f"{folder}/")]
    chosen = needed(listed(*others, *(f"{folder}/{name}" for name in names)))
    return {file.path.removeprefix(f"{folder}/") for file in chosen if file.path.startswith(f"{folder}/")}


def test_a_net_that_is_only_there_in_half_precision_is_taken_so() -> None:
    assert chosen_of("text_encoder", "model.fp16.safetensors", "config.json") == {
        "model.fp16.safetensors",
        "config.json",
    }
    shards = {"model.safetensors.index.fp16.json", *(f"model.fp16-0000{n}-of-00002.safetensors" for n in (1, 2))}
    assert chosen_of("text_encoder_2", *shards) == shards


def test_a_repository_without_t5_is_taken_without() -> None:
    assert chosen_of("text_encoder_3") == set()


@pytest.mark.parametrize(
    ("folder", "names", "words"),
    [
        (
            "transformer",
            ["diffusion_pytorch_model.bin"],
            "transformer of the repository holds diffusion_pytorch_model.bin",
        ),
        ("vae", [], "vae of the repository holds nothing"),
        ("vae", ["a.safetensors", "b.safetensors"], "allowed: diffusion_pytorch_model.safetensors, or its index"),
        ("text_encoder_3", ["model.safetensors.index.json", "model-00001-of-00002.safetensors"], "has 1 shards"),
    ],
)
def test_a_net_that_cannot_be_loaded_is_told(folder: str, names: list[str], words: str) -> None:
    with pytest.raises(FetchFailed, match=words):
        chosen_of(folder, *names)


def test_a_repository_without_a_model_index_is_refused() -> None:
    with pytest.raises(FetchFailed, match=r"no model_index\.json"):
        needed(listed("sd3.5_large.safetensors"))
