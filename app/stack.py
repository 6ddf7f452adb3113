"""All of Darkroom on this machine: embedded Valkey, worker, gateway, sender of webhooks as children of one process."""

from __future__ import annotations

import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import redis
from pydantic import Field

from app.client import Client, Refused, Unreachable
from app.embedded import MIN_VERSION, EmbeddedFailed, EmbeddedValkey, dotted, free_port, server_version
from app.settings import GatewaySettings
from worker.contract.child import Child
from worker.contract.errors import CannotStart, StoreUnavailable
from worker.contract.settings import overridden
from worker.contract.store import open_store

_GATEWAY_GRACE_S = 10.0
_SENDER_GRACE_S = 5.0
_HAND_BACK_S = 5.0
"""Beyond its grace, to finish a step and to hand back its jobs."""

_POLL_S = 0.2
_GATEWAY_START_S = 60.0

COMMANDS = {
    "gateway": (sys.executable, "-P", "-m", "app.cli", "gateway"),
    "worker": (sys.executable, "-P", "-m", "worker"),
    "webhooks": (sys.executable, "-P", "-m", "app.cli", "webhooks"),
}


MEND_REDIS = "start it, or correct DARKROOM_REDIS_URL; `darkroom up` without it starts its own"
MEND_BUCKET = "see that the bucket exists, and set DARKROOM_S3_ENDPOINT and the key right"


class StackFailed(Exception):
    """The stack cannot start, or cannot go on; says which part, why, and what to do."""


class StackSettings(GatewaySettings):
    """What `darkroom up` reads from `DARKROOM_*`, on top of the gateway's."""

    env: Literal["development", "production"] = Field(
        default="development", description="production refuses the embedded Valkey"
    )
    data_dir: Path = Field(default=Path(".darkroom"), description="folder of the embedded Valkey, pictures and logs")
    grace_s: float = Field(
        default=20.0, ge=0, le=86_400, description="seconds to finish jobs when told to stop; the rest are handed back"
    )

    @property
    def embedded(self) -> bool:
        """Whether Valkey is ours to start: nobody said where Redis is."""
        return "redis_url" not in self.model_fields_set

    @property
    def valkey_dir(self) -> Path:
        """Where the embedded Valkey keeps its data."""
        return self.data_dir / "valkey"

    @property
    def pictures(self) -> Path:
        """Where the pictures go: DARKROOM_STORE_DIR, else a folder beside the rest."""
        return self.store_dir if "store_dir" in self.model_fields_set else self.data_dir / "pictures"


class Stack:
    """Starts the parts in order, watches them, and stops them in order. A context manager; main thread only."""

    def __init__(
        self,
        settings: StackSettings,
        report: Callable[[str], None],
        *,
        verbose: bool = False,  # logs go where we write, not to files
        alone: bool = False,  # own Valkey and pictures in data_dir, whatever the environment says
        commands: Mapping[str, Sequence[str]] = COMMANDS,
    ) -> None:
        self._settings, self._report, self._verbose, self._commands = settings, report, verbose, commands
        self._alone, self._own_valkey = alone, alone or settings.embedded
        self._pictures = settings.data_dir / "pictures" if alone else settings.pictures
        self._logs = settings.data_dir / "logs"
        self._port = settings.port or free_port()
        self.url = f"http://{client_host(settings.host)}:{self._port}"
        self._valkey: EmbeddedValkey | None = None
        self._worker: Child | None = None
        self._gateway: Child | None = None
        self._webhooks: Child | None = None  # none where we are there for one job
        self._env = dict(os.environ)

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def wait_ready(self) -> list[str]:
        """The models that a worker holds, once there are any. However long that takes: only a death ends it early."""
        gateway = _running(self._gateway)
        deadline, answered = time.monotonic() + _GATEWAY_START_S, False
        with Client(self.url, timeout_s=2.0) as client:
            while True:
                for child in self._parts():
                    self._require(child, "while starting")
                try:
                    loaded = sorted(client.workers())
                except (Unreachable, Refused):
                    if not answered and time.monotonic() > deadline:
                        raise StackFailed(f"the gateway does not answer at {self.url}{_ending(gateway)}") from None
                else:
                    if loaded:
                        return loaded
                    if not answered:
                        self._report("the gateway answers; the worker is loading its models")
                    answered = True
                time.sleep(_POLL_S)

    def supervise(self) -> None:
        """Runs until a part dies. Worker processes that die are no such part: their supervisor starts them again."""
        while True:
            for child in self._parts():
                self._require(child, "unexpectedly")
            time.sleep(_POLL_S)

    def stop(self) -> None:
        """Gateway first, so that nothing new comes in; then the worker, which finishes what it runs; Valkey last.

        Before that the sender of webhooks, which tells of jobs that ended meanwhile. A second signal ends all at once.
        """
        try:
            if self._gateway:
                self._gateway.stop(self._settings.drain_s + _GATEWAY_GRACE_S)
            if self._worker and not self._worker.stop(self._settings.grace_s + _HAND_BACK_S):
                self._report(f"the worker did not finish within {self._settings.grace_s:g} s and was killed")
            if self._webhooks:  # what it does not get told now it tells after the next start
                self._webhooks.stop(min(self._settings.grace_s, _SENDER_GRACE_S))
        except BaseException:
            for child in (self._gateway, self._worker, self._webhooks):
                if child:
                    child.kill()
            raise
        finally:
            if self._valkey:
                self._valkey.stop()

    def _start(self) -> None:
        settings = self._settings
        if self._own_valkey and settings.env == "production":
            raise StackFailed(
                "DARKROOM_ENV is production, so the embedded Valkey is not started: "
                "set DARKROOM_REDIS_URL to a Redis or Valkey, 7.2 or later, with an append-only file"
            )
        if refusal := listen_refusal(settings.host, self._port):
            raise StackFailed(refusal)
        for folder in (settings.data_dir, self._logs):
            _require_writable(folder, "DARKROOM_DATA_DIR")
        if settings.s3_bucket is None or self._alone:
            _require_writable(self._pictures, "DARKROOM_STORE_DIR")
        else:
            self._require_bucket()
        if not self._own_valkey:
            self._require_redis()
        self._env = overridden(
            self._env,
            host=settings.host,
            port=self._port,
            grace_s=settings.grace_s,
            store_dir=self._pictures.resolve(),
            redis_url=self._start_valkey() if self._own_valkey else settings.redis_url,
        )
        if self._alone:
            # keys: on loopback, and only for as long as we run; metrics: another worker here may have that port
            self._env = overridden(self._env, auth="off", metrics_port=0, s3_bucket=None)
        self._worker = self._spawn("worker")
        self._gateway = self._spawn("gateway")
        if not self._alone:
            self._webhooks = self._spawn("webhooks")

    def _parts(self) -> list[Child]:
        valkey = self._valkey.child if self._valkey else None
        return [child for child in (self._gateway, self._worker, self._webhooks, valkey) if child]

    def _require_bucket(self) -> None:
        try:
            open_store(self._settings).check()
        except CannotStart as error:
            raise StackFailed(str(error)) from None
        except StoreUnavailable as error:
            bucket = self._settings.s3_bucket
            raise StackFailed(f"bucket {bucket} cannot be used ({error.__cause__}): {MEND_BUCKET}") from None

    def _require_redis(self) -> None:
        url = self._settings.redis_url
        where = f"Redis at {url.host}:{url.port or 6379}"
        try:
            version = server_version(str(url))
        except redis.exceptions.NoPermissionError:
            return  # it knows us, and needs not tell
        except redis.RedisError as error:  # does not show the password
            raise StackFailed(f"{where} cannot be used ({error}): {MEND_REDIS}") from None
        if version < MIN_VERSION:
            raise StackFailed(f"{where} is {dotted(version)}; needed: {dotted(MIN_VERSION)} or later: {MEND_REDIS}")

    def _start_valkey(self) -> str:
        folder = self._settings.valkey_dir
        _require_writable(folder, "DARKROOM_DATA_DIR")
        self._valkey = EmbeddedValkey(folder, self._log("valkey"))
        try:
            self._valkey.start()
        except EmbeddedFailed as error:
            raise StackFailed(str(error)) from None
        self._report(f"embedded Valkey {self._valkey.child.pid} keeps its data in {folder}")
        return self._valkey.url

    def _spawn(self, name: str) -> Child:
        child = Child(name, self._commands[name], env=self._env, log=None if self._verbose else self._log(name))
        self._report(f"{name} {child.pid} started" + (f", its log is {child.log}" if child.log else ""))
        return child

    def _log(self, name: str) -> Path:
        log = self._logs / f"{name}.log"
        if log.exists():
            log.replace(log.with_suffix(".log.1"))
        return log

    def _require(self, child: Child, when: str) -> None:
        if child.exit_code is not None:
            raise StackFailed(f"the {child.name} {child.describe_exit()} {when}{_ending(child)}")


def _running(child: Child | None) -> Child:
    assert child is not None, "the stack is not started"
    return child


def _require_writable(folder: Path, variable: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = f"{folder} cannot be written to ({error.strerror})"
        raise StackFailed(f"{reason}: set {variable} to another folder") from None


def _ending(child: Child) -> str:
    lines = child.last_lines()
    return f"; the end of {child.log}:\n{lines}" if lines else ""


def client_host(host: str) -> str:
    """Where a client on this machine finds a server that listens on `host`."""
    if host in ("", "0.0.0.0"):
        return "127.0.0.1"
    if host == "::":
        return "[::1]"
    return f"[{host}]" if ":" in host else host


def listen_error(host: str, port: int) -> str | None:
    """Why nothing can listen there now; None if something can."""
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, *_, address = found[0]
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        return error.strerror or str(error)
    return None


def listen_refusal(host: str, port: int) -> str | None:
    """What whoever wants to listen there is told if nothing can."""
    reason = listen_error(host, port)
    return reason and f"cannot listen on {host} port {port} ({reason}): choose another with --port or DARKROOM_PORT"
