"""`darkroom doctor` tells what is wrong, and how to mend it."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from app import doctor
from app.cli import cli
from app.embedded import EmbeddedValkey, connect
from app.finding import Finding
from app.stack import StackSettings
from tests.bucket import S3Server


def finding(findings: Iterator[Finding] | list[Finding], what: str) -> Finding:
    return next(one for one in findings if one.what == what)


def bundle(folder: Path) -> Path:
    folder.mkdir()
    index = {
        "_class_name": "StableDiffusion3Pipeline",
        "vae": ["diffusers", "AutoencoderKL"],
        "image_encoder": [None, None],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "vae").mkdir()
    return folder


def test_old_python_is_wrong() -> None:
    assert doctor.check_python((3, 10)).state == "wrong"
    assert doctor.check_python((3, 11)).state == "ok"


def test_variable_that_nothing_reads_is_told_with_the_one_that_was_meant() -> None:
    [found] = doctor.check_variables({"DARKROOM_AUHT": "on", "DARKROOM_AUTH": "on", "PATH": "/bin"})
    assert (found.state, found.found) == ("warning", "nothing reads DARKROOM_AUHT; did you mean DARKROOM_AUTH?")


def test_missing_package_is_named_with_the_command_that_mends_it() -> None:
    found = doctor.check_packages("worker", ("pydantic", "no_such_package"))
    assert (found.state, found.found) == ("wrong", "missing: no_such_package")
    assert found.mend == "pip install 'darkroom[worker]'"


@pytest.mark.parametrize(
    ("device", "smi", "cuda", "state"),
    [
        ("auto", None, None, "warning"),
        ("cuda", None, None, "wrong"),
        ("cuda:1", "H100, 80 GiB", "False", "wrong"),
        ("auto", "H100, 80 GiB", "False", "warning"),
        ("auto", "H100, 80 GiB", "True", "ok"),
        ("cpu", "H100, 80 GiB", "True", "warning"),
    ],
)
def test_gpu_matters_as_much_as_the_device_setting_says(
    device: str, smi: str | None, cuda: str | None, state: str
) -> None:
    assert doctor.check_gpu(device, lambda argv: smi if argv[0] == "nvidia-smi" else cuda).state == state


def test_models_are_looked_for_where_the_setting_says(tmp_path: Path) -> None:
    whole, cut, empty = bundle(tmp_path / "whole"), bundle(tmp_path / "cut"), tmp_path / "empty"
    (cut / "vae").rmdir()
    empty.mkdir()
    (tmp_path / "one.safetensors").touch()
    models = f"a={whole},b={cut}, c={empty},d={tmp_path}/none,e={tmp_path}/one.safetensors,f"
    found = {one.what: one for one in doctor.check_models(models)}
    assert {what: one.state for what, one in found.items()} == {
        "model a": "ok",
        "model b": "wrong",
        "model c": "wrong",
        "model d": "wrong",
        "model e": "ok",
        "model f": "wrong",
    }
    assert found["model b"].found == f"{cut} lacks vae"
    assert found["model d"].found.endswith("none does not exist")
    assert "name=path" in found["model f"].found


def test_a_variant_is_looked_for_with_its_base(tmp_path: Path) -> None:
    for name, base in (("good", "../whole"), ("bad", "../gone")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "darkroom.json").write_text(json.dumps({"base": base}))
    bundle(tmp_path / "whole")
    good, bad = doctor.check_models(f"good={tmp_path}/good,bad={tmp_path}/bad")
    assert good.state == "ok"
    assert (bad.state, bad.found) == (
        "wrong",
        f"{tmp_path}/bad differs from {tmp_path}/bad/../gone, which does not exist",
    )


def test_model_index_that_is_not_json_is_wrong(tmp_path: Path) -> None:
    (bundle(tmp_path / "x") / "model_index.json").write_text("{")
    assert "cannot be read" in next(doctor.check_models(f"x={tmp_path}/x")).found


def test_redis_that_does_not_answer_is_wrong_and_its_password_stays_secret() -> None:
    settings = StackSettings(redis_url="redis://:secret@127.0.0.1:9/0")
    found = finding(doctor.check_redis(settings), "Redis")
    assert found.state == "wrong"
    assert "127.0.0.1:9" in found.found
    assert "secret" not in found.found


def test_redis_that_would_lose_jobs_is_told(tmp_path: Path) -> None:
    valkey = EmbeddedValkey(tmp_path, tmp_path / "log")
    valkey.start()
    settings = StackSettings(redis_url=valkey.url)
    assert {one.state for one in doctor.check_redis(settings)} == {"ok"}
    with connect(valkey.url) as client:
        client.config_set("maxmemory-policy", "allkeys-lru")
        client.config_set("appendonly", "no")
    findings = list(doctor.check_redis(settings))
    assert finding(findings, "Redis keeps jobs").state == "wrong"
    assert finding(findings, "Redis survives restarts").state == "warning"
    valkey.stop()


def test_embedded_valkey_is_no_answer_in_production(tmp_path: Path) -> None:
    settings = StackSettings(env="production", data_dir=tmp_path)
    assert finding(doctor.check_embedded(settings, lambda argv: "Valkey"), "Redis").state == "wrong"


def test_folder_that_cannot_be_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert next(doctor.check_folder("pictures", tmp_path / "file")).state == "wrong"
    assert next(doctor.check_folder("pictures", tmp_path / "new" / "deep")).state != "wrong"
    assert not (tmp_path / "new").exists()


def test_port_in_use_is_wrong() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        found = doctor.check_port(StackSettings(port=taken.getsockname()[1]))
    assert found.state == "wrong"
    assert "DARKROOM_PORT" in found.mend


def test_doctor_for_programs_is_json_and_its_exit_code_says_whether_all_is_well(tmp_path: Path) -> None:
    env = {"DARKROOM_DATA_DIR": str(tmp_path), "DARKROOM_PORT": "0", "DARKROOM_REDIS_URL": "redis://127.0.0.1:9"}
    result = CliRunner(env=env).invoke(cli, ["doctor", "--role", "gateway", "--json"])
    report = json.loads(result.stdout)
    assert (result.exit_code, report["well"]) == (1, False)
    assert [one["what"] for one in report["findings"] if one["state"] == "wrong"] == ["Redis"]


def test_doctor_for_people_says_how_to_mend(tmp_path: Path) -> None:
    env = {"DARKROOM_STORE_DIR": str(tmp_path), "DARKROOM_MODELS": f"x={tmp_path}/none"}
    result = CliRunner(env=env).invoke(cli, ["doctor"])
    assert result.exit_code == 1
    assert "wrong  model x: " in result.stdout
    assert "name a diffusers folder" in result.stdout


def test_settings_from_files_are_looked_at_as_those_of_the_environment(tmp_path: Path) -> None:
    (tmp_path / "models").write_text(f"mounted={tmp_path}/none\n")
    (tmp_path / "redis").write_text("redis://:secret@127.0.0.1:9\n")
    env = {
        "DARKROOM_DATA_DIR": str(tmp_path),
        "DARKROOM_MODELS_FILE": str(tmp_path / "models"),
        "DARKROOM_REDIS_URL_FILE": str(tmp_path / "redis"),
    }
    result = CliRunner(env=env).invoke(cli, ["doctor"])
    assert "wrong  model mounted: " in result.stdout
    assert "wrong  Redis: 127.0.0.1:9: " in result.stdout
    assert "secret" not in result.output


def test_a_bucket_is_asked_where_the_settings_name_one(tmp_path: Path) -> None:
    server = S3Server(tmp_path)
    given = {f"DARKROOM_{name.upper()}": str(value) for name, value in server.settings().items()}
    env = {"DARKROOM_DATA_DIR": str(tmp_path / "data"), "DARKROOM_REDIS_URL": "redis://127.0.0.1:9"} | given

    def look(**other: str) -> tuple[str, str]:
        result = CliRunner(env=env | other).invoke(cli, ["doctor", "--role", "gateway", "--json"])
        found = [Finding(**one) for one in json.loads(result.stdout)["findings"]]
        one = finding(found, "bucket for pictures")
        return one.state, one.found

    server.start()
    try:
        assert look() == ("ok", f"pictures at {server.url}/ answers")
        state, found = look(DARKROOM_S3_SECRET_ACCESS_KEY="not-the-secret")
        assert (state, "not-the-secret" in found) == ("wrong", False)
        assert look(DARKROOM_S3_BUCKET="no-such-bucket")[0] == "wrong"
    finally:
        server.stop()


def test_options_of_one_doctor_are_refused_by_the_other() -> None:
    assert (
        "--model and --patience are for --deployment" in CliRunner().invoke(cli, ["doctor", "--patience", "3"]).stderr
    )
    both = CliRunner().invoke(cli, ["doctor", "--role", "worker", "--deployment", "http://127.0.0.1:9"])
    assert (both.exit_code, "say one" in both.stderr) == (1, True)


def test_doctor_refuses_an_unknown_role() -> None:
    result = CliRunner().invoke(cli, ["doctor", "--role", "cook"])
    assert result.exit_code == 1
    assert "--role is 'cook'; allowed: all, gateway, worker" in result.stderr
