"""Real processes: `darkroom up` with its gateway, worker and Valkey, on a tiny model with random weights."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.processes import wait_until

ROOT = Path(__file__).parents[2]


class Up:
    """One `darkroom up` and all that it started."""

    def __init__(self, folder: Path, models: str, **env: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.data = folder / "data"
        self.output = folder / "up.log"
        own = {"DARKROOM_PORT": str(self.port), "DARKROOM_DATA_DIR": str(self.data), "DARKROOM_MODELS": models}
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "app.cli", "up"],
                cwd=ROOT,
                env=darkroom_env() | own | env,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def said(self, text: str) -> bool:
        return text in self.output.read_text()

    def wait_until_said(self, text: str) -> None:
        def said_or_over() -> bool:
            return self.said(text) or self.process.poll() is not None

        wait_until(said_or_over, 90)
        assert self.said(text), self.output.read_text()

    def pid(self, name: str) -> int:
        """The process id of the gateway, worker's supervisor, sender of webhooks or valkey that runs now."""
        told = {
            "valkey": "valkey-server",
            "gateway": "app.cli gateway",
            "worker": "-m worker",
            "webhooks": "app.cli webhooks",
        }[name]
        return next(pid for pid in children_of(self.process.pid) if told in command_of(pid))

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(60)


def darkroom_env() -> dict[str, str]:
    """Our environment without settings of Darkroom; the checkout is found from wherever a process starts."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("DARKROOM_")}
    return plain | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "default"}


def children_of(parent: int) -> list[int]:
    """Process ids, zombies left out."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, ppid = stat.read_text().rpartition(")")[2].split()[:2]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(ppid) == parent and state != "Z":
            found.append(int(stat.parent.name))
    return found


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except (FileNotFoundError, ProcessLookupError):
        return ""


@pytest.fixture(scope="session")
def models(tiny_bundle: Path) -> str:
    """What the worker shall serve: DARKROOM_MODELS if it is set, else the tiny bundle as `tiny`."""
    return os.environ.get("DARKROOM_MODELS") or f"tiny={tiny_bundle}"


@pytest.fixture(scope="session")
def model(models: str) -> str:
    """The name of the first model served."""
    return models.split(",")[0].partition("=")[0].partition(":")[0]


@pytest.fixture
def start_up(tmp_path: Path, models: str) -> Iterator[Callable[..., Up]]:
    """Starts a `darkroom up` of one test's own; it is gone after the test, whatever happened."""
    started: list[Up] = []

    def start(**env: str) -> Up:
        started.append(Up(tmp_path, models, **env))
        return started[-1]

    yield start
    for up in started:
        if up.process.poll() is None:
            up.process.kill()
            up.process.wait()


@pytest.fixture(scope="session")
def up(tmp_path_factory: pytest.TempPathFactory, models: str) -> Iterator[Up]:
    """One `darkroom up`, ready, that all tests share; do not stop what it started."""
    shared = Up(tmp_path_factory.mktemp("up"), models)
    shared.wait_until_said("Darkroom is ready")
    yield shared
    shared.stop()
