"""The services of docker-compose.yml, started as a user starts them, in a project of their own."""

from __future__ import annotations

import os
import shlex
import subprocess
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.engine import ROOT, Engine, run

POLL_S = 0.2


def merged(*files: str) -> dict[str, Any]:
    """What the files say of each service's start; later ones add to earlier ones."""
    services: dict[str, Any] = {}
    for file in files:
        for name, service in yaml.safe_load((ROOT / file).read_text())["services"].items():
            known = services.setdefault(name, {"depends_on": {}})
            known["depends_on"] |= service.get("depends_on", {})
            known |= {key: value for key, value in service.items() if key != "depends_on"}
    return services


class Compose:
    """One project: its containers, networks and volumes go with it."""

    def __init__(self, engine: Engine, command: Sequence[str], folder: Path, *files: str) -> None:
        self.engine, self.services = engine, merged(*files)
        self._files, self._folder = files, folder
        self._name = f"darkroom-test-{uuid.uuid4().hex[:8]}"
        self._command = [*command, "-p", self._name]
        for file in files:
            self._command += ["-f", str(ROOT / file)]
        self._env = dict(os.environ)

    def use(self, env: Mapping[str, str], images: Mapping[str, str], *, timers: bool) -> None:
        """Other values of variables, other images, and no waiting for health where the engine never checks it."""
        self._env |= env
        changes: dict[str, Any] = {name: {"image": images[name]} for name in images if name in self.services}
        for name, service in self.services.items():
            started = {
                other: {"condition": "service_started"}
                for other, gate in service["depends_on"].items()
                if gate["condition"] == "service_healthy" and not timers
            }
            if started:
                changes.setdefault(name, {})["depends_on"] = started
        if changes:
            override = self._folder / "override.yml"
            override.write_text(yaml.safe_dump({"services": changes}))
            self._command += ["-f", str(override)]

    def shim(self, folder: Path) -> dict[str, str]:
        """An environment whose `docker compose` is this project."""
        folder.mkdir()
        program = folder / "docker"
        program.write_text(f'#!/bin/sh\nshift\nexec {shlex.join(self._command)} "$@"\n')
        program.chmod(0o755)
        return self._env | {"PATH": f"{folder}:{self._env['PATH']}"}

    def __call__(self, *words: str, timeout_s: float = 300) -> str:
        return run(*self._command, *words, timeout_s=timeout_s, env=self._env)

    def up(self, *services: str, profiles: Sequence[str] = ()) -> None:
        chosen = [word for profile in profiles for word in ("--profile", profile)]
        self(*chosen, "up", "-d", "--no-build", *services)

    def container(self, service: str) -> str:
        labels = [f"com.docker.compose.project={self._name}", f"com.docker.compose.service={service}"]
        filters = [word for label in labels for word in ("--filter", f"label={label}")]
        (found,) = self.engine("ps", "-a", "-q", *filters).split()
        return found

    def state(self, service: str) -> dict[str, Any]:
        state: dict[str, Any] = self.engine.inspect(self.container(service))["State"]
        return state

    def logs(self, service: str) -> str:
        return self.engine.logs(self.container(service))

    def is_healthy(self, service: str) -> bool:
        return self.engine.is_healthy(self.container(service))

    def started(self) -> list[str]:
        """The services that have a container."""
        label = f"label=com.docker.compose.project={self._name}"
        containers = self.engine("ps", "-a", "-q", "--filter", label).split()
        facts = [self.engine.inspect(container) for container in containers]
        return [fact["Config"]["Labels"]["com.docker.compose.service"] for fact in facts]

    def execute(self, service: str, *command: str) -> str:
        return self.engine("exec", self.container(service), *command)

    def port(self, service: str) -> int:
        """On this machine, of the service's one published port."""
        return int(self.engine("port", self.container(service)).splitlines()[0].rpartition(":")[2])

    def kill(self, service: str) -> None:
        self.engine("kill", "--signal", "KILL", self.container(service))

    def start(self, service: str) -> None:
        self.engine("start", self.container(service))

    def stop(self, service: str) -> None:
        self.engine("stop", "-t", "10", self.container(service))

    def wait_until(self, holds: Callable[[], bool], what: str, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if holds():
                return
            time.sleep(POLL_S)
        pytest.fail(f"not within {timeout_s:g} s: {what}\n" + self.tell())

    def tell(self) -> str:
        told = []
        for service in self.services:
            try:
                told.append(f"--- {service}\n{self.logs(service)[-2500:]}")
            except (AssertionError, ValueError):
                told.append(f"--- {service}: no container")
        return "\n".join(told)

    def down(self) -> None:
        """Whatever is left of it, also after a start that went wrong half-way."""
        engine, label = self.engine.name, f"label=com.docker.compose.project={self._name}"
        for _ in self.services:  # podman removes one on which others depend only after those
            self.engine.remove(*self.engine("ps", "-a", "-q", "--filter", label).split())
        for kind in ("network", "volume"):
            for thing in self.engine(kind, "ls", "-q", "--filter", f"name={self._name}").split():
                subprocess.run([engine, kind, "rm", "-f", thing], capture_output=True, check=False)
