"""The same request sent again makes no second job."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from app.settings import GatewaySettings
from tests.app.fake_worker import FakeWorker

TINY = {"model": "tiny", "prompt": "a red circle"}
ONCE = {"idempotency-key": "order-7"}


async def post(client: httpx.AsyncClient, headers: dict[str, str] = ONCE, **fields: Any) -> httpx.Response:
    return await client.post("/v1/generations", json=TINY | fields, headers=headers)


async def how_many(client: httpx.AsyncClient) -> int:
    return len((await client.get("/v1/generations")).json()["generations"])


async def test_same_key_and_body_gives_the_first_answer_again(served: httpx.AsyncClient) -> None:
    first, second = await post(served), await post(served)
    assert first.status_code == second.status_code == 202
    assert second.json() == first.json()  # the same random seed among it
    assert second.headers["location"] == first.headers["location"]
    assert "idempotency-replayed" not in first.headers
    assert second.headers["idempotency-replayed"] == "true"
    assert await how_many(served) == 1


async def test_same_key_and_body_in_other_words_is_the_same_request(served: httpx.AsyncClient) -> None:
    first = await post(served)
    second = await post(served, negative_prompt="", num_images=1, width=None)
    assert second.json() == first.json()


async def test_same_key_with_another_body_is_422(served: httpx.AsyncClient) -> None:
    await post(served)
    answer = await post(served, steps=3)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["field"]) == (422, "idempotency_key_reused", "Idempotency-Key")
    assert await how_many(served) == 1


async def test_many_at_once_with_one_key_are_one_job(served: httpx.AsyncClient) -> None:
    answers = await asyncio.gather(*(post(served) for _ in range(20)))
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert sum("idempotency-replayed" not in answer.headers for answer in answers) == 1
    assert await how_many(served) == 1


async def test_replay_that_prefers_to_wait_gets_the_finished_generation(
    served: httpx.AsyncClient, worker: FakeWorker
) -> None:
    worker.go_on.clear()
    first = await post(served)
    worker.go_on.set()
    again = await post(served, ONCE | {"prefer": "wait=10"})
    assert (again.status_code, again.json()["status"]) == (200, "succeeded")
    assert again.json()["id"] == first.json()["id"]


async def test_refused_request_leaves_its_key_free(served: httpx.AsyncClient) -> None:
    assert (await post(served, steps=1000)).status_code == 422
    assert (await post(served)).status_code == 202


async def test_key_of_a_forgotten_generation_is_free_again(served: httpx.AsyncClient) -> None:
    first = await post(served)
    assert (await served.delete(first.json()["urls"]["self"])).status_code == 204
    second = await post(served)
    assert second.status_code == 202
    assert second.json()["id"] != first.json()["id"]


async def test_without_a_key_each_request_is_a_job(served: httpx.AsyncClient) -> None:
    first, second = await post(served, {}), await post(served, {})
    assert first.json()["id"] != second.json()["id"]


@pytest.mark.parametrize("key", ["", " ", "a b", "x" * 256, "\N{SNOWMAN}".encode()])
async def test_key_that_is_not_sane_is_refused(served: httpx.AsyncClient, key: str | bytes) -> None:
    answer = await served.post("/v1/generations", json=TINY, headers={b"idempotency-key": key})  # type: ignore[dict-item]
    error = answer.json()["error"]
    assert (answer.status_code, error["field"]) == (422, "Idempotency-Key")
    assert "allowed: 1 to 255 visible ASCII characters" in error["message"]


async def test_replays_are_counted_apart(served: httpx.AsyncClient, settings: GatewaySettings) -> None:
    await post(served)
    await post(served)
    text = (await served.get("/metrics")).text
    for outcome in ("accepted", "replayed"):
        labels = f'dialect="native",model="tiny",outcome="{outcome}",reason=""'
        assert f"darkroom_generations_total{{{labels}}} 1.0" in text
