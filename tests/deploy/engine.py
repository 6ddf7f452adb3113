"""A container engine, docker or podman, and what of it is ours to clean up."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
STAND_INS = Path(__file__).parent / "stand_ins"
BUILD_S = 1500.0


def run(*argv: object, timeout_s: float = 120, env: dict[str, str] | None = None, cwd: Path | None = None) -> str:
    """What a command wrote to stdout; fails the test with all that it said if it did not succeed."""
    words = [str(word) for word in argv]
    done = subprocess.run(words, capture_output=True, text=True, timeout=timeout_s, check=False, env=env, cwd=cwd)
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout.strip()


@dataclass(frozen=True)
class Engine:
    name: str  # docker or podman
    build_options: tuple[str, ...]

    @classmethod
    def find(cls) -> Engine:
        asked = os.environ.get("DARKROOM_ENGINE")
        names = [asked] if asked else ["docker", "podman"]
        for name in names:
            if shutil.which(name) and subprocess.run([name, "info"], capture_output=True, check=False).returncode == 0:
                return cls(name, tuple(shlex.split(os.environ.get("DARKROOM_BUILD_OPTIONS", ""))))
        pytest.fail(f"no container engine answers on this machine; asked: {', '.join(names)}")

    def __call__(self, *argv: object, timeout_s: float = 120) -> str:
        return run(self.name, *argv, timeout_s=timeout_s)

    def build(self, target: str) -> str:
        image = f"darkroom-{target}:test"
        self("build", "--target", target, "-t", image, *self.build_options, ROOT, timeout_s=BUILD_S)
        return image

    def build_stand_in(self, name: str) -> str:
        image, file = f"darkroom-stand-in-{name}:test", STAND_INS / f"{name}.Dockerfile"
        self("build", "-f", file, "-t", image, *self.build_options, STAND_INS, timeout_s=BUILD_S)
        return image

    def inspect(self, thing: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self("inspect", thing))[0]
        return found

    def logs(self, container: str) -> str:
        done = subprocess.run([self.name, "logs", container], capture_output=True, text=True, check=False)
        return done.stdout + done.stderr

    def is_healthy(self, container: str) -> bool:
        """What the container's own check says, run now: not every engine has timers for it."""
        check = self.inspect(container)["Config"]["Healthcheck"]["Test"]
        command = ["sh", "-c", check[1]] if check[0] == "CMD-SHELL" else check[1:]
        return subprocess.run([self.name, "exec", container, *command], capture_output=True).returncode == 0

    def remove(self, *containers: str) -> None:
        for container in containers:
            subprocess.run([self.name, "rm", "-f", container], capture_output=True, check=False)
