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

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.deploy.conftest import Figures
from tests.deploy.engine import ROOT, run

pytestmark = [pytest.mark.deploy, pytest.mark.timeout(600)]

EXTRAS = ("worker", "otel", "s3", "safety")
TARGET = {"python_version": "3.11", "platform_system": "Linux", "platform_machine": "x86_64", "sys_platform": "linux"}
PLATFORMS = (*(f"manylinux_2_{minor}_x86_64" for minor in range(36, 4, -1)), "manylinux2014_x86_64", "any")
"""What the image can run, by its glibc 2.36; pip takes each name as it stands, and not those of older ones with it."""


def resolve(folder: Path, *requirements: str) -> dict[str, dict[str, object]]:
    """The metadata of each package that pip chooses for the image, from the index alone; fails if one is not there."""
    report = folder / "report.json"
    words = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
    words += ["--report", str(report), "--target", str(folder), "--only-binary=:all:"]
    words += ["--python-version", "3.11", "--implementation", "cp", "-c", str(ROOT / "constraints.txt")]
    words += [word for platform in PLATFORMS for word in ("--platform", platform)]
    # No folder of wheels and no second index: those of this machine may hold builds for CPUs.
    env = os.environ | {"PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": "", "PIP_EXTRA_INDEX_URL": ""}
    done = subprocess.run([*words, *requirements], env=env, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    chosen = [package["metadata"] for package in json.loads(report.read_text())["install"]]
    return {canonicalize_name(metadata["name"]): metadata for metadata in chosen}


def test_every_package_of_the_cuda_image_is_to_be_had_and_they_fit_together(tmp_path: Path, figures: Figures) -> None:
    listed = run(sys.executable, ROOT / "deploy" / "requirements.py", *EXTRAS, cwd=ROOT).splitlines()
    chosen = resolve(tmp_path, *listed)
    torch = chosen["torch"]
    asked = [Requirement(text) for text in torch["requires_dist"]]
    needed = [one for one in asked if one.marker is None or one.marker.evaluate(TARGET | {"extra": ""})]
    assert {canonicalize_name(one.name) for one in needed} <= set(chosen)
    assert {"nvidia-cudnn-cu13", "nvidia-nccl-cu13", "nvidia-cublas", "triton"} <= set(chosen)
    cuda = chosen["nvidia-cuda-runtime"]["version"]
    figures.note(
        "CUDA image",
        f"NOT BUILT here; its {len(chosen)} packages are on the index: torch {torch['version']}, CUDA {cuda}",
    )
