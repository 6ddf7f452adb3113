"""Waiting for jobs to end: one subscriber per process, however many wait."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import redis.asyncio
from redis.exceptions import RedisError

ENDED = "darkroom:ended"
RECONNECT_S = 0.5
LISTEN_S = 30.0


class EndedJobs:
    """Wakes those who wait for a job when its id is published on `darkroom:ended`.

    A message may be lost (a reconnect, a slow start): whoever waits also looks for itself now and then.
    """

    def __init__(self, redis: redis.asyncio.Redis) -> None:
        self._redis = redis
        self._waiting: dict[str, set[asyncio.Event]] = defaultdict(set)
        self._listener: asyncio.Task[None] | None = None

    @asynccontextmanager
    async def watch(self, job_id: str) -> AsyncIterator[asyncio.Event]:
        """An event that is set each time the job is said to have ended."""
        if self._listener is None or self._listener.done():
            self._listener = asyncio.create_task(self._listen(), name="darkroom-ended-jobs")
        event = asyncio.Event()
        self._waiting[job_id].add(event)
        try:
            yield event
        finally:
            self._waiting[job_id].discard(event)
            if not self._waiting[job_id]:
                del self._waiting[job_id]

    async def close(self) -> None:
        """Stops listening."""
        listener, self._listener = self._listener, None
        while listener is not None and not listener.done():
            listener.cancel()  # more than once: redis-py loses a cancellation that meets it connecting
            await asyncio.wait([listener], timeout=0.1)

    async def _listen(self) -> None:
        while True:
            try:
                async with self._redis.pubsub(ignore_subscribe_messages=True) as channel:
                    await channel.subscribe(ENDED)
                    while True:
                        message = await channel.get_message(timeout=LISTEN_S)
                        if message is not None:
                            self._wake(message["data"].decode())
            except (RedisError, OSError):
                await asyncio.sleep(RECONNECT_S)

    def _wake(self, job_id: str) -> None:
        for event in self._waiting.get(job_id, ()):
            event.set()
