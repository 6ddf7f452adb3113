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
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from tests.conftest import Valkey
from tests.worker.jobs import make_job
from worker.contract.job import PRIORITIES, TERMINAL, Result, queue_name
from worker.contract.operations import Operations
from worker.contract.queue import JobQueue
from worker.contract.settings import ContractSettings
from worker.intake import Intake

MODELS = ("a", "b")
WORKERS = ("w0", "w1", "w2")
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
        self.submitted: dict[str, str] = {}  # queue, by id
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
            self.loop.close()
            self.client.close()

    @rule(target=jobs, model=st.sampled_from(MODELS), priority=st.sampled_from(PRIORITIES))
    def submit(self, model, priority):
        job = replace(make_job(model=model), priority=priority)
        self.loop.run_until_complete(self.queue.submit(job))
        self.submitted[job.id] = queue_name(model, priority)
        return job

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
        assert sum(waiting.values()) == sum(n for (job_id, queue), n in waiting.items() if job_id in self.submitted)

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
