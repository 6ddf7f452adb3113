"""The queue as the gateway sees it: submit, view, cancel and wait for jobs; know models and workers."""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter
from contextlib import suppress
from typing import Any, Self, cast

import redis.asyncio
from redis.commands.core import AsyncScript
from rq.defaults import RQ_KEY_PREFIX

from worker.contract.cards import ModelCard
from worker.contract.errors import ModelDraining, QueueFull, UnknownGeneration
from worker.contract.events import EndedJobs
from worker.contract.job import PRIORITIES, TERMINAL, Job, JobView, Priority, queue_name
from worker.contract.link import link_options, reaching_redis, retry_once_async
from worker.contract.record import RecordWriter, read_view
from worker.contract.settings import ContractSettings
from worker.contract.transitions import script

CARDS = "darkroom:cards"
WORKERS = "darkroom:workers"
WORKER_SEEN_S = 10
"""A worker not heard of for so long is not counted."""

RECHECK_S = 2.0
"""How often a waiter looks for itself: a published message may be lost."""

RETRY_AFTER_S = 10
"""What a client turned away by a full queue is told to wait."""

DRAIN_RETRY_AFTER_S = 30
"""The same for a model that is being drained, which takes longer."""

WATCH_S = 15
PREVIEW_S = 30
"""A preview is kept so long."""

LATE_AT_MOST = 200

MAX_CONNECTIONS = 32
CONNECTION_WAIT_S = 5.0
"""A burst of requests waits so long for a connection; the client's plain pool would fail at once."""

JOB_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


class JobQueue:
    """All jobs of all models, for one gateway process. Every method raises QueueUnavailable when Redis is away."""

    def __init__(self, redis: redis.asyncio.Redis, settings: ContractSettings) -> None:
        self._redis = redis
        self._bound = settings.queue_bound
        self._records = RecordWriter(settings.record_lifetime_s)
        self._ended = EndedJobs(redis)
        names = ("submit", "view", "cancel", "reap")
        self._scripts: dict[str, AsyncScript] = {name: redis.register_script(script(name)) for name in names}

    @classmethod
    def connect(cls, settings: ContractSettings) -> Self:
        """A queue on the Redis of the settings; nothing is sent yet."""
        pool = redis.asyncio.BlockingConnectionPool.from_url(
            str(settings.redis_url),
            max_connections=MAX_CONNECTIONS,
            timeout=CONNECTION_WAIT_S,
            retry=retry_once_async(),
            **link_options(),
        )
        return cls(redis.asyncio.Redis.from_pool(pool), settings)

    async def close(self) -> None:
        """Stops listening and closes all connections."""
        await self._ended.close()
        await self._redis.aclose()

    async def ping(self) -> None:
        """Returns if Redis answers."""
        with reaching_redis():
            await cast(Any, self._redis.ping())

    async def submit(self, job: Job) -> int:
        """Puts the job in its queue and returns how many of its model go before it; QueueFull, ModelDraining.

        Submitting the same id again changes nothing, so that a caller may try again after QueueUnavailable.
        """
        answer = await self._run(
            "submit", job.id, job.model, job.priority, self._bound, job.deadline, *self._records.fields(job)
        )
        if answer == b"full":
            raise QueueFull(job.model, self._bound, RETRY_AFTER_S)
        if answer == b"draining":
            raise ModelDraining(job.model, DRAIN_RETRY_AFTER_S)
        return int(answer)

    async def view(self, job_id: str) -> JobView:
        """The job as it is now; past its deadline it has failed. UnknownGeneration."""
        return await self._record("view", job_id)

    async def cancel(self, job_id: str) -> JobView:
        """Cancels a queued job at once, asks for a running one to stop, leaves an ended one. UnknownGeneration."""
        return await self._record("cancel", job_id)

    async def wait(self, job_id: str, timeout_s: float) -> JobView:
        """The job once it has ended, or as it is when the time is up. UnknownGeneration."""
        loop = asyncio.get_running_loop()
        end = loop.time() + timeout_s
        async with self._ended.watch(job_id) as ended:
            while True:
                ended.clear()
                view = await self.view(job_id)
                left = end - loop.time()
                if view.status in TERMINAL or left <= 0:
                    return view
                with suppress(TimeoutError):
                    async with asyncio.timeout(min(left, RECHECK_S)):
                        await ended.wait()

    async def watch(self, job_id: str) -> None:
        """Asks for previews of a job for the next WATCH_S seconds; a worker makes none that nobody asked for."""
        with reaching_redis():
            await self._redis.set(f"darkroom:watch:{job_id}", 1, ex=WATCH_S)

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

    async def depth(self) -> dict[tuple[str, Priority], int]:
        """How many jobs wait, by known model and priority."""
        with reaching_redis():
            models = sorted(name.decode() for name in await cast(Any, self._redis.hkeys(CARDS)))
            queues = [(model, priority) for model in models for priority in PRIORITIES]
            async with self._redis.pipeline(transaction=False) as pipe:
                for queue in queues:
                    pipe.llen(f"{RQ_KEY_PREFIX}:queue:{queue_name(*queue)}")
                return dict(zip(queues, await pipe.execute(), strict=True))

    async def _record(self, transition: str, job_id: str) -> JobView:
        if not JOB_ID.fullmatch(job_id):
            raise UnknownGeneration(job_id)
        record = await self._run(transition, job_id)
        if record is None:
            raise UnknownGeneration(job_id)
        return read_view(record)

    async def _run(self, transition: str, *args: str | bytes | float) -> Any:
        with reaching_redis():
            return await cast(Any, self._scripts[transition](args=args))
