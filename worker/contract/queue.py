"""The queue as the gateway sees it: submit, view, cancel and wait for jobs; know models and workers."""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import re
import secrets
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Self, cast

import redis.asyncio
from redis.commands.core import AsyncScript

from worker.contract.cards import ModelCard
from worker.contract.errors import (
    IdempotencyKeyReused,
    ModelDraining,
    QueueFull,
    SchemaUnknown,
    TooManyJobs,
    UnknownGeneration,
)
from worker.contract.events import EVENT_ID, FIRST, Event, JobEvents
from worker.contract.job import TERMINAL, Job, JobView, Priority, queue_name
from worker.contract.link import connect_async, reaching_redis
from worker.contract.load import Load, Survey
from worker.contract.orphans import Orphans
from worker.contract.record import RecordWriter, read_view
from worker.contract.settings import ContractSettings
from worker.contract.transitions import EVEN_IF_FULL, script
from worker.contract.usage import USAGE_DAYS, Usage, read_usage

CARDS = "darkroom:cards"
WORKERS = "darkroom:workers"
SUBMITTED = "darkroom:submitted"
WORKER_SEEN_S = 10
"""A worker not heard of for so long is not counted."""

RECHECK_S = 2.0
"""How often a waiter looks for itself: a published message may be lost."""

FOLLOW_RECHECK_S = 15.0
"""The same for those who follow a job's events."""

RETRY_AFTER_S = 10
"""What a client turned away by a full queue is told to wait, where nobody knows how long that will be."""

DRAIN_RETRY_AFTER_S = 30
"""The same for a model that is being drained, which takes longer."""

LONGEST_RETRY_AFTER_S = 3600
"""No client is told to wait longer, however long the queue is."""

WATCH_S = 15
"""Who asks for previews of a job gets them so long."""

PREVIEW_S = 30
"""A preview is kept so long."""

LATE_AT_MOST = 200
"""Jobs past their deadline that one reaping ends, so that nobody else waits long for Redis."""

MAX_CONNECTIONS = 32

SAFE_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
"""What may stand in a key of Redis as a job's id; our own are `job.JOB_ID`."""


SECRET = "darkroom:secret"
SECRET_BYTES = 32

IDEMPOTENCY_S = 86_400
"""How long an idempotency key is kept."""


@dataclass(frozen=True)
class Idempotency:
    """A client's own name for a request, so that asking again asks for nothing new."""

    scope: str  # owner and route: the same key elsewhere is another key
    key: str
    fingerprint: str  # SHA-256 in hex of the canonical request

    @property
    def name(self) -> str:
        """What Redis calls it."""
        return hashlib.sha256(f"{self.scope}\0{self.key}".encode("utf-8", "surrogatepass")).hexdigest()


@dataclass(frozen=True)
class Accepted:
    """The answer to a request for a job: of the first one, where an idempotency key came again."""

    job_id: str
    position: int  # jobs of its model that went before it then
    replayed: bool


@dataclass(frozen=True)
class Expired:
    """A job whose pictures are to be deleted, given to one gateway for a while."""

    job_id: str
    lease: str  # its end, as Redis said it


class JobQueue:
    """All jobs of all models, for one gateway process. Every method raises QueueUnavailable when Redis is away."""

    def __init__(self, redis: redis.asyncio.Redis, settings: ContractSettings) -> None:
        self._redis = redis
        self._bound = settings.queue_bound
        self._records = RecordWriter(settings.record_lifetime_s)
        self._events = JobEvents(redis)
        self.orphans = Orphans(redis)
        names = ("submit", "view", "page", "cancel", "forget", "reap", "load", "survey", "expire", "expired")
        self._scripts: dict[str, AsyncScript] = {name: redis.register_script(script(name)) for name in names}

    @classmethod
    def connect(cls, settings: ContractSettings) -> Self:
        """A queue on the Redis of the settings; nothing is sent yet."""
        return cls(connect_async(settings, MAX_CONNECTIONS), settings)

    async def close(self) -> None:
        """Stops listening and closes all connections."""
        await self._events.close()
        await self._redis.aclose()

    async def ping(self) -> None:
        """Returns if Redis answers."""
        with reaching_redis():
            await cast(Any, self._redis.ping())

    async def submit(
        self, job: Job, *, idempotency: Idempotency | None = None, max_active: int | None = None
    ) -> Accepted:
        """Puts the job in its queue. QueueFull, ModelDraining, TooManyJobs, IdempotencyKeyReused.

        idempotency: the first job of this key stands for all later ones, for a day or as long as its record is kept.
        max_active: how many jobs its owner may have that have not ended.

        Submitting the same id again changes nothing, so that a caller may try again after QueueUnavailable.
        """
        once = idempotency or Idempotency("", "", "")
        key = idempotency.name if idempotency else ""
        answer, *position = await self._run(
            "submit", job.id, job.model, job.priority, self._bound, job.owner,
             -1 if max_active is None else max_active, key, once.fingerprint, IDEMPOTENCY_S,
            *self._records.fields(job),
        )  # fmt: skip
        match answer:
            case b"full":
                raise QueueFull(job.model, self._bound, await self._retry_after_s(job))
            case b"draining":
                raise ModelDraining(job.model, DRAIN_RETRY_AFTER_S)
            case b"many":
                raise TooManyJobs(max_active or 0, await self._retry_after_s(job))
            case b"reused":
                raise IdempotencyKeyReused(once.key)
        job_id = answer.decode()
        return Accepted(job_id, int(position[0]), replayed=job_id != job.id)

    async def replay(self, idempotency: Idempotency) -> JobView | None:
        """The job that was submitted under this key, as it was then; None if none is kept. IdempotencyKeyReused.

        `submit` looks again: of two requests at once, only one is the first.
        """
        name = f"darkroom:idempotency:{idempotency.name}"
        with reaching_redis():
            job_id, position, fingerprint = await cast(Any, self._redis.hmget(name, "id", "position", "fingerprint"))
        if job_id is None:
            return None
        try:
            view = await self.view(job_id.decode())
        except UnknownGeneration:
            return None
        if fingerprint.decode() != idempotency.fingerprint:
            raise IdempotencyKeyReused(idempotency.key)
        return JobView(job=view.job, status="queued", position=int(position))

    async def view(self, job_id: str) -> JobView:
        """The job as it is now; past its deadline it has failed. UnknownGeneration."""
        return await self._record("view", job_id)

    async def cancel(self, job_id: str) -> JobView:
        """Cancels a queued job at once, asks for a running one to stop, leaves an ended one. UnknownGeneration."""
        return await self._record("cancel", job_id)

    async def page(self, owner: str, *, limit: int, before: str | None = None) -> list[JobView]:
        """An owner's jobs, newest first, at most `limit`; those older than the job `before`, which may be gone."""
        if limit < 1 or (before is not None and not SAFE_ID.fullmatch(before)):
            return []
        views: list[JobView] = []
        top = (before or "").encode()
        while True:
            records, top = await self._run("page", owner, limit - len(views), top)
            for record in records:
                with suppress(SchemaUnknown):  # of a newer Darkroom, for its gateways to show
                    views.append(read_view(record))
            if not top or len(views) >= limit:
                return views

    async def forget(self, job_id: str) -> bool:
        """Forgets a job, after ending it if need be; False if there is none. The caller deletes its pictures."""
        return bool(SAFE_ID.fullmatch(job_id) and await self._run("forget", job_id))

    async def expected_wait(self, model: str, priority: Priority, owner: str | None = None) -> float | None:
        """Seconds until a job submitted now would start; None: no worker holds the model, or none has measured itself.

        owner: whose job it would be, which gets its turn among the owners of those that wait; None: behind all.
        """
        who = () if owner is None else (owner, queue_name(model, priority))
        return (await self._load(*who)).wait_s(model, priority)

    async def survey(self) -> Survey:
        """All queues and workers at one moment, in one command."""
        return Survey.from_json(await self._run("survey", WORKER_SEEN_S))

    async def expired_pictures(self, lease_s: float) -> Expired | None:
        """A job whose pictures' time is up, for the caller alone for `lease_s`: it deletes them, and says so.

        Also jobs that came to nothing, for their workers may have left pictures behind.
        """
        given = await self._run("expire", lease_s)
        return Expired(given[0].decode(), given[1].decode()) if given else None

    async def pictures_deleted(self, expired: Expired) -> bool:
        """They are, so the job is not given again. False if it was not the caller's any more: nothing is changed."""
        return bool(await self._run("expired", expired.job_id, expired.lease))

    async def usage(self, days: int) -> list[Usage]:
        """What was done for each owner on each of the last `days` days (UTC), today among them, newest day first."""
        with reaching_redis():
            seconds, _micros = await cast(Any, self._redis.time())
            today = datetime.fromtimestamp(seconds, UTC).date()
            names = [(today - timedelta(days=back)).isoformat() for back in range(min(days, USAGE_DAYS))]
            async with self._redis.pipeline(transaction=False) as pipe:
                for name in names:
                    pipe.hgetall(f"darkroom:usage:{name}")
                found = await pipe.execute()
        return [row for name, counters in zip(names, found, strict=True) for row in read_usage(name, counters)]

    async def secret(self) -> bytes:
        """The 256 random bits that all processes on this Redis share; made by whoever asks first."""
        with reaching_redis():
            async with self._redis.pipeline(transaction=True) as pipe:
                pipe.eval(EVEN_IF_FULL, 0, "SET", SECRET, secrets.token_bytes(SECRET_BYTES), "NX")
                pipe.get(SECRET)
                _made, secret = await pipe.execute()
        return cast(bytes, secret)

    async def wait(self, job_id: str, timeout_s: float) -> JobView:
        """The job once it has ended, or as it is when the time is up. UnknownGeneration."""
        loop = asyncio.get_running_loop()
        end = loop.time() + timeout_s
        with self._events.watch(job_id) as ended:
            while True:
                ended.clear()
                view = await self.view(job_id)
                left = end - loop.time()
                if view.status in TERMINAL or left <= 0:
                    return view
                with suppress(TimeoutError):
                    async with asyncio.timeout(min(left, RECHECK_S)):
                        await ended.wait()

    async def events(self, job_id: str, after: str = FIRST) -> AsyncGenerator[Event, None]:
        """What happened to a job after that event, then what happens to it, until it has ended. UnknownGeneration.

        after: the id of an event; with any other text, all that are kept are told again.
        """
        last, following = after if EVENT_ID.fullmatch(after) else FIRST, False
        with self._events.follow(job_id) as unread:
            while True:
                try:
                    view = await self.view(job_id)
                except UnknownGeneration:
                    if following:
                        return  # forgotten meanwhile
                    raise
                following, past = True, await self._events.history(job_id, last)
                for event in past:
                    last = event.id
                    yield event
                if view.status in TERMINAL:
                    return
                if past and past[-1].name in TERMINAL:
                    continue
                async for event in unread.after(last, FOLLOW_RECHECK_S):
                    last = event.id
                    yield event

    async def watch(self, job_id: str) -> None:
        """Asks for previews of a job for the next WATCH_S seconds; a worker makes none that nobody asked for."""
        with reaching_redis():
            await cast(
                Any, self._redis.eval(EVEN_IF_FULL, 0, "SET", f"darkroom:watch:{job_id}", "1", "EX", str(WATCH_S))
            )

    async def preview(self, job_id: str) -> bytes | None:
        """The latest preview of a running, watched job: a small JPEG."""
        with reaching_redis():
            return cast(bytes | None, await self._redis.get(f"darkroom:preview:{job_id}"))

    async def reap(self) -> tuple[int, int]:
        """Ends jobs past their deadline, takes those of workers that are gone; how many of each. About every 2 s."""
        late, taken = await self._run("reap", LATE_AT_MOST)
        return int(late), int(taken)

    async def cards(self) -> dict[str, ModelCard]:
        """The card of every model ever published, by name."""
        with reaching_redis():
            found = await cast(Any, self._redis.hgetall(CARDS))
        return {name.decode(): ModelCard.from_json(card) for name, card in sorted(found.items())}

    async def workers(self) -> dict[str, int]:
        """How many live workers hold each model; models without any are absent."""
        with reaching_redis():
            async with self._redis.pipeline(transaction=True) as pipe:
                pipe.time()
                pipe.zrange(WORKERS, 0, -1, withscores=True)
                (seconds, _micros), seen = await pipe.execute()
        return dict(Counter(json.loads(member)[0] for member, at in seen if at > seconds - WORKER_SEEN_S))

    async def _retry_after_s(self, job: Job) -> int:
        """When a client that was turned away may come again: once a job of its own would start."""
        wait_s = await self.expected_wait(job.model, job.priority, job.owner)
        return RETRY_AFTER_S if wait_s is None else max(1, min(LONGEST_RETRY_AFTER_S, math.ceil(wait_s)))

    async def _load(self, *who: str) -> Load:
        return Load.from_json(await self._run("load", WORKER_SEEN_S, *who))

    async def _record(self, transition: str, job_id: str) -> JobView:
        if not SAFE_ID.fullmatch(job_id):
            raise UnknownGeneration(job_id)
        record = await self._run(transition, job_id)
        if record is None:
            raise UnknownGeneration(job_id)
        return read_view(record)

    async def _run(self, transition: str, *args: str | bytes | float) -> Any:
        with reaching_redis():
            return await cast(Any, self._scripts[transition](args=args))
