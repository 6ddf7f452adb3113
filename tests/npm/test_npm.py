"""Clients from npm against a gateway on a port; nothing of them is changed but base url and key."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from app.settings import GatewaySettings
from tests.app.dialects.conftest import Live
from tests.app.dialects.painter import Painter, picture_of
from tests.conftest import Valkey
from worker.contract.job import Failure

pytestmark = [
    pytest.mark.npm,
    pytest.mark.skipif(shutil.which("npm") is None, reason="no npm: apt install npm"),
    pytest.mark.timeout(300),
]

HERE = Path(__file__).parent
BUILD = HERE.parents[1] / "build" / "npm"
JPEG, PNG = "ffd8ffe0", "89504e47"


@pytest.fixture(scope="module")
def clients() -> Path:
    """A folder with the clients, as the lock file has them; none of their scripts is run."""
    BUILD.mkdir(parents=True, exist_ok=True)
    for file in (*HERE.glob("*.mjs"), HERE / "package.json"):
        shutil.copy(file, BUILD)
    lock, installed = HERE / "package-lock.json", BUILD / "package-lock.json"
    if not (BUILD / "node_modules").exists() or installed.read_bytes() != lock.read_bytes():
        shutil.copy(lock, installed)
        subprocess.run(["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"], cwd=BUILD, check=True)
    return BUILD


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("npm") / "in.png"
    path.write_bytes(picture_of(64, 64, "png"))
    return path


@pytest.fixture
def settings(redis_url: str, tmp_path: Path) -> GatewaySettings:
    """Of a gateway for one test."""
    return GatewaySettings(redis_url=redis_url, store_dir=tmp_path / "pictures", hold_s=20)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("live")
    server = Valkey(folder)
    server.start()
    settings = GatewaySettings(
        redis_url=server.url,  # type: ignore[arg-type]
        store_dir=folder / "pictures",
        hold_s=20,
        default_model="tiny",
    )
    try:
        with Painter(settings), Live(settings) as live:
            yield live
    finally:
        server.stop()


def said_by(clients: Path, script: str, *arguments: str) -> dict[str, Any]:
    ended = subprocess.run(["node", script, *arguments], cwd=clients, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    return dict(json.loads(ended.stdout.splitlines()[-1]))


def sizes(outcome: dict[str, Any]) -> list[tuple[int, int]]:
    assert "images" in outcome, outcome
    return [Image.open(io.BytesIO(b64decode(image["base64"]))).size for image in outcome["images"]]


def test_stability_ai_gets_what_it_asks_for(clients: Path, live: Live, picture: Path) -> None:
    said = said_by(clients, "stability.mjs", live.url, str(picture))
    assert (said["sd3"].get("head"), said["sd3"].get("seed")) == (PNG, 7), said["sd3"]
    assert (said["sd3"]["contentFiltered"], said["sd3"]["errored"]) == (False, False)
    assert [said[name].get("head") for name in ("turbo", "core", "ultra", "async")] == [JPEG, PNG, PNG, PNG], said
    assert said["refused"]["error"] == "StabilityAIInvalidRequestError"
    assert "aspect_ratio: is" in said["refused"]["message"]
    for refused in (said["fromPicture"], said["upscale"]):
        assert refused["error"] == "StabilityAIInvalidRequestError"
        assert "not served" in refused["message"]
    assert {"sd3.5-large", "sd3.5-large-turbo"} <= {job["model"] for job in live.jobs()}


def test_ai_sdk_gets_pictures_of_three_vendors(clients: Path, live: Live, picture: Path) -> None:
    said = said_by(clients, "ai.mjs", live.url, str(picture))
    assert sizes(said["openai"]) == [(64, 64)]
    assert said["openai"]["images"][0]["mediaType"] == "image/webp"
    assert sizes(said["openaiGpt"]) == [(256, 256)] * 2
    assert sizes(said["deepinfra"]) == [(64, 64)]
    assert sizes(said["deepinfraSize"]) == [(768, 512)]
    assert sizes(said["deepinfraRatio"]) == [(1344, 768)]
    assert len(sizes(said["replicate"])) == 1
    assert said["openai"]["warnings"] == said["deepinfra"]["warnings"] == said["replicate"]["warnings"] == []


def test_ai_sdk_reads_the_refusals_of_three_vendors(clients: Path, live: Live, picture: Path) -> None:
    said = said_by(clients, "ai.mjs", live.url, str(picture))
    assert 'size is "1000x1000"; allowed: a multiple of 16' in said["openaiRefused"]["message"]
    assert (said["openaiEdit"]["status"], said["deepinfraEdit"]["status"]) == (400, 400)
    assert "images/edits is not served here" in said["openaiEdit"]["message"]
    assert "images/edits is not served here" in said["deepinfraEdit"]["message"]
    assert "width is 100; allowed: a multiple of 16" in said["deepinfraRefused"]["message"]
    assert "aspect_ratio" in said["replicateRefused"]["message"]


def test_ai_sdk_makes_one_job_of_a_call_that_fails(clients: Path, settings: GatewaySettings) -> None:
    with Painter(settings, Failure(code="out_of_memory", message="the GPU is full")), Live(settings) as failing:
        said = said_by(clients, "retries.mjs", failing.url)
        assert "the GPU is full" in said["openai"]["message"]
        assert "the GPU is full" in said["deepinfra"]["message"]
        assert said["replicate"]["error"] == "AI_APICallError"  # it does not read what became of a prediction
        assert [job["status"] for job in failing.jobs()] == ["failed"] * 3


def test_ai_sdk_makes_one_job_of_a_call_that_takes_too_long(clients: Path, settings: GatewaySettings) -> None:
    with Painter(settings) as worker, Live(settings.model_copy(update={"hold_s": 1.0})) as slow:
        worker.go_on.clear()
        said = said_by(clients, "retries.mjs", slow.url)
        assert "not ready within 1 s" in said["openai"]["message"]
        assert "not ready within 1 s" in said["deepinfra"]["message"]
        assert len(slow.jobs()) == 3
