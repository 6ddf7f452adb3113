"""DeepInfra's inference API, as its own documentation and Vercel's client ask it."""

from __future__ import annotations

import io
from base64 import b64decode
from typing import Any

import httpx
import pytest
from PIL import Image

from app.dialects.deepinfra import webhook_body
from app.links import Links
from app.settings import GatewaySettings
from tests.app.dialects.conftest import Live
from tests.app.dialects.painter import Painter
from tests.processes import wait_until
from worker.contract.job import Failure, Webhook
from worker.contract.queue import JobQueue

PROMPT = "a red circle"


def post(live: Live, model: str = "tiny", timeout: float = 20, **asked: Any) -> httpx.Response:
    return httpx.post(
        f"{live.url}/v1/inference/{model}",
        json={"prompt": PROMPT} | asked,
        headers={"authorization": "bearer any"},
        trust_env=False,
        timeout=timeout,
    )


def test_pictures_come_as_data_urls(live: Live) -> None:
    answer = post(live, num_images=2, seed=42)
    said = answer.json()
    assert answer.status_code == 200
    for url in said["images"]:
        head, _, data = url.partition(",")
        assert head == "data:image/png;base64"
        assert Image.open(io.BytesIO(b64decode(data))).size == (64, 64)
    assert (len(said["images"]), said["nsfw_content_detected"], said["seed"]) == (2, [False, False], 42)
    assert said["inference_status"]["status"] == "succeeded"
    assert said["inference_status"].keys() == {"status", "runtime_ms", "cost", "tokens_generated", "tokens_input"}
    assert said["request_id"] == live.jobs()[0]["id"]


@pytest.mark.parametrize(
    ("asked", "size"),
    [
        ({}, (1024, 1024)),
        ({"aspect_ratio": "16:9"}, (1344, 768)),
        ({"aspect_ratio": "9:21"}, (640, 1536)),
        ({"width": "768", "height": "512"}, (768, 512)),
    ],
)
def test_model_and_size_are_asked_for_as_there(live: Live, asked: dict[str, Any], size: tuple[int, int]) -> None:
    said = post(live, "stabilityai/sd3.5", **asked).json()
    assert Image.open(io.BytesIO(b64decode(said["images"][0].partition(",")[2]))).size == size
    assert live.jobs()[0]["model"] == "sd3.5-large"


def test_fields_are_passed_on_and_empty_ones_are_absent(live: Live) -> None:
    asked = {"negative_prompt": "squares", "num_inference_steps": 3, "guidance_scale": 2.5, "seed": "", "webhook": ""}
    assert post(live, **asked).status_code == 200
    params = live.jobs()[0]["params"]
    assert (params["negative_prompt"], params["steps"], params["guidance_scale"]) == ("squares", 3, 2.5)


def test_largest_seed_is_folded_and_told(live: Live) -> None:
    said = post(live, seed=2**64 - 1).json()
    again = post(live, seed=said["seed"]).json()
    assert said["seed"] == again["seed"] == live.jobs()[0]["params"]["seed"]


@pytest.mark.parametrize(
    ("asked", "status", "text"),
    [
        ({"prompt": None}, 422, "prompt is missing; allowed: text of 1 to 10,000 characters"),
        ({"num_images": 5}, 422, "num_images is 5; allowed: a whole number from 1 to 4"),
        ({"num_inference_steps": 11}, 422, "num_inference_steps is 11; allowed: 1 to 10"),
        ({"aspect_ratio": "1:3"}, 422, "allowed: 1:1, 16:9"),
        ({"width": "wide"}, 422, 'width is "wide"; allowed: pixels'),
        ({"image": "data:"}, 422, "pictures from pictures are not served yet"),
        ({"strength": 0.5}, 422, "pictures from pictures are not served yet"),
        ({"model": "nowhere/else"}, 404, "known models: sd3.5-large"),
        ({"webhook": "http://127.0.0.1/hook"}, 422, "webhook is"),
    ],
)
def test_refusal_has_deepinfras_shape(live: Live, asked: dict[str, Any], status: int, text: str) -> None:
    answer = post(live, **({"model": "tiny"} | asked))
    assert answer.status_code == status
    assert answer.json().keys() == {"detail"}
    assert text in answer.json()["detail"]["error"]


def test_failed_job_is_told(settings: GatewaySettings) -> None:
    with Painter(settings, Failure(code="out_of_memory", message="the GPU is full")), Live(settings) as live:
        answer = post(live)
    assert (answer.status_code, answer.json()) == (502, {"detail": {"error": "the GPU is full"}})


async def test_webhook_is_told_where_the_pictures_are(settings: GatewaySettings, worker: Painter) -> None:
    worker.go_on.clear()
    allowing = settings.model_copy(update={"webhook_allow": "127.0.0.1"})
    with Live(allowing) as live:
        said = post(live, num_images=2, webhook="http://127.0.0.1:9/hook").json()
        assert (said["inference_status"]["status"], said["images"]) == ("queued", [])
        worker.go_on.set()
        queue = JobQueue.connect(settings)
        view = await queue.wait(said["request_id"], 10)
        await queue.close()
        body = webhook_body(view, Links(live.url))
        assert view.job.webhook == Webhook(url="http://127.0.0.1:9/hook")
        assert [httpx.get(url, trust_env=False).status_code for url in body["images"]] == [200, 200]
    assert (body["inference_status"]["status"], body["request_id"]) == ("succeeded", said["request_id"])
    assert body["nsfw_content_detected"] == [False, False]


def test_client_that_goes_away_cancels_its_job(alone: Live, worker: Painter) -> None:
    worker.go_on.clear()
    with pytest.raises(httpx.ReadTimeout):
        post(alone, timeout=0.5)
    wait_until(lambda: [job["status"] for job in alone.jobs()] == ["canceled"])


def test_shape_beside_a_size_is_refused(live: Live) -> None:
    answer = post(live, aspect_ratio="16:9", width=128)
    assert (answer.status_code, answer.json()["detail"]["error"]) == (
        422,
        'aspect_ratio is "16:9"; allowed: nothing beside width or height',
    )


def test_warnings_are_told(live: Live) -> None:
    assert "negative_prompt" in post(live, "sd3.5-large-turbo", negative_prompt="squares").json()["warnings"][0]
