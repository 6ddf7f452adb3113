"""The worker's side of the queue: claims jobs, keeps them under its lease, reports on them, commits how they ended."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Self, cast

import redis
from redis.commands.core import Script
from redis.exceptions import RedisError

from worker.contract.cards import ModelCard
from worker.contract.errors import QueueUnavailable, SchemaUnknown
from worker.contract.job import SCHEMA, Failure, Job, Outcome, Progress, Result
from worker.contract.link import connect, reaching_redis
from worker.contract.queue import CARDS, LATE_AT_MOST, PREVIEW_S, SUBMITTED
from worker.contract.record import RQ_STATUS, encode, read_job, read_time
from worker.contract.settings import ContractSettings
from worker.contract.transitions import EVEN_IF_FULL, script

STOP = "darkroom:stop:"
LISTEN_S = 0.5
UNREADABLE = Failure(code="payload_unreadable", message="the job's payload could not be read by the worker")


@dataclass(frozen=True)
class Claim:
    """A job that this worker has started, under an execution of its own: the fence of its commit."""

    job: Job
    execution: str
    claimed_at: float  # Unix seconds, by Redis' clock
    queued_s: float  # how long it waited
    suspect: bool = False  # its worker was lost before: it runs apart from all but its own group

    @property
    def key(self) -> str:
        """What the leases call it."""
        return f"{self.job.id}:{self.execution}"


class Intake:
    """One worker's jobs. For one thread, but for `wake`; every method that asks Redis may raise QueueUnavailable."""

    def __init__(self, redis: redis.Redis, worker: str) -> None:
        self._redis = redis
        self._worker = worker
        names = ("claim", "commit", "progress", "renew", "hand_back", "retire", "reap", "bury", "preview")
        self._scripts: dict[str, Script] = {name: redis.register_script(script(name)) for name in names}
        self._held: dict[str, Claim] = {}  # by Claim.key
        self._stop: set[str] = set()  # keys of those that should stop
        self._told: set[str] = set()  # of those held: already given by `canceled`
        self._first = 0  # the model whose turn it is
        self._listener = Listener(redis, worker)

    @classmethod
    def connect(cls, settings: ContractSettings, worker: str) -> Self:
        """An intake on the Redis of the settings. `worker` names this process: unique, never used again."""
        return cls(connect(settings, again=True), worker)

    def close(self) -> None:
        """Stops listening and closes all connections."""
        self._listener.close()
        self._redis.close()

    def publish(self, cards: Iterable[ModelCard]) -> None:
        """Makes models known to the gateways, until an operator forgets them."""
        named = [part for card in cards for part in (card.name, card.to_json())]
        if named:
            with reaching_redis():
                self._redis.eval(EVEN_IF_FULL, 0, "HSET", CARDS, *named)

    def renew(self, models: Iterable[str], speeds: Mapping[str, float] | None = None) -> None:
        """Says that this worker lives, holds these models and keeps its claims; about every second.

        speeds: megapixel-steps a second, of models that it has measured.

        Without it for transitions.LEASE_S seconds, its jobs are given to others.
        """
        held, speeds = list(self._held), speeds or {}
        models = sorted(models)
        told = [part for model in models for part in (model, speeds.get(model, ""))]
        stop = self._run("renew", self._worker, len(models), *told, *held)
        self._stop |= {key.decode() for key in stop}

    def reap(self) -> None:
        """As JobQueue.reap: what workers hold that are gone must not wait for a gateway."""
        self._run("reap", LATE_AT_MOST)

    def bury(self, worker: str, death_limit: int) -> int:
        """Says that another worker's process was seen to die; how many jobs it held.

        They run again in two halves, apart; one that was alone `death_limit` times fails.
        """
        return int(self._run("bury", worker, death_limit))

    def hand_back(self, claims: Iterable[Claim]) -> None:
        """Puts jobs back at the front of their queues, to be run by others from the start.

        After QueueUnavailable they are not held any more either: they go back at the next `renew`.
        """
        claims = list(claims)
        try:
            if claims:
                self._run("hand_back", *[claim.key for claim in claims])
        finally:
            for claim in claims:
                self.let_go(claim)

    def let_go(self, claim: Claim) -> None:
        """Holds a claim no more; from any thread. If its job has not ended, it goes back at the next `renew`."""
        self._held.pop(claim.key, None)
        self._told.discard(claim.key)

    def retire(self) -> None:
        """Says that this worker is gone; what it still holds goes back."""
        self._run("retire", self._worker)

    def claim(self, models: Sequence[str], want: int, spare_after_s: float = 0.0) -> list[Claim]:
        """Starts at most `want` waiting jobs of these models and returns them; never blocks.

        High before normal before low; one of each model in turn, and within a queue one of each owner. None while a
        suspect runs. Jobs in an answer that is lost go back at the next `renew`.

        spare_after_s: none of a model of which no job has waited for so long; for workers that have enough to do.
        """
        if not models or want < 1 or any(claim.suspect for claim in list(self._held.values())):
            return []
        first = self._first % len(models)
        turns = [*models[first:], *models[:first]]
        executions = [uuid.uuid4().hex for _ in range(want)]
        asked = (SCHEMA, want, len(self._held), round(1e6 * spare_after_s), len(turns))
        claims = self._take(self._run("claim", self._worker, *asked, *turns, *executions))
        if claims:
            self._first = models.index(claims[-1].job.model) + 1
        return claims

    def commit(self, claim: Claim, status: Outcome, result: Result) -> bool:
        """Ends a claimed job, once its pictures are stored. May be repeated after QueueUnavailable.

        False: the fence fell (canceled, past its deadline, no longer ours); the caller deletes what it stored.
        """
        ending = encode(status, result)
        done = self._run(
            "commit", claim.job.id, claim.execution, RQ_STATUS[status], ending.outcome, ending.encoded,
            "" if result.expires_at is None else result.expires_at, round(1000 * result.gpu_seconds),
        )  # fmt: skip
        self.let_go(claim)
        return bool(done)

    def progress(self, progress: Mapping[Claim, Progress]) -> set[str]:
        """Notes how far jobs are, passing over those no longer ours; the keys of claims that somebody watches."""
        args = [part for c, p in progress.items() for part in (c.job.id, c.execution, p.step, p.steps)]
        return {key.decode() for key in self._run("progress", *args)} if args else set()

    def preview(self, claim: Claim, step: int, picture: bytes) -> None:
        """Shows to those who watch what a job looks like after a step: a small JPEG."""
        self._run("preview", claim.job.id, claim.execution, step, picture, PREVIEW_S)

    def canceled(self) -> set[str]:
        """Keys of our claims that should stop, told once each: canceled, past their deadline, or no longer ours."""
        ids = self._listener.take_stops()
        held = dict(self._held)
        stop = {key for key, claim in held.items() if key in self._stop or claim.job.id in ids}
        self._stop -= stop
        stop -= self._told
        self._told |= stop
        return stop

    def wait(self, timeout_s: float, spare_after_s: float = 0.0) -> None:
        """Returns when there may be something to claim or to stop, when woken, or when the time is up.

        spare_after_s: as for `claim`: of what is submitted, not before it may be claimed.
        """
        self._listener.wait(timeout_s, spare_after_s)

    def wake(self) -> None:
        """Ends a `wait`, from any thread."""
        self._listener.wake()

    def _take(self, rows: Sequence[Any]) -> list[Claim]:
        """The claims of the rows that claim.lua gives, one after the other; unreadable jobs fail."""
        claims = []
        for job_id, execution, data, enqueued_at, started_at, group in zip(*[iter(rows)] * 6, strict=True):
            claimed_at = read_time(started_at) or 0.0
            queued_s = max(0.0, claimed_at - (read_time(enqueued_at) or claimed_at))
            try:
                job = read_job(data)
            except SchemaUnknown:
                ending = encode("failed", Result(failure=UNREADABLE))
                with suppress(QueueUnavailable):  # then it goes back, and fails at the next claim
                    self._run("commit", job_id, execution, RQ_STATUS["failed"], ending.outcome, ending.encoded, "", 0)
                continue
            claims.append(Claim(job, execution.decode(), claimed_at, queued_s, suspect=bool(group)))
            self._held[claims[-1].key] = claims[-1]
        return claims

    def _run(self, transition: str, *args: str | bytes | float) -> Any:
        with reaching_redis():
            return self._scripts[transition](args=args)


class Listener:
    """Hears from Redis, in a thread of its own, that jobs were submitted or should stop."""

    def __init__(self, redis: redis.Redis, worker: str) -> None:
        self._redis = redis
        self._stop_channel = STOP + worker
        self._changed = threading.Condition()  # re-entrant: a signal's handler may wake whom it interrupts
        self._woken = False
        self._submitted: tuple[float, float] | None = None  # first and last news that no wait has ended for
        self._stops: set[str] = set()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def wait(self, timeout_s: float, spare_after_s: float) -> None:
        """Returns when something was heard since the last wait, or when the time is up.

        Of a submitted job `spare_after_s` later, and once for all that were submitted meanwhile.
        """
        self._start()
        end = time.monotonic() + timeout_s
        with self._changed:
            while not self._woken and (left := self._due(end, spare_after_s) - time.monotonic()) > 0:
                self._changed.wait(left)
            self._woken = False
            heard, before = self._submitted, time.monotonic() - spare_after_s
            if heard and heard[0] <= before:
                self._submitted = None if heard[1] <= before else (heard[1], heard[1])

    def wake(self) -> None:
        """Ends a wait."""
        with self._changed:
            self._woken = True
            self._changed.notify_all()

    def take_stops(self) -> set[str]:
        """The ids heard since the last call."""
        with self._changed:
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
                    self.wake()  # what was said before this cannot be heard: look
                    while not self._closed.is_set():
                        message = channel.get_message(timeout=LISTEN_S)
                        if message is not None:
                            self._hear(message)
            except (RedisError, OSError):
                self._closed.wait(LISTEN_S)

    def _hear(self, message: dict[str, Any]) -> None:
        with self._changed:
            if message["channel"].decode() == self._stop_channel:
                self._stops.add(message["data"].decode())
                self._woken = True
            else:
                now = time.monotonic()
                self._submitted = (self._submitted[0] if self._submitted else now, now)
            self._changed.notify_all()

    def _due(self, end: float, spare_after_s: float) -> float:
        return min(end, self._submitted[0] + spare_after_s) if self._submitted else end
