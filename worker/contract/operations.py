"""The queue as its operator sees it: what waits where, and what may start, come in, start again or go."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Final, Literal, Self, cast

import redis
from redis.commands.core import Script
from rq.defaults import RQ_KEY_PREFIX

from worker.contract.errors import SchemaUnknown, UnknownModel
from worker.contract.job import PRIORITIES, Priority, queue_name
from worker.contract.link import connect, reaching_redis
from worker.contract.queue import LATE_AT_MOST, SAFE_ID, SUBMITTED, WORKER_SEEN_S
from worker.contract.record import RecordWriter, read_job, read_time
from worker.contract.settings import ContractSettings
from worker.contract.transitions import EVEN_IF_FULL, script

PAUSED = "darkroom:paused"
DRAINING = "darkroom:draining"

CHUNK = 50
"""Jobs handled by one script or pipeline, so that nobody else waits long for Redis."""

REFUSALS: Final = {
    "gone": "it was never accepted here, or its record has expired",
    "queued": "it waits already",
    "started": "it is running",
    "finished": "it has succeeded",
    "draining": "its model is being drained",
    "full": "the queue of its model and priority is full",
}


@dataclass(frozen=True, kw_only=True)
class QueueStatus:
    """The jobs of one model and priority."""

    priority: Priority
    waiting: int
    suspects: int  # of those waiting: to be run apart, for the worker that had them died
    oldest_s: float | None  # since when the oldest of them waits
    running: int
    succeeded: int  # as long as records are kept; so the next two
    failed: int
    canceled: int


@dataclass(frozen=True, kw_only=True)
class ModelStatus:
    """One model: whether its jobs may start and come in, and its queues from high to low."""

    model: str
    paused: bool  # nothing starts
    draining: bool  # nothing new is accepted
    queues: tuple[QueueStatus, ...]

    @property
    def waiting(self) -> int:
        """Jobs that wait."""
        return sum(queue.waiting for queue in self.queues)

    @property
    def running(self) -> int:
        """Jobs that a worker has."""
        return sum(queue.running for queue in self.queues)


@dataclass(frozen=True, kw_only=True)
class WorkerStatus:
    """One worker, as Redis knows it."""

    worker: str
    models: tuple[str, ...]
    held: int  # jobs
    lease_left_s: float | None  # until its jobs are taken from it; negative: they are about to be
    heard_s: float | None  # since it last said that it lives


@dataclass(frozen=True, kw_only=True)
class FleetStatus:
    """All queues and workers at one moment."""

    models: tuple[ModelStatus, ...]
    workers: tuple[WorkerStatus, ...]


@dataclass(frozen=True, kw_only=True)
class Retried:
    """What came of an attempt to retry a job."""

    id: str
    position: int | None = None  # jobs of its model that go first; None: it was refused
    refused: str | None = None  # why, in words


class Operations:
    """An operator's hand on all queues. For one thread; every method raises QueueUnavailable when Redis is away.

    Nothing is tried twice: an operator who got no answer looks, and says it again.
    """

    def __init__(self, redis: redis.Redis, settings: ContractSettings) -> None:
        self._redis = redis
        self._bound = settings.queue_bound
        self._lifetime_s = settings.record_lifetime_s
        self._records = RecordWriter(settings.record_lifetime_s)
        names = ("status", "retry", "purge", "reap", "forget_model")
        self._scripts: dict[str, Script] = {name: redis.register_script(script(name)) for name in names}

    @classmethod
    def connect(cls, settings: ContractSettings) -> Self:
        """On the Redis of the settings; nothing is sent yet."""
        return cls(connect(settings, again=False), settings)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connection."""
        self._redis.close()

    def status(self) -> FleetStatus:
        """Everything that is known of queues and workers, in one round trip; changes nothing."""
        seen = json.loads(self._run("status", self._lifetime_s))
        now = float(seen["now"])
        return FleetStatus(
            models=tuple(_model_status(model, now) for model in seen["models"]),
            workers=tuple(_worker_status(worker) for worker in seen["workers"]),
        )

    def models(self) -> list[str]:
        """Every model that a worker ever offered or a job was ever queued for."""
        return [model.model for model in self.status().models]

    def pause(self, models: Sequence[str]) -> None:
        """No job of these models starts any more; those running go on. UnknownModel."""
        self._require(models)
        with reaching_redis(), self._redis.pipeline(transaction=True) as pipe:
            for model in models:
                pipe.eval(EVEN_IF_FULL, 0, "SADD", PAUSED, model)
            pipe.execute()

    def drain(self, models: Sequence[str]) -> None:
        """No new job of these models is accepted, and those that wait are done: a pause ends. UnknownModel."""
        self._require(models)
        with reaching_redis(), self._redis.pipeline(transaction=True) as pipe:
            for model in models:
                pipe.eval(EVEN_IF_FULL, 0, "SADD", DRAINING, model)
                pipe.srem(PAUSED, model)
                pipe.publish(SUBMITTED, model)
            pipe.execute()

    def resume(self, models: Sequence[str]) -> None:
        """Ends pause and drain of these models. UnknownModel."""
        self._require(models)
        with reaching_redis(), self._redis.pipeline(transaction=True) as pipe:
            for model in models:
                pipe.srem(PAUSED, model)
                pipe.srem(DRAINING, model)
                pipe.publish(SUBMITTED, model)
            pipe.execute()

    def reap(self) -> None:
        """As JobQueue.reap: a queue must run empty though its gateways and workers are gone."""
        self._run("reap", LATE_AT_MOST)

    def waiting(self, models: Sequence[str]) -> list[str]:
        """The ids of all jobs that wait, in the order of each queue. UnknownModel."""
        self._require(models)
        with reaching_redis(), self._redis.pipeline(transaction=True) as pipe:
            for queue in _queues(models):
                pipe.lrange(f"{RQ_KEY_PREFIX}:queue:{queue}", 0, -1)
            return [job_id.decode() for ids in pipe.execute() for job_id in ids]

    def failed(self, models: Sequence[str], since_s: float | None = None) -> list[str]:
        """The ids of failed jobs, all or those of the last `since_s` seconds, as they were submitted. UnknownModel."""
        self._require(models)
        with reaching_redis(), self._redis.pipeline(transaction=True) as pipe:
            pipe.time()
            for queue in _queues(models):
                pipe.zrange(f"{RQ_KEY_PREFIX}:failed:{queue}", 0, -1)
            (seconds, _micros), *registries = pipe.execute()
        ended = self._ended_at([job_id.decode() for ids in registries for job_id in ids])
        earliest = 0.0 if since_s is None else seconds - since_s
        return sorted(job_id for job_id, at in ended.items() if at >= earliest)

    def retry(self, job_id: str) -> Retried:
        """Queues a failed or canceled job again: a new life of the same id.

        It gets as many seconds as it had, from now on, and ends once more, with an event of its own; its events go on
        where they were. What it left in its earlier life is gone, but for RQ's stream of results.
        """
        if not SAFE_ID.fullmatch(job_id):
            return Retried(id=job_id, refused=REFUSALS["gone"])
        with reaching_redis(), self._redis.pipeline(transaction=True) as pipe:
            pipe.time()
            pipe.hmget(f"{RQ_KEY_PREFIX}:job:{job_id}", "data", "timeout")
            (seconds, micros), (data, timeout) = pipe.execute()
        if data is None or timeout is None:
            return Retried(id=job_id, refused=REFUSALS["gone"])
        try:
            job = read_job(data)
        except SchemaUnknown as error:
            return Retried(id=job_id, refused=str(error))
        job = replace(job, deadline=seconds + micros / 1e6 + int(timeout))
        record = {
            **self._records.twin(job).to_dict(),
            "timeout": int(timeout),
        }  # RQ's timeout is the length, not the end
        fields = [part for pair in record.items() for part in pair]
        answer = self._run("retry", job_id, self._bound, *fields)
        if isinstance(answer, bytes):
            return Retried(id=job_id, refused=REFUSALS.get(answer.decode(), f"it is {answer.decode()}"))
        return Retried(id=job_id, position=int(answer))

    def purge(self, state: Literal["queued", "failed"], job_ids: Sequence[str]) -> int:
        """Ends waiting jobs as canceled, or forgets failed ones; how many of them still were so."""
        return sum(int(self._run("purge", state, *chunk)) for chunk in _chunks(job_ids))

    def forget(self, model: str) -> str | None:
        """Forgets a model until a worker offers it again; why not, in words, while it is in use. UnknownModel."""
        self._require([model])
        workers, jobs = self._run("forget_model", model, WORKER_SEEN_S)
        return _in_use(int(workers), int(jobs))

    def _require(self, models: Sequence[str]) -> None:
        known = self.models()
        for model in models:
            if model not in known:
                raise UnknownModel(model, known)

    def _ended_at(self, job_ids: Sequence[str]) -> dict[str, float]:
        """When each ended, in Unix seconds; jobs whose records are gone are absent."""
        ended: dict[str, float] = {}
        for chunk in _chunks(job_ids):
            with reaching_redis(), self._redis.pipeline(transaction=False) as pipe:
                for job_id in chunk:
                    pipe.hget(f"{RQ_KEY_PREFIX}:job:{job_id}", "ended_at")
                answers = pipe.execute()
            ended |= {job_id: read_time(at) or 0.0 for job_id, at in zip(chunk, answers, strict=True) if at}
        return ended

    def _run(self, transition: str, *args: str | bytes | float) -> Any:
        with reaching_redis():
            return self._scripts[transition](args=args)


def _in_use(workers: int, jobs: int) -> str | None:
    held = "1 worker holds it" if workers == 1 else f"{workers} workers hold it" if workers else ""
    open_ = "1 job of it waits or runs" if jobs == 1 else f"{jobs} jobs of it wait or run" if jobs else ""
    return " and ".join(filter(None, (held, open_))) or None


def _chunks(job_ids: Sequence[str]) -> Iterator[Sequence[str]]:
    return (job_ids[start : start + CHUNK] for start in range(0, len(job_ids), CHUNK))


def _queues(models: Sequence[str]) -> list[str]:
    return [queue_name(model, priority) for model in models for priority in PRIORITIES]


def _model_status(seen: dict[str, Any], now: float) -> ModelStatus:
    queues = []
    for queue in seen["queues"]:
        oldest = queue.pop("oldest", None)
        oldest_s = None if oldest is None else max(0.0, now - cast(float, read_time(oldest.encode())))
        queues.append(QueueStatus(oldest_s=oldest_s, **queue))
    return ModelStatus(model=seen["model"], paused=seen["paused"], draining=seen["draining"], queues=tuple(queues))


def _worker_status(seen: dict[str, Any]) -> WorkerStatus:
    return WorkerStatus(
        worker=seen["worker"],
        models=tuple(seen["models"]),
        held=seen["held"],
        lease_left_s=seen.get("lease_left_s"),
        heard_s=seen.get("heard_s"),
    )
