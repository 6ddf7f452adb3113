"""The images, built once a run.

DARKROOM_ENGINE names the engine (docker or podman; unset: the first one that answers). DARKROOM_BUILD_OPTIONS are
further options of its build command, for machines that reach packages in a way of their own; podman needs `--format
docker`, for in its own format images have no health checks. DARKROOM_COMPOSE is the command for compose (unset:
`docker compose` or `podman-compose`, as the engine is). DARKROOM_STAND_INS=yes builds images of our own in place of
those of Redis, rclone and Prometheus, where no registry can be reached.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.deploy.engine import ROOT, Engine

FIGURES = ROOT / "build" / "deploy.md"
MEASURED: pytest.StashKey[Figures] = pytest.StashKey()


@pytest.fixture(scope="session")
def engine() -> Engine:
    return Engine.find()


@pytest.fixture(scope="session")
def gateway_image(engine: Engine) -> str:
    return engine.build("gateway")


@pytest.fixture(scope="session")
def worker_image(engine: Engine) -> str:
    return engine.build("worker-cpu")


@pytest.fixture(scope="session")
def stand_ins(engine: Engine) -> dict[str, str]:
    """The image that each service of compose runs instead of its own; none where registries are reached."""
    if os.environ.get("DARKROOM_STAND_INS") != "yes":
        return {}
    services = {"redis": "redis", "s3": "rclone", "prometheus": "prometheus"}
    return {service: engine.build_stand_in(name) for service, name in services.items()}


@pytest.fixture(scope="session")
def compose_command(engine: Engine) -> list[str]:
    usual = {"docker": "docker compose", "podman": "podman-compose"}[engine.name]
    return (os.environ.get("DARKROOM_COMPOSE") or usual).split()


class Figures:
    """What was measured: printed once all is over, and kept in build/deploy.md."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.lines = path.read_text().splitlines() if path.exists() else []

    def note(self, what: str, value: str) -> None:
        start = f"- {what}: "
        self.lines = [line for line in self.lines if not line.startswith(start)] + [start + value]
        self._path.parent.mkdir(exist_ok=True)
        self._path.write_text("\n".join(self.lines) + "\n")


@pytest.fixture(scope="session")
def figures(request: pytest.FixtureRequest) -> Figures:
    request.config.stash[MEASURED] = figures = Figures(FIGURES)
    return figures


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if figures := config.stash.get(MEASURED, None):
        terminalreporter.section("measured, and kept in build/deploy.md")
        terminalreporter.write_line("\n".join(figures.lines))
