"""Jobs whose client went away a moment ago and may be back: who asks again adopts one, and no work is done twice."""

from __future__ import annotations

from typing import Any, cast

import redis.asyncio

from worker.contract.link import reaching_redis
from worker.contract.transitions import EVEN_IF_FULL

KEPT_S = 60
"""An orphan is adoptable no longer than this, should the gateway that left it be gone."""


class Orphans:
    """By request: a key that stands for who asked and for what. Every method raises QueueUnavailable."""

    def __init__(self, redis: redis.asyncio.Redis) -> None:
        self._redis = redis

    async def leave(self, request: str, job_id: str) -> None:
        """Makes a job adoptable."""
        with reaching_redis():
            async with self._redis.pipeline(transaction=True) as pipe:
                pipe.eval(EVEN_IF_FULL, 0, "RPUSH", _name(request), job_id)
                pipe.expire(_name(request), KEPT_S)
                await pipe.execute()

    async def adopt(self, request: str) -> str | None:
        """The id of the job left longest ago, which is now the adopter's alone; None: there is none."""
        with reaching_redis():
            found = await cast(Any, self._redis.lpop(_name(request)))
        return None if found is None else found.decode()

    async def take_back(self, request: str, job_id: str) -> bool:
        """Makes a job adoptable no more; False if somebody has adopted it."""
        with reaching_redis():
            return bool(await cast(Any, self._redis.lrem(_name(request), 1, job_id)))


def _name(request: str) -> str:
    return f"darkroom:orphans:{request}"
