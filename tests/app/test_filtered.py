"""What a picture that the safety filter blurred is to who asked for it, in the native words and in vendors'."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from typing import Any

import httpx
import pytest

from app.settings import GatewaySettings
from tests.app.fake_worker import FakeWorker
from worker.contract.job import Picture
from worker.intake import Claim

BODY = {"model": "tiny", "prompt": "a red circle", "num_images": 2}


class Filtering(FakeWorker):
    """Takes what has an odd seed for unsafe."""

    def _store_picture(self, claim: Claim, n: int) -> Picture:
        picture = super()._store_picture(claim, n)
        return replace(picture, filtered=picture.seed % 2 == 1)

    def warnings(self, pictures: tuple[Picture, ...]) -> tuple[str, ...]:
        return tuple(f"picture {n} was blurred" for n, picture in enumerate(pictures) if picture.filtered)


@pytest.fixture
def worker(settings: GatewaySettings) -> Iterator[FakeWorker]:
    with Filtering(settings) as worker:
        yield worker


async def generate(client: httpx.AsyncClient, **asked: Any) -> dict[str, Any]:
    answer = await client.post("/v1/generations", json=BODY | asked, headers={"prefer": "wait=20"})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


@pytest.fixture
async def unfiltered(settings: GatewaySettings, client: httpx.AsyncClient) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a gateway whose worker has no filter."""
    with FakeWorker(settings):
        yield client


async def replicated(client: httpx.AsyncClient) -> str:
    """The logs of a prediction whose second picture has an odd seed."""
    body = {"input": {"prompt": "a red circle", "seed": 2, "num_outputs": 2}}
    answer = await client.post("/v1/models/darkroom/tiny/predictions", json=body, headers={"prefer": "wait"})
    assert answer.json()["status"] == "succeeded", answer.text
    return str(answer.json()["logs"])


async def test_generation_says_which_pictures_were_blurred(served: httpx.AsyncClient) -> None:
    generation = await generate(served, seed=2)
    assert [image["filtered"] for image in generation["images"]] == [False, True]


@pytest.mark.parametrize(("seed", "reason"), [(2, "SUCCESS"), (3, "CONTENT_FILTERED")])
async def test_stability_says_it_as_its_finish_reason(served: httpx.AsyncClient, seed: int, reason: str) -> None:
    parts = {"prompt": (None, "a red circle"), "seed": (None, str(seed)), "model": (None, "sd3.5-large")}
    url = "/v2beta/stable-image/generate/sd3"
    picture = await served.post(url, files=parts, headers={"accept": "image/*"})
    assert (picture.status_code, picture.headers["finish-reason"]) == (200, reason), picture.text
    told = await served.post(url, files=parts, headers={"accept": "application/json"})
    assert told.json()["finish_reason"] == reason


async def test_deepinfra_says_it_of_each_picture(served: httpx.AsyncClient) -> None:
    body = {"prompt": "a red circle", "seed": 2, "num_images": 2}
    answer = await served.post("/v1/inference/stabilityai/sd3.5", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["nsfw_content_detected"] == [False, True]


async def test_openai_says_it_of_each_picture(served: httpx.AsyncClient) -> None:
    body = {"model": "tiny", "prompt": "a red circle", "seed": 2, "n": 2}
    answer = await served.post("/openai/v1/images/generations", json=body)
    assert [picture["filtered"] for picture in answer.json()["data"]] == [False, True]
    events = await served.post("/openai/v1/images/generations", json=body | {"stream": True})
    told = [json.loads(line.removeprefix("data: ")) for line in events.text.splitlines() if line.startswith("data: ")]
    assert [picture["filtered"] for picture in told] == [False, True]


@pytest.mark.parametrize(("seed", "said"), [(2, "false"), (3, "true")])
async def test_hugging_face_says_it_in_a_header(served: httpx.AsyncClient, seed: int, said: str) -> None:
    body = {"inputs": "a red circle", "parameters": {"seed": seed}}
    answer = await served.post("/huggingface/tiny", json=body)
    assert (answer.status_code, answer.headers["x-filtered"]) == (200, said)


async def test_replicate_says_it_as_a_warning_in_the_logs(served: httpx.AsyncClient) -> None:
    assert "Warning: picture 1 was blurred\n" in await replicated(served)


async def test_without_a_filter_native_openai_and_hugging_face_say_that_nothing_was_checked(
    unfiltered: httpx.AsyncClient,
) -> None:
    generation = await generate(unfiltered, seed=2)
    assert [image["filtered"] for image in generation["images"]] == [None, None]
    openai = await unfiltered.post("/openai/v1/images/generations", json={"model": "tiny", "prompt": "x", "seed": 3})
    assert [picture["filtered"] for picture in openai.json()["data"]] == [None]
    huggingface = await unfiltered.post("/huggingface/tiny", json={"inputs": "x", "parameters": {"seed": 3}})
    assert huggingface.headers["x-filtered"] == "null"


async def test_without_a_filter_vendors_that_have_no_word_for_it_get_the_one_for_unblurred(
    unfiltered: httpx.AsyncClient,
) -> None:
    parts = {"prompt": (None, "x"), "seed": (None, "3"), "model": (None, "tiny")}
    stability = await unfiltered.post("/v2beta/stable-image/generate/sd3", files=parts)
    assert stability.headers["finish-reason"] == "SUCCESS"
    deepinfra = await unfiltered.post("/v1/inference/tiny", json={"prompt": "x", "seed": 3})
    assert deepinfra.json()["nsfw_content_detected"] == [False]
    assert "blurred" not in await replicated(unfiltered)
