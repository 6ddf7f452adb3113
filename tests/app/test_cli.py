"""`darkroom generate` and its neighbours, against a server that says what each test scripts."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from app.cli import _program, cli

JOB = "gen_1"
ROOT = Path(__file__).parents[2]


def view(status: str, **fields: Any) -> dict[str, Any]:
    blank = {"queue_position": None, "progress": None, "images": [], "warnings": [], "timings": {}, "error": None}
    return {"id": JOB, "status": status, "model": "demo", **blank, **fields}


def succeeded(*seeds: int, format: str = "png", **fields: Any) -> dict[str, Any]:
    images = [{"url": "", "seed": seed, "width": 64, "height": 64, "format": format} for seed in seeds]
    return view("succeeded", images=images, timings={"total": 1.25}, **fields)


@dataclass
class FakeServer:
    """Answers like a gateway: POST gives the job, each GET the next of `views` (the last one again and again)."""

    views: list[dict[str, Any]] = field(default_factory=lambda: [succeeded(7)])
    models: list[dict[str, Any]] = field(default_factory=lambda: [{"name": "demo", "loaded": True}])
    refusal: tuple[int, Any] | None = None
    posted: list[dict[str, Any]] = field(default_factory=list)
    viewed: threading.Event = field(default_factory=threading.Event)
    canceled: threading.Event = field(default_factory=threading.Event)
    url: str = ""

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        if path == "/v1/models":
            return 200, {"models": self.models}
        if method == "POST" and path == "/v1/generations":
            self.posted.append(json.loads(body))
            return self.refusal or (202, view("queued", queue_position=0))
        if path.endswith("/cancel"):
            self.canceled.set()
            return 200, view("canceled")
        if "/images/" in path:
            return 200, f"picture {path[-1]}".encode()
        self.viewed.set()
        return 200, self.views.pop(0) if len(self.views) > 1 else self.views[0]


@pytest.fixture
def server() -> Iterator[FakeServer]:
    fake = FakeServer()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, answer = fake.answer(
                self.command, self.path, self.rfile.read(int(self.headers["content-length"] or 0))
            )
            content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_POST = do_GET

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        fake.url = f"http://127.0.0.1:{http.server_address[1]}"
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield fake
        http.shutdown()
        thread.join()


def generate(server: FakeServer, *options: object) -> Result:
    arguments = ["generate", "a red circle", "--url", server.url, *map(str, options)]
    return CliRunner().invoke(cli, arguments)


def test_generate_saves_the_picture_and_tells_about_it(server: FakeServer, tmp_path: Path) -> None:
    server.views = [view("queued", queue_position=2), view("running", progress={"step": 1, "steps": 4}), succeeded(7)]
    result = generate(server, "--output", tmp_path / "a.png")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "a.png").read_bytes() == b"picture 0"
    assert [line.split()[:2] for line in result.stdout.splitlines()] == [
        ["id", JOB],
        ["model", "demo"],
        ["time", "1.2"],
        ["picture", str(tmp_path / "a.png")],
    ]
    assert "seed 7" in result.stdout


def test_generate_posts_what_was_asked_and_nothing_else(server: FakeServer, tmp_path: Path) -> None:
    options = "--negative blur --width 512 --height 256 --steps 3 --guidance 2.5 --seed 9 --num-images 2 --model m"
    generate(server, *options.split(), "--output", tmp_path / "a.jpg")
    generate(server, "--output", tmp_path)
    assert server.posted[0] == {
        "model": "m",
        "prompt": "a red circle",
        "negative_prompt": "blur",
        "width": 512,
        "height": 256,
        "steps": 3,
        "guidance_scale": 2.5,
        "seed": 9,
        "num_images": 2,
        "output_format": "jpeg",
    }
    assert server.posted[1] == {"model": "demo", "prompt": "a red circle"}


def test_generate_makes_a_picture_of_each_loaded_model(server: FakeServer, tmp_path: Path) -> None:
    names = {"demo-turbo": True, "demo": True, "cold": False}
    server.models = [{"name": name, "loaded": loaded} for name, loaded in names.items()]
    result = generate(server, "--every-model", "--output", tmp_path / "a.png")
    assert result.exit_code == 0, result.output
    assert [posted["model"] for posted in server.posted] == ["demo", "demo-turbo"]
    assert {path.name for path in tmp_path.iterdir()} == {"a.png", "a-turbo.png"}
    assert [line.split()[0] for line in result.stdout.splitlines()] == ["id", "model", "time", "picture"] * 2


def test_generate_refuses_one_model_and_every_model(server: FakeServer, tmp_path: Path) -> None:
    result = generate(server, "--every-model", "--model", "demo", "--output", tmp_path)
    assert result.exit_code == 1
    assert "--every-model and --model demo contradict each other" in result.stderr
    assert server.posted == []


def test_generate_numbers_several_pictures(server: FakeServer, tmp_path: Path) -> None:
    server.views = [succeeded(7, 8)]
    generate(server, "--output", tmp_path / "a.png")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        "a-0.png": b"picture 0",
        "a-1.png": b"picture 1",
    }


def test_generate_names_pictures_in_a_folder_by_their_job(server: FakeServer, tmp_path: Path) -> None:
    server.views = [succeeded(7, format="jpeg")]
    generate(server, "--output", tmp_path, "--format", "jpeg")
    assert [path.name for path in tmp_path.iterdir()] == [f"{JOB}.jpg"]


def test_generate_passes_warnings_on(server: FakeServer, tmp_path: Path) -> None:
    server.views = [succeeded(7, warnings=["the prompt was cut"])]
    assert "warning: the prompt was cut" in generate(server, "--output", tmp_path).stderr


def test_generate_takes_a_loaded_model_when_none_is_named(server: FakeServer, tmp_path: Path) -> None:
    server.models = [{"name": "cold", "loaded": False}, {"name": "warm", "loaded": True}]
    generate(server, "--output", tmp_path)
    assert server.posted[0]["model"] == "warm"


def test_generate_says_when_the_server_has_no_model(server: FakeServer, tmp_path: Path) -> None:
    server.models = []
    result = generate(server, "--output", tmp_path)
    assert result.exit_code == 1
    assert "no worker has started" in result.stderr


def test_generate_shows_a_refusal_in_the_servers_words(server: FakeServer, tmp_path: Path) -> None:
    error = {"code": "invalid_field", "message": "width is 7; allowed: more", "field": "width", "request_id": "r"}
    server.refusal = (422, {"error": error})
    result = generate(server, "--output", tmp_path)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "error: width is 7; allowed: more (invalid_field, request r)\n"


def test_generate_shows_why_a_job_failed(server: FakeServer, tmp_path: Path) -> None:
    server.views = [view("failed", error={"code": "out_of_memory", "message": "too large"})]
    result = generate(server, "--output", tmp_path)
    assert result.exit_code == 1
    assert result.stderr == f"error: generation {JOB} failed: too large (out_of_memory)\n"


@pytest.mark.parametrize("answer", [b"<html>", [], {"error": "no"}, {"detail": "x"}])
def test_generate_doubts_a_server_that_is_no_darkroom(server: FakeServer, tmp_path: Path, answer: object) -> None:
    server.refusal = (502, answer)
    result = generate(server, "--output", tmp_path)
    assert result.exit_code == 1
    assert "502 Bad Gateway; is that a Darkroom server?" in result.stderr


@pytest.mark.parametrize("answer", [b"<html>", [], {"detail": "x"}])
def test_generate_doubts_an_answer_that_is_no_generation(server: FakeServer, tmp_path: Path, answer: object) -> None:
    server.refusal = (200, answer)
    result = generate(server, "--output", tmp_path)
    assert result.exit_code == 1
    assert "is no Darkroom server" in result.stderr


def test_generate_refuses_a_prompt_that_is_not_utf_8(server: FakeServer, tmp_path: Path) -> None:
    result = generate(server, "--negative", "\udcff", "--output", tmp_path)
    assert result.exit_code == 1
    assert "UTF-8 is expected" in result.stderr
    assert not server.posted


def test_generate_says_how_to_start_a_server_when_none_answers(server: FakeServer) -> None:
    result = CliRunner().invoke(cli, ["generate", "x", "--url", "http://127.0.0.1:9"])
    assert result.exit_code == 1
    assert "nothing answers at http://127.0.0.1:9" in result.stderr
    assert "darkroom up" in result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--output", "/no/such/folder/a.png"], "there is no folder '/no/such/folder'"),
        (["--output", "/etc/passwd/a.png"], "--output is '/etc/passwd/a.png' (Not a directory): name another file"),
        (["--output", f"{'a' * 300}.png"], "aaa.png' (File name too long): name another file or folder"),
        (["--output", "/proc/sys/a.png"], "/proc/sys cannot be written to: name another file or folder"),
        (["--output", "a.gif"], "--output ends with '.gif'; allowed: .png, .jpg, .jpeg, .webp"),
        (["--output", "a.png", "--format", "webp"], "--format is 'webp', but --output ends with '.png'"),
    ],
)
def test_generate_refuses_a_bad_output_before_any_work(server: FakeServer, options: list[str], message: str) -> None:
    result = generate(server, *options)
    assert result.exit_code == 1
    assert message in result.stderr
    assert server.posted == []


def test_generate_refuses_a_guidance_that_is_no_number(server: FakeServer, tmp_path: Path) -> None:
    result = generate(server, "--guidance", "nan", "--output", tmp_path)
    assert (result.exit_code, result.stderr) == (1, "error: --guidance is nan; allowed: a finite number\n")
    assert server.posted == []


def test_generate_says_where_a_picture_is_that_could_not_be_saved(server: FakeServer) -> None:
    server.views = [succeeded(7)]
    server.views[0]["images"][0]["url"] = "http://server/picture"
    result = generate(server, "--output", "/dev/full")
    assert result.exit_code == 1
    assert "No space left on device; it is kept at http://server/picture\n" in result.stderr


def test_generate_says_how_a_key_is_given(server: FakeServer, tmp_path: Path) -> None:
    error = {"code": "unauthorized", "message": "this server asks for one", "field": None, "request_id": "r"}
    server.refusal = (401, {"error": error})
    result = generate(server, "--output", tmp_path)
    assert result.exit_code == 1
    assert "(unauthorized, request r); give one with --key or DARKROOM_API_KEY\n" in result.stderr


def test_ctrl_c_cancels_the_job(server: FakeServer, tmp_path: Path) -> None:
    server.views = [view("running", progress={"step": 1, "steps": 100})]
    argv = [sys.executable, "-m", "app.cli", "generate", "x", "--url", server.url, "--output", str(tmp_path)]
    # Where the tests run in the background SIGINT is ignored, and children inherit that.
    kept = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(argv, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, kept)
    with process:
        assert server.viewed.wait(30)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert errors == f"{JOB} canceled\n"
    assert server.canceled.is_set()


def test_commands_are_shown_as_a_shell_finds_them(tmp_path: Path) -> None:
    assert _program(".venv/bin/darkroom", path=str(tmp_path)) == ".venv/bin/darkroom"
    (tmp_path / "darkroom").write_text("#!/bin/sh\n")
    (tmp_path / "darkroom").chmod(0o755)
    assert _program(".venv/bin/darkroom", path=str(tmp_path)) == "darkroom"


def test_wrong_settings_are_named_one_a_line() -> None:
    env = {"DARKROOM_PORT": "many", "DARKROOM_REDIS_URL": "http://:secret@nowhere"}
    result = CliRunner(env=env).invoke(cli, ["up"])
    assert result.exit_code == 1
    assert "DARKROOM_PORT is 'many'" in result.stderr
    assert "DARKROOM_REDIS_URL:" in result.stderr
    assert "secret" not in result.stderr


def test_embedded_valkey_is_refused_in_production(tmp_path: Path) -> None:
    env = {"DARKROOM_ENV": "production", "DARKROOM_DATA_DIR": str(tmp_path / "data")}
    result = CliRunner(env=env).invoke(cli, ["up"])
    assert result.exit_code == 1
    assert "set DARKROOM_REDIS_URL" in result.stderr
    assert not (tmp_path / "data").exists()


def test_up_refuses_a_port_in_use(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        result = CliRunner(env={"DARKROOM_DATA_DIR": str(tmp_path)}).invoke(cli, ["up", "--port", port])
    assert result.exit_code == 1
    assert f"cannot listen on 127.0.0.1 port {port}" in result.stderr
    assert "--port" in result.stderr


@pytest.fixture
def taken_port() -> Iterator[int]:
    """A port of this machine at which something listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield taken.getsockname()[1]


def test_gateway_refuses_a_port_in_use_in_one_sentence(taken_port: int) -> None:
    result = CliRunner().invoke(cli, ["gateway", "--port", str(taken_port)])
    said = f"cannot listen on 127.0.0.1 port {taken_port} (Address already in use): choose another with --port or "
    assert (result.exit_code, result.stderr) == (1, f"error: {said}DARKROOM_PORT\n")


def test_webhooks_refuse_a_port_in_use_in_one_sentence(taken_port: int) -> None:
    result = CliRunner(env={"DARKROOM_WEBHOOK_METRICS_PORT": str(taken_port)}).invoke(cli, ["webhooks"])
    said = f"cannot serve /metrics on 127.0.0.1 port {taken_port} (Address already in use): choose another "
    assert result.exit_code == 1
    assert f"error: {said}DARKROOM_WEBHOOK_METRICS_PORT, or 0 for none\n" in result.stderr


@pytest.mark.parametrize("command", [["up"], ["webhooks"]])
def test_command_tells_of_a_variable_that_nothing_reads(command: list[str], tmp_path: Path, taken_port: int) -> None:
    env = {"DARKROOM_DATA_DIR": str(tmp_path), "DARKROOM_AUHT": "on"}  # both end at the port
    env |= {"DARKROOM_PORT": str(taken_port), "DARKROOM_WEBHOOK_METRICS_PORT": str(taken_port)}
    result = CliRunner(env=env).invoke(cli, command)
    assert result.stderr.count("nothing reads DARKROOM_AUHT; did you mean DARKROOM_AUTH?") == 1


def test_command_line_never_loads_torch() -> None:
    code = "import sys, app.cli, app.doctor; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60, check=False).returncode == 0


def test_generate_outlasts_a_server_that_is_away_for_a_moment(server: FakeServer, tmp_path: Path) -> None:
    away = {"code": "queue_unavailable", "message": "away", "field": None, "request_id": "r"}
    calls = iter([(503, {"error": away}), (503, {"error": away})])
    plain = server.answer

    def answer(method: str, path: str, body: bytes) -> tuple[int, Any]:
        normal = plain(method, path, body)
        return next(calls, normal) if path == f"/v1/generations/{JOB}" else normal

    server.answer = answer  # type: ignore[method-assign]
    result = generate(server, "--output", tmp_path / "a.png")
    assert result.exit_code == 0, result.output
