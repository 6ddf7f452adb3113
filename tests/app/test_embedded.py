"""The embedded Valkey: real, private, durable, alone on its folder, gone when it should be."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from app.embedded import EmbeddedFailed, EmbeddedValkey, connect, parse_version, server_version

PARENT = """
import sys, time
from pathlib import Path
from app.embedded import EmbeddedValkey
valkey = EmbeddedValkey(Path(sys.argv[1]), Path(sys.argv[1], "log"))
valkey.start()
print(valkey.child.pid, valkey.url, flush=True)
time.sleep(600)
"""


@pytest.fixture
def embedded(tmp_path: Path) -> Iterator[EmbeddedValkey]:
    valkey = EmbeddedValkey(tmp_path / 'data "1"', tmp_path / "log")
    valkey.start()
    yield valkey
    valkey.stop()


def test_embedded_valkey_is_what_the_queue_needs(embedded: EmbeddedValkey) -> None:
    with connect(embedded.url) as client:
        info = client.info()
    assert info["maxmemory_policy"] == "noeviction"
    assert info["aof_enabled"] == 1
    assert server_version(embedded.url) >= (7, 2)


def test_embedded_valkey_refuses_who_lacks_its_password(embedded: EmbeddedValkey) -> None:
    port = embedded.url.rsplit(":", 1)[1]
    with connect(f"redis://127.0.0.1:{port}") as stranger, pytest.raises(redis.AuthenticationError):
        stranger.ping()
    command_line = Path(f"/proc/{embedded.child.pid}/cmdline").read_text()
    assert embedded.url.split("@")[0].removeprefix("redis://:") not in command_line


def test_embedded_valkey_keeps_its_data_over_a_restart(tmp_path: Path) -> None:
    first = EmbeddedValkey(tmp_path)
    first.start()
    with connect(first.url) as client:
        client.set("kept", "yes")
    first.stop()
    second = EmbeddedValkey(tmp_path)
    second.start()
    with connect(second.url) as client:
        assert client.get("kept") == b"yes"
    second.stop()
    assert second.child.exit_code == 0


def test_second_embedded_valkey_on_the_same_folder_is_refused(tmp_path: Path, embedded: EmbeddedValkey) -> None:
    with pytest.raises(EmbeddedFailed, match="another Darkroom runs"):
        EmbeddedValkey(tmp_path / 'data "1"').start(lock_wait_s=0.1)
    assert server_version(embedded.url)


def test_embedded_valkey_says_why_it_cannot_start(tmp_path: Path) -> None:
    broken = tmp_path / "appendonlydir"
    broken.mkdir()
    (broken / "appendonly.aof.manifest").write_text("nonsense\n")
    with pytest.raises(EmbeddedFailed, match=r"(?s)ended with exit code 1:.*manifest"):
        EmbeddedValkey(tmp_path, tmp_path / "log").start()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells children that their parent died")
def test_embedded_valkey_does_not_outlive_a_parent_that_is_killed(tmp_path: Path) -> None:
    argv = [sys.executable, "-c", PARENT, str(tmp_path)]
    parent = subprocess.Popen(argv, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2], text=True)
    with parent:
        assert parent.stdout is not None
        pid, url = parent.stdout.readline().split()
        assert server_version(url)
        os.kill(parent.pid, signal.SIGKILL)
    deadline = time.monotonic() + 20
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline, "it still runs"
        time.sleep(0.02)
    again = EmbeddedValkey(tmp_path)  # and its folder is free again
    again.start()
    again.stop()


def test_lock_file_is_for_the_owner_alone(tmp_path: Path, embedded: EmbeddedValkey) -> None:
    mode = (tmp_path / 'data "1"' / "lock").stat().st_mode
    assert stat.S_IMODE(mode) & 0o077 == 0


def test_folder_is_for_the_owner_alone_also_where_it_was_there_before(tmp_path: Path) -> None:
    folder = tmp_path / "valkey"
    folder.mkdir(mode=0o755)
    server = EmbeddedValkey(folder)
    server.start()
    server.stop()
    assert folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(("text", "version"), [("7.2.4", (7, 2, 4)), ("8.0", (8, 0)), ("255.255.255-dev", (255, 255))])
def test_versions_are_compared_as_numbers(text: str, version: tuple[int, ...]) -> None:
    assert parse_version(text) == version
