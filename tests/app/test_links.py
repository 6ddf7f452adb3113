"""Urls of pictures where API keys are on: signed, so that they need no key, good for one picture and for a time."""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator

import httpx
import pytest
from fastapi import FastAPI

from app.main import create_app
from app.settings import GatewaySettings
from app.signing import Signer
from tests.app.conftest import client_of
from tests.app.fake_worker import FakeWorker
from worker.contract.keys import Keyring, new_key

TINY = {"model": "tiny", "prompt": "a red circle", "num_images": 2}


@pytest.fixture
def settings(settings: GatewaySettings) -> GatewaySettings:
    """Keys are on."""
    return settings.model_copy(update={"auth": "on"})


@pytest.fixture
async def client(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    """A client without a key."""
    async with client_of(app) as client:
        yield client


def key_of(settings: GatewaySettings, name: str) -> dict[str, str]:
    """Headers of a caller with a key of its own."""
    key, text = new_key(name)
    with Keyring.connect(settings) as keyring:
        keyring.add(key)
    return {"authorization": f"Bearer {text}"}


async def image_urls(client: httpx.AsyncClient, headers: dict[str, str]) -> list[str]:
    answer = await client.post("/v1/generations", json=TINY, headers=headers | {"prefer": "wait=10"})
    assert answer.status_code == 200, answer.text
    return [image["url"] for image in answer.json()["images"]]


async def test_signed_url_needs_no_key(
    client: httpx.AsyncClient, settings: GatewaySettings, worker: FakeWorker
) -> None:
    urls = await image_urls(client, key_of(settings, "studio"))
    answers = [await client.get(url) for url in urls]
    assert [answer.status_code for answer in answers] == [200, 200]
    assert answers[0].content != answers[1].content


async def test_signed_url_is_good_at_every_gateway_of_the_same_redis(
    client: httpx.AsyncClient, settings: GatewaySettings, worker: FakeWorker
) -> None:
    (url, _) = await image_urls(client, key_of(settings, "studio"))
    other = create_app(settings)
    async with other.router.lifespan_context(other), client_of(other) as elsewhere:
        assert (await elsewhere.get(url)).status_code == 200


async def test_plain_url_needs_the_owners_key(
    client: httpx.AsyncClient, settings: GatewaySettings, worker: FakeWorker
) -> None:
    owner, other = key_of(settings, "owner"), key_of(settings, "other")
    url = (await image_urls(client, owner))[0].partition("?")[0]
    found = [(await client.get(url, headers=headers)).status_code for headers in ({}, owner, other)]
    assert found == [401, 200, 404]


@pytest.mark.parametrize(
    ("pattern", "instead"),
    [
        (r"/images/0", "/images/1"),
        (r"expires=\d+", "expires=99999999999"),
        (r"expires=\d+&", ""),
        (r"signature=.", "signature=!"),
        (r"signature=.*", "signature="),
        (r"signature=.*", "signature=\N{SNOWMAN}"),
        (r"gen_[0-9a-f]", "gen_f"),
    ],
)
async def test_url_that_was_tampered_with_is_403(
    client: httpx.AsyncClient, settings: GatewaySettings, worker: FakeWorker, pattern: str, instead: str
) -> None:
    (url, _) = await image_urls(client, key_of(settings, "studio"))
    answer = await client.get(re.sub(pattern, instead, url))
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "bad_signature")


async def test_signed_url_opens_nothing_but_its_picture(
    client: httpx.AsyncClient, settings: GatewaySettings, worker: FakeWorker
) -> None:
    (url, _) = await image_urls(client, key_of(settings, "studio"))
    generation, query = url.split("/images/0")
    assert (await client.get(generation + query)).status_code == 401
    assert (await client.get(f"{generation}/events{query}")).status_code == 401
    assert (await client.delete(generation + query)).status_code == 401


async def test_signed_url_past_its_time_is_410_and_says_when(
    client: httpx.AsyncClient, app: FastAPI, settings: GatewaySettings, worker: FakeWorker
) -> None:
    (url, _) = await image_urls(client, key_of(settings, "studio"))
    signer: Signer = await app.state.gateway.signing.signer()
    past = int(time.time()) - 10
    answer = await client.get(url.partition("?")[0] + signer.query(httpx.URL(url).path, past))
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (410, "expired")
    assert time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(past)) in error["message"]


def test_signatures_of_other_secrets_are_not_ours() -> None:
    ours, theirs = Signer(b"a" * 32), Signer(b"b" * 32)
    assert ours.signed("/v1/a", 5, ours.signature("/v1/a", 5))
    assert not ours.signed("/v1/a", 5, theirs.signature("/v1/a", 5))
