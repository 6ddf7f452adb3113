"""How often a key may ask: a sliding window in Redis, the same for all gateways."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import redis.asyncio
from limits import RateLimitItem, parse
from limits.aio.storage import RedisStorage
from limits.aio.strategies import SlidingWindowCounterRateLimiter
from redis.exceptions import OutOfMemoryError

from app.errors import RateLimited
from worker.contract.link import reaching_redis

PREFIX = "darkroom:rate"


@dataclass(frozen=True)
class RateLimit:
    """Where a caller stands."""

    rate: str  # such as 120/minute
    limit: int  # requests in a window
    window_s: int
    remaining: int
    reset_s: int  # until there is room for more
    exceeded: bool = False  # this request was one too many

    def headers(self) -> dict[str, str]:
        """As clients are told: draft-ietf-httpapi-ratelimit-headers."""
        return {
            "ratelimit-policy": f'"key";q={self.limit};w={self.window_s}',
            "ratelimit": f'"key";r={self.remaining};t={self.reset_s}',
        }

    def require_room(self) -> None:
        """Returns if the request was within the limit. RateLimited."""
        if self.exceeded:
            raise RateLimited(self.rate, max(1, self.reset_s))


class RateLimits:
    """Counts requests by key. Raises QueueUnavailable when Redis is away.

    A counter of this window and one of the last, weighted by how much of it is still within sight: two small keys, by
    Redis's own clock, where a list of every request's time would grow with the limit.
    """

    def __init__(self, redis: redis.asyncio.Redis) -> None:
        storage = RedisStorage(
            "async+redis://",
            implementation="redispy",
            key_prefix=PREFIX,
            connection_pool=redis.connection_pool,  # type: ignore[arg-type]  # options are declared as plain values
        )
        self._windows = SlidingWindowCounterRateLimiter(storage)
        self._items: dict[str, RateLimitItem] = {}

    async def spend(self, owner: str, rate: str) -> RateLimit:
        """Counts one request of this owner, if there is room for it."""
        item = self._items.get(rate)
        if item is None:
            item = self._items[rate] = parse(rate)
        with reaching_redis():
            try:
                fits = await self._windows.hit(item, owner)
            except OutOfMemoryError:  # nothing can be counted: better that than to answer nobody
                return RateLimit(rate, item.amount, item.get_expiry(), item.amount, 0)
            reset_at, remaining = await self._windows.get_window_stats(item, owner)
        reset_s = max(0, math.ceil(reset_at - time.time()))
        return RateLimit(rate, item.amount, item.get_expiry(), remaining if fits else 0, reset_s, exceeded=not fits)
