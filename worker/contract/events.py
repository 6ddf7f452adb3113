"""Hearing what happens to jobs: one subscriber per process, however many wait for a job or follow it."""

from __future__ import annotations

import asyncio
import json
import re
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import redis.asyncio
from redis.exceptions import RedisError

from worker.contract.job import TERMINAL
from worker.contract.link import end, reaching_redis

CHANNEL = "darkroom:event"
RECONNECT_S = 0.5
LISTEN_S = 30.0

UNREAD_AT_MOST = 64
"""Events kept for a reader that is behind; beyond, it reads on in the job's stream."""

EVENT_ID = re.compile(r"[0-9]{1,18}-[0-9]{1,18}")
FIRST = "0-0"

T = TypeVar("T")


@dataclass(frozen=True)
class Event:
    """Something that happened to a job."""

    id: str  # by which its stream goes on
    name: str  # queued, running, progress, preview, succeeded, failed, canceled
    data: dict[str, Any]  # progress: step, steps; preview: step; at the end: the Result


def stream_order(stream_id: str) -> tuple[int, int]:
    """What the ids of a stream sort by."""
    milliseconds, count = stream_id.split("-")
    return int(milliseconds), int(count)


class Unread:
    """The live events of one job that one reader has not read yet."""

    def __init__(self) -> None:
        self._events: deque[Event] = deque()
        self._bell = asyncio.Event()
        self._gap = False

    def put(self, event: Event) -> None:
        """One more; a reader that is too far behind must look for itself."""
        if len(self._events) < UNREAD_AT_MOST:
            self._events.append(event)
        else:
            self._events.clear()
            self._gap = True
        self._bell.set()

    def note_gap(self) -> None:
        """Some may have been missed."""
        self._gap = True
        self._bell.set()

    async def after(self, stream_id: str, timeout_s: float) -> AsyncIterator[Event]:
        """Those after that one, until the reader should look for itself.

        That is: the job may have ended, events were missed, or there were none for `timeout_s` seconds.
        """
        last = stream_order(stream_id)
        while not self._gap:
            if not self._events:
                self._bell.clear()
                try:
                    async with asyncio.timeout(timeout_s):
                        await self._bell.wait()
                except TimeoutError:
                    return
                continue
            event = self._events.popleft()
            if stream_order(event.id) > last:
                last = stream_order(event.id)
                yield event
                if event.name in TERMINAL:
                    return
        self._gap = False


class JobEvents:
    """Hears the events of all jobs in one task, and passes them to those who wait for a job or follow it.

    A message may be lost (a reconnect, a slow start): whoever waits also looks for itself now and then.
    """

    def __init__(self, redis: redis.asyncio.Redis) -> None:
        self._redis = redis
        self._waiting: dict[str, set[asyncio.Event]] = defaultdict(set)
        self._following: dict[str, set[Unread]] = defaultdict(set)
        self._listener: asyncio.Task[None] | None = None

    @contextmanager
    def watch(self, job_id: str) -> Iterator[asyncio.Event]:
        """An asyncio event that is set each time the job may have ended."""
        self._listen_from_now_on()
        with _member(self._waiting, job_id, asyncio.Event()) as ended:
            yield ended

    @contextmanager
    def follow(self, job_id: str) -> Iterator[Unread]:
        """The events of a job from now on."""
        self._listen_from_now_on()
        with _member(self._following, job_id, Unread()) as unread:
            yield unread

    async def history(self, job_id: str, after: str) -> list[Event]:
        """The events of a job that came after that one, as many as are kept."""
        with reaching_redis():
            rows = await cast(Any, self._redis.xrange(f"darkroom:events:{job_id}", min=f"({after}"))
        return [Event(at.decode(), row[b"event"].decode(), json.loads(row[b"data"])) for at, row in rows]

    async def close(self) -> None:
        """Stops listening."""
        listener, self._listener = self._listener, None
        if listener is not None:
            await end(listener)

    def _listen_from_now_on(self) -> None:
        if self._listener is None or self._listener.done():
            self._listener = asyncio.create_task(self._listen(), name="darkroom-job-events")

    async def _listen(self) -> None:
        while True:
            try:
                async with self._redis.pubsub() as channel:
                    await channel.subscribe(CHANNEL)
                    while True:
                        message = await channel.get_message(timeout=LISTEN_S)
                        if message is not None:
                            self._hear(message)
            except (RedisError, OSError):
                await asyncio.sleep(RECONNECT_S)

    def _hear(self, message: dict[str, Any]) -> None:
        if message["type"] == "message":
            self._pass_on(message["data"])
        else:  # subscribed, or subscribed again: what was said before this was not heard
            for waiting in self._waiting.values():
                _set_all(waiting)
            for following in self._following.values():
                for unread in following:
                    unread.note_gap()

    def _pass_on(self, message: bytes) -> None:
        job, at, name, data = message.split(b" ", 3)
        job_id = job.decode()
        if following := self._following.get(job_id):
            event = Event(at.decode(), name.decode(), json.loads(data))
            for unread in following:
                unread.put(event)
        if name.decode() in TERMINAL:
            _set_all(self._waiting.get(job_id, set()))


@contextmanager
def _member(groups: dict[str, set[T]], name: str, member: T) -> Iterator[T]:
    groups[name].add(member)
    try:
        yield member
    finally:
        groups[name].discard(member)
        if not groups[name]:
            del groups[name]


def _set_all(events: set[asyncio.Event]) -> None:
    for event in events:
        event.set()
