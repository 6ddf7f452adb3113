"""Transitions in any order, against a real Valkey: no job is in two places or in none, and each life ends once."""

from __future__ import annotations

import asyncio
import contextlib
import json
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import redis
import redis.asyncio
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from tests.conftest import Valkey
from tests.worker.jobs import make_job
from worker.contract.errors import TooManyJobs
from worker.contract.job import PRIORITIES, TERMINAL, Result, Webhook, queue_name
from worker.contract.operations import Operations
from worker.contract.outbox import Outbox
from worker.contract.queue import Idempotency, JobQueue
from worker.contract.settings import ContractSettings
from worker.intake import Intake

MODELS = ("a", "b")
WORKERS = ("w0", "w1", "w2")
OWNERS = ("", "a", "b")
HOOK = Webhook(url="http://h", events=("started", "completed"))
MOST = 4  # jobs at once of owner "b"
ENDED = {b"succeeded", b"failed", b"canceled"}
NOT_COUNTED = 1000


class Transitions(RuleBasedStateMachine):
    """Three workers, a gateway, an operator, and whatever may befall them."""

    claims = Bundle("claims")  # what a worker believes to hold, rightly or not: (worker, claim)
    jobs = Bundle("jobs")

    @initialize()
    def start(self) -> None:
        self.client = redis.Redis.from_url(server().url)
        self.client.flushall()
        self.loop = asyncio.new_event_loop()
        configured = ContractSettings(redis_url=server().url)
        self.queue = JobQueue.connect(configured)
        self.operations = Operations.connect(configured)
        self.workers = {name: Intake.connect(configured, name) for name in WORKERS}
        self.outbox = Outbox(redis.asyncio.Redis.from_url(server().url))
        self.submitted: dict[str, str] = {}  # queue, by id
        self.owners: dict[str, str] = {}
        self.work: dict[str, int] = {}
        self.order: list[str] = []  # ids as they were accepted
        self.idempotent: dict[str, str] = {}  # id, by key
        self.committed: Counter[str] = Counter()  # in this life
        self.retried: Counter[str] = Counter()
        self.buried = 0

    def teardown(self) -> None:
        if not hasattr(self, "loop"):
            return
        try:
            self.run_what_is_left()
        finally:
            for worker in self.workers.values():
                worker.close()
            self.operations.close()
            self.loop.run_until_complete(self.queue.close())
            self.loop.run_until_complete(self.outbox.close())
            self.loop.close()
            self.client.close()

    def accept(self, job, **options):
        answer = self.run(self.queue.submit(job, **options))
        if not answer.replayed:
            self.submitted[job.id], self.owners[job.id] = job.queue, job.owner
            self.work[job.id] = job.pixel_steps
            self.order.append(job.id)
        return answer

    def run(self, call):
        return self.loop.run_until_complete(call)

    @rule(
        target=jobs, model=st.sampled_from(MODELS), priority=st.sampled_from(PRIORITIES), owner=st.sampled_from(OWNERS),
        steps=st.integers(1, 3), webhook=st.sampled_from((None, HOOK)),
    )  # fmt: skip
    def submit(self, model, priority, owner, steps, webhook):
        job = replace(make_job(model=model, steps=steps), priority=priority, owner=owner, webhook=webhook)
        active = self.client.scard(f"darkroom:active:{owner}")
        try:
            self.accept(job, max_active=MOST if owner == "b" else None)
        except TooManyJobs:
            assert (owner, active) == ("b", MOST)
            return multiple()
        return job

    @rule(target=jobs, key=st.sampled_from("xy"))
    def submit_with_a_key(self, key):
        job = make_job(model="a")
        answer = self.accept(job, idempotency=Idempotency("scope", key, "f"))
        assert answer.job_id == self.idempotent.setdefault(key, job.id)
        return multiple() if answer.replayed else job

    @rule(job=jobs)
    def submit_again(self, job):
        self.loop.run_until_complete(self.queue.submit(job))

    @rule(
        target=claims, name=st.sampled_from(WORKERS), models=st.sets(st.sampled_from(MODELS), min_size=1),
        want=st.integers(1, 5),
    )  # fmt: skip
    def claim(self, name, models, want):
        return multiple(*[(name, claim) for claim in self.workers[name].claim(sorted(models), want)])

    @rule(name=st.sampled_from(WORKERS))
    def claim_but_lose_the_answer(self, name):
        stranger = Intake(self.client, name)  # Redis takes it for the worker, which learns nothing
        stranger.claim(MODELS, 2)

    @rule(name=st.sampled_from(WORKERS))
    def renew(self, name):
        self.workers[name].renew(MODELS)
        self.workers[name].canceled()

    @rule(held=consumes(claims), status=st.sampled_from(("succeeded", "failed", "canceled")))
    def commit(self, held, status):
        name, claim = held
        if self.workers[name].commit(claim, status, Result()):
            self.committed[claim.job.id] += 1

    @rule(held=consumes(claims))
    def hand_back(self, held):
        name, claim = held
        self.workers[name].hand_back([claim])

    @rule(job=jobs)
    def cancel(self, job):
        self.loop.run_until_complete(self.queue.cancel(job.id))

    @rule(job=jobs)
    def miss_the_deadline(self, job):
        """Its deadline passes: meta is what Redis goes by."""
        meta = json.loads(self.client.hget(f"rq:job:{job.id}", "meta"))
        self.client.hset(f"rq:job:{job.id}", "meta", json.dumps(meta | {"deadline": 1.0}))

    @rule(job=jobs)
    def retry(self, job):
        if self.operations.retry(job.id).position is not None:
            self.retried[job.id] += 1
            self.committed[job.id] = 0

    @rule(model=st.sampled_from(MODELS))
    def purge(self, model):
        if model in self.operations.models():
            waiting = self.operations.waiting([model])
            assert self.operations.purge("queued", waiting) == len(waiting)

    @rule(job=consumes(jobs))
    def forget(self, job):
        assert self.run(self.queue.forget(job.id)) == (job.id in self.submitted)
        self.idempotent = {key: kept for key, kept in self.idempotent.items() if kept != job.id}
        if self.submitted.pop(job.id, None):
            del self.owners[job.id], self.work[job.id]
            self.order.remove(job.id)

    @rule(delivered=st.booleans())
    def send(self, delivered):
        for entry in self.run(self.outbox.due("s", 3, 0.0)):
            assert entry.job_id in self.submitted
            settle = self.outbox.done if delivered else self.outbox.dead
            self.run(settle(entry, {"status": 200}))

    @rule(name=st.sampled_from(WORKERS))
    def lapse(self, name):
        if self.client.zscore("darkroom:leases", name) is not None:
            self.client.zadd("darkroom:leases", {name: time.time() - 1})
        self.client.set("darkroom:reaped_at", time.time())

    @rule()
    def reap(self):
        self.loop.run_until_complete(self.queue.reap())

    @rule(name=st.sampled_from(WORKERS), limit=st.sampled_from((1, 3, NOT_COUNTED)))
    def bury(self, name, limit):
        self.workers[WORKERS[0]].bury(name, limit)

    @rule(name=st.sampled_from(WORKERS))
    def retire(self, name):
        self.workers[name].retire()

    @invariant()
    def every_job_is_in_one_place(self) -> None:
        if not getattr(self, "submitted", None):
            return
        waiting = Counter(
            (job_id.decode(), queue) for queue in set(self.submitted.values())
            for job_id in self.client.lrange(f"rq:queue:{queue}", 0, -1)
        )  # fmt: skip
        held = Counter(
            pair.decode() for key in self.client.keys("darkroom:held:*") for pair in self.client.smembers(key)
        )
        for job_id, queue in self.submitted.items():
            status, execution = self.client.hmget(f"rq:job:{job_id}", "status", "execution")
            told = [f[b"event"] for _, f in self.client.xrange(f"darkroom:events:{job_id}")]
            places = waiting[job_id, queue], sum(n for pair, n in held.items() if pair.startswith(job_id + ":"))
            if status == b"queued":
                assert places == (1, 0)
            elif status == b"started":
                assert places == (0, 1)
                assert held[f"{job_id}:{execution.decode()}"] == 1
            else:
                assert places == (0, 0)
            ended = self.retried[job_id] + (status not in (b"queued", b"started"))
            assert sum(event in ENDED for event in told) == ended
            assert self.committed[job_id] <= 1
        self.books_are_true()
        assert sum(waiting.values()) == sum(n for (job_id, queue), n in waiting.items() if job_id in self.submitted)

    def books_are_true(self) -> None:
        """What is kept beside the jobs follows from the jobs."""
        kept = self.client
        status = {job_id: kept.hget(f"rq:job:{job_id}", "status") for job_id in self.submitted}
        open_ = {job_id for job_id in status if status[job_id] in (b"queued", b"started")}
        assert {job_id.decode() for job_id in kept.hkeys("darkroom:open")} == open_
        assert {job_id.decode() for job_id in kept.zrange("darkroom:deadlines", 0, -1)} == open_
        load: Counter[str] = Counter()
        for owner in OWNERS:
            mine = {job_id for job_id in status if self.owners[job_id] == owner}
            assert {job_id.decode() for job_id in kept.zrange(f"darkroom:owner:{owner}", 0, -1)} == mine
            assert {job_id.decode() for job_id in kept.smembers(f"darkroom:active:{owner}")} == mine & open_
            assert len(mine & open_) <= MOST or owner != "b" or any(self.retried[job_id] for job_id in mine)
        for job_id in open_:
            queue = self.submitted[job_id]
            place, names = (
                (("waiting", "jobs"), queue)
                if status[job_id] == b"queued"
                else (("running", "runs"), queue.split(".")[1])
            )
            load[f"{place[0]}:{names}"] += self.work[job_id]
            load[f"{place[1]}:{names}"] += 1
        assert {name.decode(): int(value) for name, value in kept.hgetall("darkroom:load").items()} == load
        for queue in {queue_name(model, priority) for model in MODELS for priority in PRIORITIES}:
            lines = {owner: self.line(queue, owner) for owner in OWNERS}
            listed = [job_id.decode() for job_id in kept.lrange(f"rq:queue:{queue}", 0, -1)]
            assert sorted(job_id for line in lines.values() for job_id in line) == sorted(listed)
            turns = {owner.decode() for owner in kept.zrange(f"darkroom:turns:{queue}", 0, -1)}
            assert turns == {owner for owner, line in lines.items() if line}
            for owner, line in lines.items():
                assert all(self.owners[job_id] == owner for job_id in line)
                first = [job_id for job_id in line if not self.retried[job_id]]
                assert first == [job_id for job_id in self.order if job_id in first]  # first come, first served

    def line(self, queue, owner):
        return [job_id.decode() for job_id in self.client.zrange(f"darkroom:line:{queue}:{owner}", 0, -1)]

    def run_what_is_left(self) -> None:
        """Whatever happened before, a worker that lives gets all that has not ended, and ends it."""
        last = self.workers[WORKERS[0]]
        for name in WORKERS:
            last.bury(name, NOT_COUNTED)
        for claim in list(last._held.values()):  # it was buried itself, and forgets what it believed
            last.hand_back([claim])
        with contextlib.suppress(StopIteration):
            while claims := last.claim(MODELS, 5):
                for claim in claims:
                    if last.commit(claim, "succeeded", Result()):
                        self.committed[claim.job.id] += 1
        for job_id in self.submitted:
            view = self.loop.run_until_complete(self.queue.view(job_id))
            assert view.status in TERMINAL
        self.every_job_is_in_one_place()
        assert self.client.exists("darkroom:load", "darkroom:rounds", "darkroom:open") == 0


_SERVERS: list[Valkey] = []


def server() -> Valkey:
    """One Valkey for all examples, started at the first."""
    if not _SERVERS:
        _SERVERS.append(Valkey(Path(tempfile.mkdtemp(prefix="darkroom-machine-"))))
        _SERVERS[0].start()
    return _SERVERS[0]


def teardown_module() -> None:
    for running in _SERVERS:
        running.stop()
    _SERVERS.clear()


TestTransitions = Transitions.TestCase
TestTransitions.settings = settings(
    max_examples=40, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
