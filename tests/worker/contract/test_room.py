"""A Redis that is nearly full forgets ended jobs before their time, the oldest first, so that it takes new ones."""

from __future__ import annotations

import json
import time

import pytest
from rq.job import Job as RQJob
from rq.serializers import JSONSerializer

from worker.contract import transitions
from worker.contract.job import Failure, Result, Webhook
from worker.contract.operations import Operations
from worker.contract.queue import Idempotency, JobQueue
from worker.contract.settings import ContractSettings

LIFETIME_S = 604_800
HOUR_S = 3600


@pytest.fixture
def redis_url(own_valkey):
    """A server of each test's own, whose memory it may bound."""
    return own_valkey.url


@pytest.fixture
def settings(redis_url):
    return ContractSettings(redis_url=redis_url, record_lifetime_s=LIFETIME_S, queue_bound=1000)


@pytest.fixture
def bound(client):
    """Bounds Redis' memory, of which it uses the given share now."""
    return lambda share: client.config_set("maxmemory", int(client.info("memory")["used_memory"] / share))


@pytest.fixture
def ended(queue, intake, make_job, age):
    """A job that ended so many seconds ago."""

    async def make(seconds, status="succeeded", **fields):
        job = make_job(**fields)
        await queue.submit(job)
        if status == "canceled":
            await queue.cancel(job.id)
        else:
            (claim,) = intake.claim([job.model], 1)
            failure = Failure(code="x", message="y") if status == "failed" else None
            intake.commit(claim, status, Result(failure=failure, expires_at=9e9))
        age(job, seconds)
        return job

    return make


@pytest.fixture
def age(client):
    """Lets a job have ended so many seconds ago."""
    return lambda job, seconds: client.zadd("darkroom:records", {f"{job.queue} {job.id}": time.time() - seconds})


@pytest.fixture
def there(client):
    """Which of some jobs have a record."""
    return lambda *jobs: [bool(client.exists(f"rq:job:{job.id}")) for job in jobs]


async def test_oldest_go_first_however_they_ended(queue, ended, bound, there, client):
    jobs = [
        await ended(HOUR_S * (days + 2), status, priority=priority)
        for days, (status, priority) in enumerate(
            [("succeeded", "low"), ("failed", "high"), ("canceled", "normal"), ("succeeded", "normal")]
        )
    ]
    filler = [await ended(HOUR_S * 100) for _ in range(98)]
    bound(0.9)
    await queue.reap()
    assert there(*jobs) == [True, True, False, False]
    assert not any(there(*filler))
    assert (await queue.survey()).dropped == 100
    assert client.zcard("rq:finished:darkroom.demo.normal") == 0


async def test_nothing_goes_while_there_is_room(queue, ended, bound, there):
    job = await ended(HOUR_S * 2)
    await queue.reap()
    bound(0.7)
    await queue.reap()
    assert there(job) == [True]
    assert (await queue.survey()).dropped == 0


async def test_what_ended_within_the_hour_waits_or_runs_stays(queue, intake, ended, bound, there, make_job):
    fresh = await ended(HOUR_S - 5)
    running, waiting = make_job(), make_job()
    await queue.submit(running)
    assert len(intake.claim(["demo"], 1)) == 1
    await queue.submit(waiting)
    bound(0.99)
    await queue.reap()
    assert there(fresh, running, waiting) == [True, True, True]


async def test_job_stays_until_its_webhook_was_told_of_its_end_and_shields_no_other(queue, ended, bound, there, client):
    webhook = Webhook(url="http://receiver/", events=("completed",))
    owed = [await ended(HOUR_S * 3, webhook=webhook) for _ in range(120)]
    told, other = await ended(HOUR_S * 2, webhook=webhook), await ended(HOUR_S * 2)
    client.zrem("darkroom:outbox", f"{told.id}:completed")
    bound(0.9)
    for _ in range(2):
        await queue.reap()
    assert all(there(*owed))
    assert there(told, other) == [False, False]


async def test_job_that_a_tool_of_rq_s_started_again_stays(queue, ended, bound, there, client):
    job = await ended(HOUR_S * 2, "failed")
    client.hset(f"rq:job:{job.id}", "status", "queued")
    bound(0.9)
    await queue.reap()
    assert there(job) == [True]


async def test_job_that_was_retried_stays(queue, ended, bound, there, settings):
    job = await ended(HOUR_S * 2, "failed")
    with Operations.connect(settings) as operations:
        operations.retry(job.id)
    bound(0.9)
    await queue.reap()
    assert there(job) == [True]


async def test_nothing_goes_because_a_replica_lags(queue, ended, there, client):
    """Redis itself does not count such buffers; of a real one they cannot be made at will."""
    job, script = await ended(HOUR_S * 2), transitions.script("reap")
    client.config_set("maxmemory", 2 * client.info("memory")["used_memory"])
    used = int(client.info("memory")["used_memory"])
    told = f"'# Memory\\r\\nused_memory:{4 * used}\\r\\nmem_not_counted_for_evict:{3 * used}\\r\\nmaxmemory:{2 * used}'"
    client.eval(script.replace("redis.pcall('INFO', 'memory')", told), 0, 10)
    assert there(job) == [True]


async def test_user_of_redis_who_may_not_ask_for_its_memory_may_do_all_else(own_valkey, settings, make_job, client):
    client.execute_command("ACL", "SETUSER", "plain", "on", ">s", "~*", "&*", "+@all", "-@dangerous")
    url = own_valkey.url.replace("redis://", "redis://plain:s@")
    queue = JobQueue.connect(settings.model_copy(update={"redis_url": url}))
    await queue.submit(make_job())
    await queue.reap()
    assert (await queue.survey()).memory == (0, 0)
    await queue.close()


async def test_pictures_of_a_forgotten_job_are_deleted_soon(queue, ended, bound, client):
    job = await ended(HOUR_S * 2)
    bound(0.9)
    await queue.reap()
    now, _ = client.time()
    assert client.zscore("darkroom:pictures", job.id) == pytest.approx(now + 600, abs=30)


async def test_idempotency_key_of_a_forgotten_job_is_free_again(queue, intake, bound, make_job, client, age):
    once = Idempotency("a /v1/generations", "k", "f" * 64)
    job, again = make_job(), make_job()
    await queue.submit(job, idempotency=once)
    (claim,) = intake.claim(["demo"], 1)
    intake.commit(claim, "succeeded", Result())
    age(job, 2 * HOUR_S)
    bound(0.9)
    await queue.reap()
    client.config_set("maxmemory", 0)
    accepted = await queue.submit(again, idempotency=once)
    assert (accepted.job_id, accepted.replayed) == (again.id, False)


async def test_room_is_made_again_and_again_until_there_is_enough(queue, ended, bound, client, make_job):
    jobs = [await ended(HOUR_S * 2) for _ in range(250)]
    before = client.info("memory")["used_memory"]
    bound(0.76)
    while client.info("memory")["used_memory"] > 0.75 * client.info("memory")["maxmemory"]:
        left = client.zcard("rq:finished:darkroom.demo.normal")
        await queue.reap()
        assert client.zcard("rq:finished:darkroom.demo.normal") < left
    assert client.info("memory")["used_memory"] < before
    assert 0 < (await queue.survey()).dropped <= len(jobs)


async def test_records_that_expired_leave_their_registry(queue, ended, bound, client):
    gone, stays = await ended(HOUR_S * 2), await ended(5)
    client.delete(f"rq:job:{gone.id}")
    bound(0.9)
    await queue.reap()
    assert client.zrange("rq:finished:darkroom.demo.normal", 0, -1) == [stays.id.encode()]


async def test_queues_of_others_on_the_same_redis_are_left_alone(queue, ended, bound, client):
    await ended(HOUR_S * 2)
    client.sadd("rq:queues", "rq:queue:mail")
    client.hset("rq:job:letter", mapping={"status": "finished", "result_ttl": LIFETIME_S})
    client.expire("rq:job:letter", 100)
    client.zadd("rq:finished:mail", {"letter": 1})
    bound(0.9)
    await queue.reap()
    assert client.exists("rq:job:letter")


async def test_survey_tells_of_the_memory(queue, client, bound):
    assert (await queue.survey()).memory[1] == 0
    bound(0.5)
    used, most = (await queue.survey()).memory
    assert most == client.info("memory")["maxmemory"]
    assert 0 < used < most


async def test_jobs_that_are_not_ours_are_left_alone(queue, ended, bound, there, client):
    job = await ended(HOUR_S * 2)
    client.hset(f"rq:job:{job.id}", "meta", json.dumps({"from": "elsewhere"}))
    bound(0.9)
    await queue.reap()
    assert there(job) == [True]


async def test_job_that_a_tool_of_rq_s_ended_goes_too(queue, make_job, bound, there, client, age):
    job = make_job()
    await queue.submit(job)
    RQJob.fetch(job.id, connection=client, serializer=JSONSerializer).cancel()
    client.zadd("darkroom:deadlines", {job.id: 1.0})
    await queue.reap()
    assert there(job) == [True]
    assert client.zscore("darkroom:records", f"{job.queue} {job.id}")
    age(job, HOUR_S * 2)
    bound(0.9)
    await queue.reap()
    assert there(job) == [False]
