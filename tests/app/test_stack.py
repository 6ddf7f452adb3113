"""The stack starts, watches and stops its parts: a real Valkey, and stand-ins for gateway and worker."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from app.embedded import EmbeddedValkey, connect
from app.stack import Stack, StackFailed, StackSettings
from tests.processes import wait_until

GATEWAY = """
import http.server, json, os, redis
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        loaded = redis.Redis.from_url(os.environ["DARKROOM_REDIS_URL"]).exists("worker") == 1
        body = json.dumps({"workers": {"warm": 1} if loaded else {}}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
http.server.HTTPServer(("127.0.0.1", int(os.environ["DARKROOM_PORT"])), Handler).serve_forever()
"""
WORKER = """
import os, redis, signal, sys, time
def stop(*_):
    redis.Redis.from_url(os.environ["DARKROOM_REDIS_URL"]).append("stopped", "in order")
    sys.exit()
signal.signal(signal.SIGTERM, stop)
redis.Redis.from_url(os.environ["DARKROOM_REDIS_URL"]).set("worker", os.getpid())
print("pictures in", os.environ["DARKROOM_STORE_DIR"], os.environ.get("DARKROOM_S3_BUCKET", ""), flush=True)
time.sleep(600)
"""
READER = """
import time
from worker.contract.settings import ContractSettings
settings = ContractSettings()
print(settings.redis_url, settings.store_dir, flush=True)
time.sleep(600)
"""
SLEEPER = "import time; time.sleep(600)"
COMMANDS = {
    "gateway": (sys.executable, "-c", GATEWAY),
    "worker": (sys.executable, "-c", WORKER),
    "webhooks": (sys.executable, "-c", SLEEPER),
}


class Reports(list[str]):
    """What the stack said."""

    def pid(self, name: str) -> int:
        return int([line for line in self if line.startswith(f"{name} ")][-1].split()[1])

    def said(self, text: str) -> bool:
        return any(text in line for line in self)


@pytest.fixture
def reports() -> Reports:
    return Reports()


@pytest.fixture
def settings(tmp_path: Path) -> StackSettings:
    return StackSettings(data_dir=tmp_path, port=0)


def is_alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def soon(condition: Callable[[], object], then: Callable[[], object]) -> threading.Thread:
    """Does `then` from the side, once `condition` holds."""

    def watch() -> None:
        deadline = time.monotonic() + 60
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.02)
        then()

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def test_stack_is_ready_with_the_models_that_a_worker_holds(settings: StackSettings, reports: Reports) -> None:
    with Stack(settings, reports.append, commands=COMMANDS) as stack:
        assert stack.wait_ready() == ["warm"]
    assert "pictures in" in (settings.data_dir / "logs" / "worker.log").read_text()


def test_stack_stops_all_and_the_worker_before_its_valkey(settings: StackSettings, reports: Reports) -> None:
    with Stack(settings, reports.append, commands=COMMANDS) as stack:
        stack.wait_ready()
        pids = [reports.pid("gateway"), reports.pid("worker"), reports.pid("webhooks")]
        assert all(map(is_alive, pids))
    assert not any(map(is_alive, pids))
    again = EmbeddedValkey(settings.data_dir / "valkey", settings.data_dir / "again.log")
    again.start()
    with connect(again.url) as client:
        assert client.get("stopped") == b"in order"
    again.stop()


def test_worker_that_does_not_stop_in_time_is_killed(tmp_path: Path, reports: Reports) -> None:
    deaf = WORKER.replace("sys.exit()", "time.sleep(600)")
    settings = StackSettings(data_dir=tmp_path, port=0, grace_s=0.1)
    with Stack(settings, reports.append, commands=COMMANDS | {"worker": (sys.executable, "-c", deaf)}) as stack:
        stack.wait_ready()
    assert reports.said("did not finish within 0.1 s")
    assert not is_alive(reports.pid("worker"))


@pytest.mark.parametrize("part", ["gateway", "worker", "webhooks", "embedded Valkey"])
def test_death_of_a_part_ends_the_stack(settings: StackSettings, reports: Reports, part: str) -> None:
    with Stack(settings, reports.append, commands=COMMANDS) as stack:
        stack.wait_ready()
        pid = int(next(line for line in reports if line.startswith(part)).removeprefix(part).split()[0])
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(StackFailed, match=rf"the {part.split()[-1].lower()} was ended by SIGKILL unexpectedly"):
            stack.supervise()


def test_worker_that_cannot_start_ends_the_stack_with_its_last_words(settings: StackSettings, reports: Reports) -> None:
    hopeless = {"worker": (sys.executable, "-c", "raise SystemExit('no such model')")}
    with (
        pytest.raises(StackFailed, match=r"(?s)worker ended with exit code 1 while starting.*no such model"),
        Stack(settings, reports.append, commands=COMMANDS | hopeless) as stack,
    ):
        stack.wait_ready()
    assert not is_alive(reports.pid("gateway"))


def test_stack_alone_shares_nothing_with_a_configured_one(
    tmp_path: Path, reports: Reports, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DARKROOM_S3_BUCKET", "shared-bucket")
    settings = StackSettings(
        data_dir=tmp_path / "own", port=0, redis_url="redis://127.0.0.1:9", store_dir=tmp_path / "shared"
    )
    with Stack(settings, reports.append, commands=COMMANDS, alone=True) as stack:
        stack.wait_ready()
    assert not reports.said("webhooks")
    assert f"pictures in {tmp_path}/own/pictures \n" in (tmp_path / "own" / "logs" / "worker.log").read_text()


def test_parts_read_what_the_stack_read_from_files(
    tmp_path: Path, reports: Reports, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in {"redis_url": redis_url, "store_dir": f"{tmp_path}/from-a-file"}.items():
        (tmp_path / name).write_text(text)
        monkeypatch.setenv(f"DARKROOM_{name.upper()}_FILE", str(tmp_path / name))
    settings = StackSettings(data_dir=tmp_path, port=0)
    with Stack(settings, reports.append, commands=COMMANDS | {"webhooks": (sys.executable, "-c", READER)}) as stack:
        stack.wait_ready()
        log = tmp_path / "logs" / "webhooks.log"
        wait_until(lambda: log.exists() and "\n" in log.read_text())
    assert f"{redis_url} {tmp_path}/from-a-file" in log.read_text()


def test_stack_uses_the_redis_that_is_configured(tmp_path: Path, reports: Reports, redis_url: str) -> None:
    settings = StackSettings(data_dir=tmp_path, port=0, redis_url=redis_url)
    with Stack(settings, reports.append, commands=COMMANDS) as stack:
        stack.wait_ready()
    assert not reports.said("embedded")
    with connect(redis_url) as client:
        assert client.get("stopped") == b"in order"


def test_redis_that_may_not_tell_its_version_is_used(tmp_path: Path, reports: Reports, redis_url: str) -> None:
    with connect(redis_url) as client:
        client.execute_command("ACL", "SETUSER", "plain", "on", ">s", "~*", "&*", "+@all", "-info")
        try:
            url = redis_url.replace("redis://", "redis://plain:s@")
            settings = StackSettings(data_dir=tmp_path, port=0, redis_url=url)
            with Stack(settings, reports.append, commands=COMMANDS) as stack:
                stack.wait_ready()
        finally:
            client.execute_command("ACL", "DELUSER", "plain")


def test_redis_that_is_too_old_ends_the_start(tmp_path: Path, reports: Reports) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        old = threading.Thread(target=_answer_as_an_old_redis, args=(server,))
        old.start()
        port = server.getsockname()[1]
        settings = StackSettings(data_dir=tmp_path, port=0, redis_url=f"redis://127.0.0.1:{port}")
        with (
            pytest.raises(StackFailed, match=rf"Redis at 127\.0\.0\.1:{port} is 6\.2\.14; needed: 7\.2 or later"),
            Stack(settings, reports.append, commands=COMMANDS),
        ):
            pass
        old.join(10)


def _answer_as_an_old_redis(server: socket.socket) -> None:
    """One connection: a greeting, the version, and OK to all else."""
    told = b"redis_version:6.2.14\r\n"
    connection, _ = server.accept()
    with connection:
        while said := connection.recv(4096):
            if b"HELLO" in said:
                connection.sendall(b"%1\r\n$5\r\nproto\r\n:3\r\n")
            elif b"INFO" in said and b"SETINFO" not in said:
                connection.sendall(b"$%d\r\n%s\r\n" % (len(told), told))
            else:
                connection.sendall(b"+OK\r\n" * said.count(b"*"))


def test_redis_that_does_not_answer_ends_the_start(tmp_path: Path, reports: Reports) -> None:
    settings = StackSettings(data_dir=tmp_path, port=0, redis_url="redis://:hush@127.0.0.1:9")
    with (
        pytest.raises(
            StackFailed, match=r"Redis at 127\.0\.0\.1:9 cannot be used .*correct DARKROOM_REDIS_URL"
        ) as failed,
        Stack(settings, reports.append, commands=COMMANDS),
    ):
        pass
    assert "hush" not in str(failed.value)
    assert not reports


@pytest.mark.parametrize(
    ("taken", "variable"),
    [("data", "DATA_DIR"), ("data/logs", "DATA_DIR"), ("data/valkey", "DATA_DIR"), ("pictures", "STORE_DIR")],
)
def test_folder_that_cannot_be_written_to_ends_the_start(
    tmp_path: Path, reports: Reports, taken: str, variable: str
) -> None:
    (tmp_path / taken).parent.mkdir(exist_ok=True)
    (tmp_path / taken).touch()
    settings = StackSettings(data_dir=tmp_path / "data", store_dir=tmp_path / "pictures", port=0)
    said = rf"{tmp_path / taken} cannot be written to \(File exists\): set DARKROOM_{variable} to another folder"
    with pytest.raises(StackFailed, match=said), Stack(settings, reports.append, commands=COMMANDS):
        pass
    assert not reports


def test_bucket_that_does_not_answer_ends_the_start(tmp_path: Path, reports: Reports) -> None:
    keys = {"s3_access_key_id": "id", "s3_secret_access_key": "hush"}
    settings = StackSettings(data_dir=tmp_path, port=0, s3_bucket="pictures", s3_endpoint="http://127.0.0.1:9", **keys)  # type: ignore[arg-type]
    with (
        pytest.raises(StackFailed, match=r"bucket pictures cannot be used .*see that the bucket exists") as failed,
        Stack(settings, reports.append, commands=COMMANDS),
    ):
        pass
    assert "hush" not in str(failed.value)


def test_last_log_is_kept_over_a_restart(settings: StackSettings, reports: Reports) -> None:
    for _ in range(2):
        with Stack(settings, reports.append, commands=COMMANDS) as stack:
            stack.wait_ready()
    logs = {path.name for path in (settings.data_dir / "logs").iterdir()}
    assert {"worker.log", "worker.log.1", "gateway.log", "valkey.log.1"} <= logs
