"""Jobs that a retry may adopt."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import redis.asyncio

from worker.contract.errors import QueueUnavailable
from worker.contract.orphans import Orphans


@pytest.fixture
async def orphans(redis_url: str) -> AsyncIterator[Orphans]:
    async with redis.asyncio.Redis.from_url(redis_url) as client:
        yield Orphans(client)


async def test_orphan_is_adopted_once(orphans: Orphans) -> None:
    await orphans.leave("request", "gen_1")
    assert await orphans.adopt("other") is None
    assert await orphans.adopt("request") == "gen_1"
    assert await orphans.adopt("request") is None


async def test_orphan_that_nobody_adopted_is_taken_back(orphans: Orphans) -> None:
    await orphans.leave("request", "gen_1")
    await orphans.leave("request", "gen_2")
    assert await orphans.take_back("request", "gen_1")
    assert not await orphans.take_back("request", "gen_1")
    assert await orphans.adopt("request") == "gen_2"
    assert not await orphans.take_back("request", "gen_2")


async def test_orphan_is_not_kept_for_good(orphans: Orphans, redis_url: str) -> None:
    await orphans.leave("request", "gen_1")
    async with redis.asyncio.Redis.from_url(redis_url) as client:
        assert 0 < await client.ttl("darkroom:orphans:request") <= 60


async def test_away_redis_is_told_as_such() -> None:
    async with redis.asyncio.Redis.from_url("redis://127.0.0.1:1/0") as client:
        with pytest.raises(QueueUnavailable):
            await Orphans(client).adopt("request")
