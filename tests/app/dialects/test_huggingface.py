"""huggingface_hub's own client against a gateway on a port; nothing of it is changed but url and key."""

from __future__ import annotations

import io
import json
from typing import Any

import httpx
import pytest
from huggingface_hub import AsyncInferenceClient, InferenceClient
from huggingface_hub.errors import HfHubHTTPError, InferenceTimeoutError
from PIL import Image

from app.settings import GatewaySettings
from tests.app.dialects.conftest import Live
from tests.app.dialects.painter import Painter
from tests.processes import wait_until
from worker.contract.job import Failure

PROMPT = "a red circle"


def client_for(live: Live, model: str = "tiny", **options: Any) -> InferenceClient:
    return InferenceClient(model=f"{live.url}/huggingface/{model}", token="hf_any", **options)


def test_text_to_image_gives_a_picture(live: Live) -> None:
    picture = client_for(live).text_to_image(PROMPT)
    assert (picture.size, picture.format) == ((64, 64), "PNG")


def test_text_to_image_passes_on_its_parameters(live: Live) -> None:
    picture = client_for(live).text_to_image(
        PROMPT,
        negative_prompt="squares",
        width=128,
        height=96,
        num_inference_steps=3,
        guidance_scale=2,
        scheduler="FlowMatchEulerDiscreteScheduler",
        seed=2**60,
        extra_body={"output_format": "jpeg"},
    )
    params = live.jobs()[0]["params"]
    assert (picture.size, picture.format) == ((128, 96), "JPEG")
    assert (params["negative_prompt"], params["steps"], params["sampler"]) == ("squares", 3, "euler")
    assert params["seed"] == 2**60 % (2**53 - 4)


async def test_async_client_finds_a_model_by_its_name_on_the_hub(live: Live) -> None:
    name = "stabilityai/stable-diffusion-3.5-large-turbo"
    async with AsyncInferenceClient(model=f"{live.url}/huggingface/{name}", token="hf_any") as client:
        picture = await client.text_to_image(PROMPT)
    assert picture.size == (1024, 1024)
    assert live.jobs()[0]["model"] == "sd3.5-large-turbo"


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        ({"width": 100}, "width is 100; allowed: a multiple of 16"),
        ({"num_inference_steps": 11}, "num_inference_steps is 11; allowed: 1 to 10"),
        ({"scheduler": "DDIM"}, 'scheduler is "DDIM"; allowed: euler, EulerDiscreteScheduler'),
        ({"extra_body": {"clip_skip": 2}}, "clip_skip is 2; allowed: none; parameters served: negative_prompt"),
        ({"extra_body": {"num_images_per_prompt": 2}}, "allowed: 1: the answer is one picture"),
        ({"seed": -1}, "seed is -1; allowed: a whole number from 0"),
        ({"prompt": ""}, "inputs is missing; allowed: text"),
    ],
)
def test_wrong_parameter_is_told_by_name(live: Live, asked: dict[str, Any], text: str) -> None:
    with pytest.raises(HfHubHTTPError) as caught:
        client_for(live).text_to_image(**({"prompt": PROMPT} | asked))
    assert caught.value.response.status_code == 422
    assert text in str(caught.value)


def test_unknown_parameter_with_a_long_name_is_told_shortened(live: Live) -> None:
    body = {"inputs": PROMPT, "parameters": {"x" * 10_000: 1}}
    answer = httpx.post(f"{live.url}/huggingface/tiny", json=body, trust_env=False)
    assert answer.status_code == 422
    assert "xxx...xxx" in answer.json()["error"]
    assert len(answer.json()["error"]) < 400


def test_unknown_model_is_not_found(live: Live) -> None:
    with pytest.raises(HfHubHTTPError, match=r"known models: sd3\.5-large"):
        client_for(live, "black-forest-labs/FLUX.1-dev").text_to_image(PROMPT)


def test_failed_job_is_told(settings: GatewaySettings) -> None:
    with (
        Painter(settings, Failure(code="out_of_memory", message="the GPU is full")),
        Live(settings) as live,
        pytest.raises(HfHubHTTPError, match="the GPU is full"),
    ):
        client_for(live).text_to_image(PROMPT)


def test_client_that_goes_away_cancels_its_job(alone: Live, worker: Painter) -> None:
    worker.go_on.clear()
    with pytest.raises(InferenceTimeoutError):
        client_for(alone, timeout=0.5).text_to_image(PROMPT)
    wait_until(lambda: [job["status"] for job in alone.jobs()] == ["canceled"])


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        ("image/png", "image/png"),
        ("image/jpeg", "image/jpeg"),
        ("text/html, image/webp;q=0.9", "image/webp"),
        ("*/*", "image/png"),
    ],
)
def test_accept_decides_on_the_format(live: Live, accept: str, kind: str) -> None:
    answer = httpx.post(
        f"{live.url}/huggingface/tiny", json={"inputs": PROMPT}, headers={"accept": accept}, trust_env=False
    )
    assert (answer.status_code, answer.headers["content-type"]) == (200, kind)


@pytest.mark.parametrize("parameters", [None, {}, {"negative_prompt": None}])
def test_parameters_may_be_left_out(live: Live, parameters: Any) -> None:
    body = {"inputs": PROMPT, "parameters": parameters, "options": {"use_cache": False}}
    assert httpx.post(f"{live.url}/huggingface/tiny", json=body, trust_env=False).status_code == 200


@pytest.mark.parametrize("parameters", [{}, {"num_inference_steps": 4}])
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_picture_as_input_is_refused_in_so_many_words(live: Live, parameters: dict[str, Any], format: str) -> None:
    file = io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(file, format)
    with pytest.raises(HfHubHTTPError, match="pictures from pictures are not served yet"):
        client_for(live).image_to_image(file.getvalue(), **parameters)


def test_picture_too_large_to_be_read_is_told_the_same(live: Live) -> None:
    with pytest.raises(HfHubHTTPError, match="pictures as input are not served"):
        client_for(live).image_to_image(b"\x89PNG\r\n\x1a\n" + bytes(100_000), num_inference_steps=4)


def test_warnings_come_in_a_header(live: Live) -> None:
    url = f"{live.url}/huggingface/sd3.5-large-turbo"
    asked = {"inputs": PROMPT, "parameters": {"negative_prompt": "squares"}}
    answer = httpx.post(url, json=asked, trust_env=False, timeout=20)
    assert "negative_prompt" in json.loads(answer.headers["x-warnings"])[0]
