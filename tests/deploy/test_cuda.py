"""What the CUDA image depends on.

The image itself is gigabytes and is not built here: its lines are those of worker-cpu, which is built, and its packages
are asked of the index as pip would choose them for it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from tests.deploy.conftest import Figures
from tests.deploy.engine import ROOT, run

pytestmark = [pytest.mark.deploy, pytest.mark.timeout(600)]

TARGET = {"python_version": "3.11", "platform_system": "Linux", "platform_machine": "x86_64", "sys_platform": "linux"}
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64", "any")
EXTRAS = ("worker", "otel", "s3", "safety")


class Index:
    """What pip would install for the image, from the index alone: no folder of wheels, no builds for CPUs."""

    def __init__(self, folder: Path) -> None:
        self._report = folder / "report.json"
        self._words = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
        self._words += ["--report", str(self._report), "--target", str(folder), "--only-binary=:all:"]
        self._words += ["--python-version", "3.11", "--implementation", "cp", "-c", str(ROOT / "constraints.txt")]
        self._words += [word for platform in PLATFORMS for word in ("--platform", platform)]
        self._env = os.environ | {"PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": "", "PIP_EXTRA_INDEX_URL": ""}

    def resolve(self, *words: str) -> list[dict[str, Any]]:
        """The metadata of each package chosen; none if they cannot all be had."""
        done = subprocess.run([*self._words, *words], env=self._env, capture_output=True, text=True, timeout=300)
        if done.returncode:
            assert "No matching distribution" in done.stderr, done.stderr
            return []
        return [chosen["metadata"] for chosen in json.loads(self._report.read_text())["install"]]


def test_packages_of_the_cuda_image_fit_together(tmp_path: Path, figures: Figures) -> None:
    listed = run(sys.executable, ROOT / "deploy" / "requirements.py", *EXTRAS, cwd=ROOT).splitlines()
    index = Index(tmp_path)
    (torch,) = index.resolve("--no-deps", "torch")
    assert "+cpu" not in torch["version"]
    asked = [Requirement(text) for text in torch["requires_dist"]]
    needed = [one for one in asked if one.marker is None or one.marker.evaluate(TARGET | {"extra": ""})]
    cuda = [one for one in needed if one.name.startswith(("nvidia-", "cuda-", "triton"))]
    assert any(one.name.startswith("nvidia-cudnn") for one in cuda), f"torch {torch['version']} is no CUDA build"
    absent = [one for one in cuda if not index.resolve(_plain(one))]  # with all that it needs in turn
    rest = [text for text in listed if Requirement(text).name != "torch"]
    rest += [_plain(one) for one in needed if one not in absent]
    chosen = index.resolve(*rest)
    assert chosen, "they contradict each other"
    figures.note(
        f"CUDA image (not built here): torch {torch['version']} and {len(chosen)} packages resolved for linux, cp311",
        "not on this index: " + (", ".join(_plain(one) for one in absent) or "none"),
    )


def _plain(requirement: Requirement) -> str:
    extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
    return f"{requirement.name}{extras}{requirement.specifier}"
