"""How often a key may ask, counted in Redis for all gateways together."""

from __future__ import annotations

import asyncio

import httpx
import pytest
import redis.asyncio

from app.errors import RateLimited
from app.main import create_app
from app.ratelimit import PREFIX, RateLimits
from app.settings import GatewaySettings
from tests.app.conftest import client_of, key_of, until
from tests.conftest import Valkey
from worker.contract.errors import QueueUnavailable


@pytest.fixture
def settings(settings: GatewaySettings) -> GatewaySettings:
    """Keys are on."""
    return settings.model_copy(update={"auth": "on"})


async def test_as_many_requests_pass_as_the_rate_says_and_each_owner_has_its_own(redis_url: str) -> None:
    client = redis.asyncio.Redis.from_url(redis_url)
    rates = RateLimits(client)
    mine = [await rates.spend("me", "3/minute") for _ in range(5)]
    assert [(limit.remaining, limit.exceeded) for limit in mine] == [
        (2, False),
        (1, False),
        (0, False),
        (0, True),
        (0, True),
    ]
    assert not (await rates.spend("you", "3/minute")).exceeded
    await client.aclose()


async def test_requests_at_the_same_moment_are_counted_one_by_one(redis_url: str) -> None:
    client = redis.asyncio.Redis.from_url(redis_url)
    rates = RateLimits(client)
    limits = await asyncio.gather(*(rates.spend("me", "10/minute") for _ in range(40)))
    assert sum(not limit.exceeded for limit in limits) == 10
    await client.aclose()


async def test_there_is_room_again_when_the_answer_said(redis_url: str) -> None:
    client = redis.asyncio.Redis.from_url(redis_url)
    rates = RateLimits(client)
    for _ in range(2):
        await rates.spend("me", "2/second")
    refused = await rates.spend("me", "2/second")
    with pytest.raises(RateLimited) as error:
        refused.require_room()
    assert 1 <= error.value.retry_after_s <= 2

    async def room() -> bool:
        return not (await rates.spend("me", "2/second")).exceeded

    await until(room, error.value.retry_after_s + 2)
    await client.aclose()


async def test_what_is_counted_goes_by_itself(redis_url: str) -> None:
    client = redis.asyncio.Redis.from_url(redis_url)
    await RateLimits(client).spend("me", "3/minute")
    names = [name async for name in client.scan_iter(f"{PREFIX}*")]
    assert names
    assert all([0 < await client.ttl(name) <= 120 for name in names])
    await client.aclose()


async def test_whoever_asks_passes_while_a_full_redis_counts_nothing(own_valkey: Valkey) -> None:
    client = redis.asyncio.Redis.from_url(own_valkey.url)
    rates = RateLimits(client)
    await client.config_set("maxmemory", 1)
    assert not (await rates.spend("me", "3/minute")).exceeded
    await client.config_set("maxmemory", 0)
    assert (await rates.spend("me", "3/minute")).remaining == 2
    await client.aclose()


async def test_a_rate_cannot_be_counted_without_redis(own_valkey: Valkey) -> None:
    client = redis.asyncio.Redis.from_url(own_valkey.url)
    rates = RateLimits(client)
    own_valkey.stop()
    with pytest.raises(QueueUnavailable):
        await rates.spend("me", "3/minute")
    await client.aclose()


async def test_every_answer_says_how_many_requests_are_left(
    client: httpx.AsyncClient, settings: GatewaySettings
) -> None:
    headers = key_of(settings, "ci", rate="2/minute")
    first, second, third = [await client.get("/v1/models", headers=headers) for _ in range(3)]
    assert first.headers["ratelimit-policy"] == '"key";q=2;w=60'
    assert first.headers["ratelimit"].startswith('"key";r=1;t=')
    assert second.headers["ratelimit"].startswith('"key";r=0;t=')
    assert (third.status_code, third.json()["error"]["code"]) == (429, "rate_limited")
    assert 1 <= int(third.headers["retry-after"]) <= 60
    assert third.headers["ratelimit"].startswith('"key";r=0;t=')


async def test_a_dialects_refusal_has_the_headers_too(client: httpx.AsyncClient, settings: GatewaySettings) -> None:
    headers = key_of(settings, "ci", rate="1/minute")
    await client.get("/openai/v1/models", headers=headers)
    refused = await client.get("/openai/v1/models", headers=headers)
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) >= 1
    assert "ratelimit" in refused.headers


async def test_a_rate_is_one_at_all_gateways(client: httpx.AsyncClient, settings: GatewaySettings) -> None:
    headers = key_of(settings, "ci", rate="1/minute")
    other = create_app(settings)
    async with other.router.lifespan_context(other), client_of(other) as elsewhere:
        assert (await client.get("/v1/models", headers=headers)).status_code == 200
        assert (await elsewhere.get("/v1/models", headers=headers)).status_code == 429


async def test_a_wrong_key_spends_nothing_of_the_right_one(
    client: httpx.AsyncClient, settings: GatewaySettings
) -> None:
    headers = key_of(settings, "ci", rate="1/minute")
    wrong = {"authorization": headers["authorization"][:-43] + "x" * 43}
    assert [(await client.get("/v1/models", headers=wrong)).status_code for _ in range(3)] == [401] * 3
    assert (await client.get("/v1/models", headers=headers)).status_code == 200


async def test_an_unlimited_key_and_a_server_without_keys_say_nothing_of_rates(
    client: httpx.AsyncClient, settings: GatewaySettings
) -> None:
    answer = await client.get("/v1/models", headers=key_of(settings, "ci", rate="none"))
    assert answer.status_code == 200
    assert "ratelimit" not in answer.headers
    off = create_app(settings.model_copy(update={"auth": "off"}))
    async with off.router.lifespan_context(off), client_of(off) as anybody:
        assert "ratelimit" not in (await anybody.get("/v1/models")).headers
