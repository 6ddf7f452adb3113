"""The worker's side of the queue: claims several jobs at once, reports their progress, commits how they ended."""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from time import monotonic
from typing import Any, Self, cast

import redis
from redis.commands.core import Script
from redis.exceptions import RedisError
from rq.defaults import RQ_KEY_PREFIX

from worker.contract.cards import ModelCard
from worker.contract.errors import QueueUnavailable, SchemaUnknown
from worker.contract.job import SCHEMA, Failure, Job, Progress, Result
from worker.contract.link import link_options, reaching_redis, retry_once
from worker.contract.queue import CARDS, WORKERS
from worker.contract.record import RQ_STATUS, Ended, encode, read_job, read_time
from worker.contract.settings import ContractSettings
from worker.contract.transitions import script

SUBMITTED = "darkroom:submitted"
STOP = "darkroom:stop:"
RECHECK_S = 1.0
"""How often the flags of our jobs are read: a published message may be lost."""

LISTEN_S = 0.5
UNREADABLE = Failure(code="payload_unreadable", message="the job's payload could not be read by the worker")


@dataclass(frozen=True)
class Claim:
    """A job that this worker has started, under an execution of its own: the fence of its commit."""

    job: Job
    execution: str
    claimed_at: float  # Unix seconds, by Redis' clock
    queued_s: float  # how long it waited


class Intake:
    """One worker's jobs. For one thread, but for `wake`; every method that asks Redis may raise QueueUnavailable."""

    def __init__(self, redis: redis.Redis, settings: ContractSettings, worker: str) -> None:
        del settings  # lifetimes travel with the job; leases will be settings
        self._redis = redis
        self._worker = worker
        names = ("claim", "commit", "progress", "heartbeat")
        self._scripts: dict[str, Script] = {name: redis.register_script(script(name)) for name in names}
        self._held: dict[str, Claim] = {}
        self._stopping: set[str] = set()  # of those held: already told by `canceled`
        self._published: set[str] = set()  # models with a heartbeat
        self._first = 0  # the model whose turn it is
        self._claim_lost = False  # the answer of a claim never arrived
        self._rechecked_at = monotonic()
        self._listener = Listener(redis, worker)

    @classmethod
    def connect(cls, settings: ContractSettings, worker: str) -> Self:
        """An intake on the Redis of the settings. `worker` names this process: unique, never used again."""
        client = redis.Redis.from_url(str(settings.redis_url), retry=retry_once(), **link_options())
        return cls(client, settings, worker)

    def close(self) -> None:
        """Stops listening and closes all connections."""
        self._listener.close()
        self._redis.close()

    def publish(self, cards: Iterable[ModelCard]) -> None:
        """Makes models known to the gateways, for good."""
        mapping = {card.name: card.to_json() for card in cards}
        if mapping:
            with reaching_redis():
                self._redis.hset(CARDS, mapping=cast(Any, mapping))

    def heartbeat(self, models: Iterable[str]) -> None:
        """Says that this worker lives and holds these models; about every 2 s."""
        models = set(models)
        gone = [self._member(model) for model in self._published - models]
        with reaching_redis():
            if gone:
                self._redis.zrem(WORKERS, *gone)
            self._scripts["heartbeat"](args=[self._member(model) for model in sorted(models)])
        self._published = models

    def retire(self) -> None:
        """Says that this worker is gone."""
        if self._published:
            with reaching_redis():
                self._redis.zrem(WORKERS, *map(self._member, self._published))
            self._published = set()

    def claim(self, models: Sequence[str], want: int) -> list[Claim]:
        """Starts at most `want` waiting jobs of these models and returns them; never blocks.

        High before normal before low; one of each model in turn; first come, first served within a queue.
        """
        if not models or want < 1:
            return []
        if self._claim_lost:
            found = self._recover()
            self._claim_lost = False
            if found:
                return found
        first = self._first % len(models)
        turns = [*models[first:], *models[:first]]
        executions = [uuid.uuid4().hex for _ in range(want)]
        self._claim_lost = True
        rows = self._run("claim", self._worker, SCHEMA, want, len(turns), *turns, *executions)
        self._claim_lost = False
        claims = self._take(rows)
        if claims:
            self._first = models.index(claims[-1].job.model) + 1
        return claims

    def commit(self, claim: Claim, status: Ended, result: Result) -> bool:
        """Ends a claimed job, once its pictures are stored. May be repeated after QueueUnavailable.

        False: the fence fell (canceled, past its deadline, no longer ours); the caller deletes what it stored.
        """
        ending = encode(status, result)
        done = self._run("commit", claim.job.id, claim.execution, RQ_STATUS[status], ending.outcome, ending.encoded)
        self._held.pop(claim.job.id, None)
        self._stopping.discard(claim.job.id)
        return bool(done)

    def progress(self, progress: Mapping[Claim, Progress]) -> None:
        """Notes how far jobs are; those no longer ours are passed over."""
        args = [part for c, p in progress.items() for part in (c.job.id, c.execution, p.step, p.steps)]
        if args:
            self._run("progress", *args)

    def canceled(self) -> set[str]:
        """Ids of our jobs that should stop, told once each: canceled, past their deadline, or no longer ours."""
        stop = self._listener.take_stops() & self._held.keys()
        if monotonic() - self._rechecked_at >= RECHECK_S:
            stop |= self._flagged()
            self._rechecked_at = monotonic()
        stop -= self._stopping
        self._stopping |= stop
        return stop

    def wait(self, timeout_s: float) -> None:
        """Returns when there may be something to claim or to stop, when woken, or when the time is up."""
        self._listener.wait(timeout_s)

    def wake(self) -> None:
        """Ends a `wait`, from any thread."""
        self._listener.wake()

    def _take(self, rows: Sequence[Any]) -> list[Claim]:
        """The claims of the rows (id, execution, data, enqueued_at, started_at) in turn; unreadable jobs fail."""
        claims = []
        for job_id, execution, data, enqueued_at, started_at in zip(*[iter(rows)] * 5, strict=True):
            claimed_at = read_time(started_at) or 0.0
            queued_s = max(0.0, claimed_at - (read_time(enqueued_at) or claimed_at))
            try:
                job = read_job(data)
            except SchemaUnknown:
                ending = encode("failed", Result(failure=UNREADABLE))
                with suppress(QueueUnavailable):  # then it ends at its deadline; the other claims are what counts
                    self._run("commit", job_id, execution, RQ_STATUS["failed"], ending.outcome, ending.encoded)
                continue
            claims.append(Claim(job, execution.decode(), claimed_at, queued_s))
            self._held[job.id] = claims[-1]
        return claims

    def _recover(self) -> list[Claim]:
        """Jobs that Redis gave to us in an answer that was lost."""
        rows: list[Any] = []
        with reaching_redis():
            ours = cast(Any, self._redis.smembers(f"{RQ_KEY_PREFIX}:worker:{self._worker}:executions"))
            for pair in ours:
                job_id, _, execution = pair.partition(b":")
                if job_id.decode() not in self._held:
                    key = f"{RQ_KEY_PREFIX}:job:{job_id.decode()}"
                    rows += [job_id, execution, *cast(Any, self._redis.hmget(key, "data", "enqueued_at", "started_at"))]
        return self._take(rows)

    def _flagged(self) -> set[str]:
        """Ids of held jobs that Redis says should stop."""
        held = list(self._held.values())
        with reaching_redis(), self._redis.pipeline(transaction=False) as pipe:
            for claim in held:
                pipe.hmget(f"{RQ_KEY_PREFIX}:job:{claim.job.id}", "status", "execution", "cancel_requested")
            found = pipe.execute()
        return {
            claim.job.id
            for claim, (status, execution, cancel_requested) in zip(held, found, strict=True)
            if cancel_requested or status != b"started" or execution != claim.execution.encode()
        }

    def _member(self, model: str) -> str:
        return json.dumps([model, self._worker])

    def _run(self, transition: str, *args: str | bytes | float) -> Any:
        with reaching_redis():
            return self._scripts[transition](args=args)


class Listener:
    """Hears from Redis, in a thread of its own, that jobs were submitted or should stop."""

    def __init__(self, redis: redis.Redis, worker: str) -> None:
        self._redis = redis
        self._stop_channel = STOP + worker
        self._news = threading.Event()
        self._lock = threading.Lock()
        self._stops: set[str] = set()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def wait(self, timeout_s: float) -> None:
        """Returns when something was heard since the last wait, or when the time is up."""
        self._start()
        if self._news.wait(timeout_s):
            self._news.clear()

    def wake(self) -> None:
        """Ends a wait."""
        self._news.set()

    def take_stops(self) -> set[str]:
        """The ids heard since the last call."""
        with self._lock:
            stops, self._stops = self._stops, set()
        return stops

    def close(self) -> None:
        """Ends the thread."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join()

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._listen, name="darkroom-listener", daemon=True)
            self._thread.start()

    def _listen(self) -> None:
        while not self._closed.is_set():
            try:
                with cast(Any, self._redis).pubsub(ignore_subscribe_messages=True) as channel:
                    channel.subscribe(SUBMITTED, self._stop_channel)
                    self._news.set()  # what was said before this cannot be heard: look
                    while not self._closed.is_set():
                        message = channel.get_message(timeout=LISTEN_S)
                        if message is not None:
                            self._hear(message)
            except (RedisError, OSError):
                self._closed.wait(LISTEN_S)

    def _hear(self, message: dict[str, Any]) -> None:
        if message["channel"].decode() == self._stop_channel:
            with self._lock:
                self._stops.add(message["data"].decode())
        self._news.set()
