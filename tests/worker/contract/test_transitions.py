"""Our transitions beside RQ's own code, run on a twin of the same job: the same keys, the same fields."""

from __future__ import annotations

import json
import re
import signal
from base64 import b64decode

import pytest
import redis
from rq import Queue as RQQueue
from rq import SimpleWorker
from rq.job import Job as RQJob
from rq.registry import (
    CanceledJobRegistry,
    FailedJobRegistry,
    FinishedJobRegistry,
    StartedJobRegistry,
    clean_registries,
)
from rq.serializers import JSONSerializer

from worker.contract.job import Failure, Result
from worker.contract.record import RecordWriter

LIFETIME_S = 1000
OURS = {b"execution", b"outcome"}
TIME = re.compile(rb"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z|\d{10}\.\d+")


class RQSide:
    """A job that RQ's own queue and worker take through its life, in a database beside ours."""

    def __init__(self, url):
        self.client = redis.Redis.from_url(url.replace("/0", "/1"))

    def enqueue(self, job):
        self.queue = RQQueue(job.queue, connection=self.client, serializer=JSONSerializer)
        self.job = RecordWriter(LIFETIME_S).twin(job)
        self.job.connection = self.client
        self.queue.enqueue_job(self.job)

    def start(self):
        self.worker = SimpleWorker([self.queue], connection=self.client, name="w1", serializer=JSONSerializer)
        self.client.lpop(self.queue.key)
        self.execution = self.worker.prepare_execution(self.job)
        self.worker.prepare_job_execution(self.job)

    def finish(self, value):
        self.worker._finalize_success(self.job, self.queue, self.execution, value)

    def fail(self, text):
        self.worker.handle_execution_ended(self.job, self.queue, 60)
        self.worker.handle_job_failure(self.job, self.queue, exc_string=text, execution=self.execution)


@pytest.fixture
def rq_side(redis_url):
    side = RQSide(redis_url)
    yield side
    side.client.close()


def snapshot(client):
    """Every key of RQ's with its type, value and whether it expires; times and execution ids made alike."""

    def alike(value):
        return TIME.sub(b"TIME", re.sub(rb"\b[0-9a-f]{32}\b", b"EXECUTION", value))

    def content(key, kind):
        if kind == b"hash":
            return {name: alike(value) for name, value in client.hgetall(key).items() if name not in OURS}
        if kind == b"zset":
            return [alike(member) for member in client.zrange(key, 0, -1)]
        if kind == b"set":
            return {alike(member) for member in client.smembers(key)}
        if kind == b"list":
            return client.lrange(key, 0, -1)
        return [{name: alike(value) for name, value in row.items()} for _, row in client.xrange(key)]

    found = {}
    for key in client.keys("rq:*"):
        if key != b"rq:worker:w1":  # RQ's record of its worker; Darkroom keeps its own of ours
            kind = client.type(key)
            found[alike(key)] = (kind, content(key, kind), client.ttl(key) > 0)
    return found


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for key in theirs:
        assert ours[key] == theirs[key], key


async def test_submit_writes_what_rq_enqueue_writes(queue, rq_side, make_job, client):
    job = make_job()
    rq_side.enqueue(job)
    await queue.submit(job)
    assert_same(snapshot(client), snapshot(rq_side.client))


async def test_claim_writes_what_rq_prepare_execution_writes(queue, intake, rq_side, make_job, client):
    job = make_job()
    rq_side.enqueue(job)
    rq_side.start()
    await queue.submit(job)
    intake.claim(["demo"], 1)
    assert_same(snapshot(client), snapshot(rq_side.client))


async def test_commit_of_a_success_writes_what_rq_writes(queue, intake, rq_side, make_job, client):
    job, result = make_job(), Result(warnings=("w",))
    rq_side.enqueue(job)
    rq_side.start()
    rq_side.finish({"w": 1})
    await queue.submit(job)
    (claim,) = intake.claim(["demo"], 1)
    intake.commit(claim, "succeeded", result)
    ours, theirs = snapshot(client), snapshot(rq_side.client)
    key = f"rq:results:{job.id}".encode()
    (our_row,), (their_row,) = ours[key][1], theirs[key][1]
    assert b64decode(our_row.pop(b"return_value")).decode() == result.to_json()
    assert b64decode(their_row.pop(b"return_value")) == b'{"w": 1}'
    assert_same(ours, theirs)


async def test_commit_of_a_failure_writes_what_rq_writes(queue, intake, rq_side, make_job, client):
    job = make_job()
    rq_side.enqueue(job)
    rq_side.start()
    rq_side.fail("out_of_memory: too large")
    await queue.submit(job)
    (claim,) = intake.claim(["demo"], 1)
    intake.commit(claim, "failed", Result(failure=Failure(code="out_of_memory", message="too large")))
    ours, theirs = snapshot(client), snapshot(rq_side.client)
    theirs[f"rq:job:{job.id}".encode()][1].pop(b"exc_info", None)  # the old place; ours is in the results alone
    assert_same(ours, theirs)


async def test_cancel_of_a_queued_job_writes_what_rq_writes(queue, rq_side, make_job, client):
    job = make_job()
    rq_side.enqueue(job)
    rq_side.job.cancel()
    await queue.submit(job)
    await queue.cancel(job.id)
    ours, theirs = snapshot(client), snapshot(rq_side.client)
    key = f"rq:job:{job.id}".encode()
    assert ours[key][2]  # RQ keeps canceled jobs for ever
    assert ours[key][1].pop(b"ended_at") == b"TIME"
    theirs[key][1].pop(b"ended_at")
    theirs[key] = (*theirs[key][:2], True)
    assert_same(ours, theirs)


async def test_rq_reads_a_finished_job_and_its_return_value(queue, intake, make_job, client):
    job, result = make_job(), Result(warnings=("w",), timings={"decode": 0.25})
    await queue.submit(job)
    (claim,) = intake.claim(["demo"], 1)
    intake.commit(claim, "succeeded", result)
    read = RQJob.fetch(job.id, connection=client, serializer=JSONSerializer)
    assert read.is_finished
    assert read.args[0] == job.to_payload()
    assert read.return_value()["timings"] == {"decode": 0.25}
    assert read.started_at.timestamp() == pytest.approx(claim.claimed_at)
    assert read.latest_result().execution_id == claim.execution
    assert job.id in FinishedJobRegistry(job.queue, connection=client)


async def test_rq_reads_why_a_job_failed(queue, intake, make_job, client):
    job = make_job()
    await queue.submit(job)
    (claim,) = intake.claim(["demo"], 1)
    intake.commit(claim, "failed", Result(failure=Failure(code="out_of_memory", message="too large")))
    read = RQJob.fetch(job.id, connection=client, serializer=JSONSerializer)
    assert (read.is_failed, read.latest_result().exc_string) == (True, "out_of_memory: too large")
    assert job.id in FailedJobRegistry(job.queue, connection=client)


async def test_rq_cleaning_its_registries_leaves_our_jobs_alone(queue, intake, make_job, client):
    jobs = [make_job() for _ in range(4)]
    for job in jobs:
        await queue.submit(job)
    running, done, failed = intake.claim(["demo"], 3)
    intake.commit(done, "succeeded", Result())
    intake.commit(failed, "failed", Result())
    await queue.cancel(jobs[3].id)
    clean_registries(RQQueue(jobs[0].queue, connection=client, serializer=JSONSerializer))
    assert StartedJobRegistry(jobs[0].queue, connection=client).get_job_ids() == [running.job.id]
    assert CanceledJobRegistry(jobs[0].queue, connection=client).get_job_ids() == [jobs[3].id]
    assert [(await queue.view(job.id)).status for job in jobs] == ["running", "succeeded", "failed", "canceled"]
    assert intake.commit(running, "succeeded", Result())


@pytest.fixture
def signals_kept():
    """RQ's worker leaves its own handlers behind."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("signals_kept")
async def test_stock_worker_of_rq_fails_a_job_with_one_clear_sentence(queue, make_job, client):
    job = make_job()
    await queue.submit(job)
    stock = SimpleWorker([job.queue], connection=client, serializer=JSONSerializer)
    stock.work(burst=True, logging_level="CRITICAL")
    read = RQJob.fetch(job.id, connection=client, serializer=JSONSerializer)
    assert f"job {job.id} needs a Darkroom worker" in read.latest_result().exc_string
    view = await queue.view(job.id)
    assert (view.status, view.result.failure.code) == ("failed", "internal_error")


async def test_no_prompt_is_in_what_rq_logs(queue, make_job, client):
    job = make_job()
    await queue.submit(job)
    description = client.hget(f"rq:job:{job.id}", "description").decode()
    assert job.params.prompt not in description


@pytest.mark.parametrize("ending", ["succeeded", "failed", "canceled", "canceled while queued", "deadline"])
async def test_ended_job_leaves_only_keys_that_expire(queue, intake, make_job, client, ending):
    job = make_job(deadline=1.0) if ending == "deadline" else make_job()
    await queue.submit(job)
    if ending in ("succeeded", "failed", "canceled"):
        (claim,) = intake.claim(["demo"], 1)
        assert intake.commit(claim, ending, Result())
    elif ending == "deadline":
        await queue.view(job.id)
    else:
        await queue.cancel(job.id)
    keys = set(client.keys())
    of_job = {key for key in keys if job.id.encode() in key}
    kept = {b"rq:job:", b"darkroom:events:"} | ({b"rq:results:"} if "canceled" not in ending else set())
    assert of_job == {prefix + job.id.encode() for prefix in kept}
    assert all(0 < client.ttl(key) <= LIFETIME_S for key in of_job)
    registry = re.compile(rb"rq:(finished|failed|canceled):darkroom\.demo\.normal")
    assert {key for key in keys - of_job if not registry.fullmatch(key)} <= {
        b"rq:queues",
        b"darkroom:ended",
        b"darkroom:leases",
        b"darkroom:owner:",
        b"darkroom:pictures",
        b"darkroom:records",
        *client.keys("darkroom:usage:*"),
    }
    assert LIFETIME_S < client.ttl("darkroom:owner:") < LIFETIME_S + 2 * 86_400
    assert all(client.ttl(key) > 0 for key in client.keys("darkroom:usage:*"))


async def test_records_and_registries_of_a_model_that_ends_no_more_jobs_are_let_go_of(queue, make_job, client):
    jobs = [make_job() for _ in range(3)]
    for job in jobs:
        await queue.submit(job)
        await queue.cancel(job.id)
    for job in jobs[:2]:
        client.delete(f"rq:job:{job.id}")
        client.zadd("darkroom:records", {f"{job.queue} {job.id}": 1})
    await queue.reap()
    assert client.zrange("darkroom:records", 0, -1) == [f"{jobs[2].queue} {jobs[2].id}".encode()]
    assert client.zrange(f"rq:canceled:{jobs[0].queue}", 0, -1) == [jobs[2].id.encode()]


async def test_registries_forget_jobs_whose_records_are_gone(queue, make_job, client):
    for registry in ("finished", "failed"):
        client.zadd(f"rq:{registry}:darkroom.demo.normal", {"old": 1})
    client.zadd("rq:canceled:darkroom.demo.normal", {"old": 1})
    canceled, late = make_job(), make_job(deadline=1.0)
    await queue.submit(canceled)
    await queue.cancel(canceled.id)
    await queue.submit(late)
    await queue.view(late.id)
    assert client.zrange("rq:canceled:darkroom.demo.normal", 0, -1) == [canceled.id.encode()]
    assert client.zrange("rq:failed:darkroom.demo.normal", 0, -1) == [late.id.encode()]


async def test_job_ended_by_a_tool_of_rq_expires_after_its_deadline(queue, make_job, client):
    job = make_job()
    await queue.submit(job)
    RQJob.fetch(job.id, connection=client, serializer=JSONSerializer).cancel()
    client.zadd("darkroom:deadlines", {job.id: 1})
    await queue.reap()
    assert 0 < client.ttl(f"rq:job:{job.id}") <= LIFETIME_S
    assert client.zcard("darkroom:deadlines") == 0


@pytest.mark.parametrize("how", ["renew", "commit"])
async def test_running_job_ended_by_a_tool_of_rq_counts_for_nobody_once_its_worker_says_something(
    queue, intake, make_job, client, how
):
    job = make_job()
    await queue.submit(job)
    (claim,) = intake.claim(["demo"], 1)
    RQJob.fetch(job.id, connection=client, serializer=JSONSerializer).cancel()
    if how == "renew":
        intake.renew(["demo"])
    else:
        intake.commit(claim, "succeeded", Result())
    assert client.exists("darkroom:open", f"darkroom:active:{job.owner}", "darkroom:deadlines") == 0
    assert 0 < client.ttl(f"rq:job:{job.id}") <= LIFETIME_S


async def test_job_put_back_with_tools_of_rq_runs_again_with_no_past(queue, intake, make_job, client):
    job = make_job()
    await queue.submit(job)
    (claim,) = intake.claim(["demo"], 1)
    intake.commit(claim, "failed", Result(failure=Failure(code="out_of_memory", message="too large")))
    FailedJobRegistry(job.queue, connection=client, serializer=JSONSerializer).requeue(job.id)
    (again,) = intake.claim(["demo"], 1)
    assert again.job == job
    assert client.ttl(f"rq:job:{job.id}") == -1
    assert not intake.commit(claim, "succeeded", Result(warnings=("stale",)))
    assert intake.commit(again, "succeeded", Result())
    assert (await queue.view(job.id)).result == Result()


async def test_deadline_that_is_looked_at_too_soon_is_not_lost(queue, make_job, client):
    job = make_job()
    await queue.submit(job)
    client.zadd("darkroom:deadlines", {job.id: 1.0})  # as of an earlier life, or rounded down
    await queue.reap()
    assert client.hget(f"rq:job:{job.id}", "status") == b"queued"
    assert client.zscore("darkroom:deadlines", job.id) == pytest.approx(job.deadline, abs=1e-5)
    meta = json.loads(client.hget(f"rq:job:{job.id}", "meta"))
    client.hset(f"rq:job:{job.id}", "meta", json.dumps(meta | {"deadline": 1.0}))
    client.zadd("darkroom:deadlines", {job.id: 1.0})
    await queue.reap()
    assert client.hget(f"rq:job:{job.id}", "status") == b"failed"


async def test_job_that_a_tool_of_rq_s_moved_leaves_nothing_with_its_first_queue(queue, intake, make_job, client):
    job = make_job()
    await queue.submit(job)
    moved = RQJob.fetch(job.id, connection=client, serializer=JSONSerializer)
    RQQueue("darkroom.demo.normal", connection=client, serializer=JSONSerializer).remove(moved)
    RQQueue("darkroom.demo.high", connection=client, serializer=JSONSerializer).enqueue_job(moved)
    (claim,) = intake.claim(["demo"], 1)
    assert intake.commit(claim, "succeeded", Result())
    assert client.keys("rq:wip:*") == []
