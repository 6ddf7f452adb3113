"""What a picture that the safety filter blurred is to who asked for it, in the native words and in vendors'."""

from __future__ import annotations

from collections.abc import Iterator
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


@pytest.fixture
def worker(settings: GatewaySettings) -> Iterator[FakeWorker]:
    with Filtering(settings) as worker:
        yield worker


async def generate(client: httpx.AsyncClient, **asked: Any) -> dict[str, Any]:
    answer = await client.post("/v1/generations", json=BODY | asked, headers={"prefer": "wait=20"})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


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
