"""`darkroom up` and `darkroom generate` with everything real: what starts, what is replaced, what is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from PIL import Image

from tests.e2e.conftest import ROOT, Up, children_of, darkroom_env
from tests.processes import is_alive, wait_until

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(
        sys.platform != "linux", reason="reads /proc; only Linux tells children of their parent's death"
    ),
]


def darkroom(*arguments: object, **env: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "app.cli", *map(str, arguments)]
    return subprocess.run(
        argv, cwd=ROOT, env=darkroom_env() | env, capture_output=True, text=True, timeout=100, check=False
    )


def test_generate_makes_a_picture_that_says_what_made_it(up: Up, tmp_path: Path) -> None:
    done = darkroom("generate", "a red cat", "--seed", 5, "--output", tmp_path / "cat.png", "--url", up.url)
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "cat.png") as picture:
        assert "a red cat" in " ".join(map(str, picture.info.values()))
    assert "seed 5" in done.stdout


def test_generate_shows_what_the_gateway_refuses(up: Up, tmp_path: Path) -> None:
    done = darkroom("generate", "x", "--width", 100, "--output", tmp_path, "--url", up.url)
    assert done.returncode == 1
    assert done.stderr.startswith("error: width is 100; allowed: ")
    assert "Traceback" not in done.stderr


def test_second_up_on_the_same_data_is_refused(up: Up, models: str) -> None:
    done = darkroom("up", "--port", 0, DARKROOM_DATA_DIR=str(up.data), DARKROOM_MODELS=models)
    assert done.returncode == 1
    assert "another Darkroom runs" in done.stderr


def test_dead_worker_is_replaced_and_a_killed_up_leaves_no_process(
    start_up: Callable[..., Up], model: str, tmp_path: Path
) -> None:
    up = start_up()
    up.wait_until_said("Darkroom is ready")
    supervisor = up.pid("worker")
    (first,) = children_of(supervisor)
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: not is_alive(first))
    body = {"model": model, "prompt": "a red cat", "steps": 1}
    answer = httpx.post(f"{up.url}/v1/generations", json=body, headers={"prefer": "wait=60"}, timeout=70)
    assert answer.json()["status"] == "succeeded", answer.text
    assert up.pid("worker") == supervisor
    assert children_of(supervisor) != [first]

    children = [*children_of(up.process.pid), *children_of(supervisor)]
    assert len(children) == 5
    up.stop(signal.SIGKILL)
    wait_until(lambda: not any(map(is_alive, children)))


def test_up_says_why_its_worker_cannot_start(start_up: Callable[..., Up], tmp_path: Path) -> None:
    up = start_up(DARKROOM_MODELS=f"broken={tmp_path}/none")
    assert up.process.wait(60) == 1
    assert up.said("error: the worker ended with exit code 2 while starting")
    assert up.said(f"{tmp_path}/none")
    assert not up.said("Traceback")


def test_embedded_generate_saves_a_picture_and_leaves_nothing(models: str, tmp_path: Path) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    output = tmp_path / "demo.png"
    done = darkroom(
        "generate", "a red cat", "--embedded", "--output", output, DARKROOM_MODELS=models, TMPDIR=str(temporary)
    )
    assert done.returncode == 0, done.stderr
    assert f"picture  {output}" in done.stdout
    assert output.stat().st_size > 0
    pids = [int(word) for line in done.stderr.splitlines() for word in line.split() if word.isdigit()]
    assert len(pids) == 3
    assert not any(map(is_alive, pids))
    assert list(temporary.iterdir()) == []
