"""The operator's verbs against a real Valkey, and what RQ's own classes see afterwards."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest
import redis
from rq import Queue as RQQueue
from rq.job import Job as RQJob
from rq.registry import CanceledJobRegistry, FailedJobRegistry, StartedJobRegistry
from rq.serializers import JSONSerializer

from tests.worker.contract.test_queue import card
from worker.contract import transitions
from worker.contract.errors import ModelDraining, QueueUnavailable, UnknownGeneration, UnknownModel
from worker.contract.job import SCHEMA, Failure, Result
from worker.contract.operations import Operations
from worker.contract.queue import JobQueue

DEMO = "darkroom.demo.normal"
BROKEN = Result(failure=Failure(code="out_of_memory", message="too large"))


@pytest.fixture
def operations(settings):
    with Operations.connect(settings) as operations:
        yield operations


async def submit(queue, *jobs):
    for job in jobs:
        await queue.submit(job)
    return jobs[0] if len(jobs) == 1 else jobs


async def fail(queue, intake, job, result=BROKEN):
    await queue.submit(job)
    (claim,) = intake.claim([job.model], 1)
    assert intake.commit(claim, "failed", result)
    return claim


async def events_of(client, job):
    return [fields[b"event"].decode() for _, fields in client.xrange(f"darkroom:events:{job.id}")]


def rq_queue(client, name=DEMO):
    return RQQueue(name, connection=client, serializer=JSONSerializer)


def model_status(operations, name="demo"):
    return next(model for model in operations.status().models if model.model == name)


def queue_status(operations, priority="normal"):
    return next(queue for queue in model_status(operations).queues if queue.priority == priority)


# status


def test_status_of_an_empty_redis_is_empty(operations):
    status = operations.status()
    assert (status.models, status.workers) == ((), ())


async def test_status_counts_jobs_by_model_and_priority(operations, queue, intake, make_job):
    intake.publish([card("cold")])
    failed, succeeded, canceled = make_job(), make_job(), make_job()
    await fail(queue, intake, failed)
    await submit(queue, succeeded)
    (claim,) = intake.claim(["demo"], 1)
    intake.commit(claim, "succeeded", Result())
    await submit(queue, canceled)
    await queue.cancel(canceled.id)
    await submit(queue, make_job(), make_job(), make_job(), make_job(priority="high"))
    intake.claim(["demo"], 2)
    assert [model.model for model in operations.status().models] == ["cold", "demo"]
    high, normal, low = model_status(operations).queues
    assert (high.waiting, high.running) == (0, 1)
    assert (normal.waiting, normal.running) == (2, 1)
    assert (normal.succeeded, normal.failed, normal.canceled) == (1, 1, 1)
    assert (low.waiting, low.running, low.oldest_s) == (0, 0, None)
    assert (model_status(operations).waiting, model_status(operations).running) == (2, 2)


async def test_status_agrees_with_the_registries_of_rq(operations, queue, intake, make_job, client):
    await fail(queue, intake, make_job())
    await submit(queue, make_job(), make_job(), make_job())
    intake.claim(["demo"], 1)
    seen = queue_status(operations)
    theirs = rq_queue(client)
    assert seen.waiting == theirs.count
    assert seen.running == theirs.started_job_registry.get_job_count(cleanup=False)
    assert seen.failed == theirs.failed_job_registry.get_job_count(cleanup=False)


async def test_status_says_how_long_the_oldest_job_waits(operations, queue, make_job, client):
    old, young = make_job(), make_job()
    await submit(queue, old, young)
    then = RQJob.fetch(old.id, connection=client, serializer=JSONSerializer).enqueued_at.timestamp() - 90
    moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(then))
    client.hset(f"rq:job:{old.id}", "enqueued_at", f"{moment}.000000Z")
    assert 89 < queue_status(operations).oldest_s < 120


async def test_status_tells_suspects_apart_from_others_that_wait(operations, queue, make_intake, make_job):
    await submit(queue, make_job(), make_job())
    make_intake("dead").claim(["demo"], 2)
    await submit(queue, make_job())
    make_intake("undertaker").bury("dead", 3)
    seen = queue_status(operations)
    assert (seen.waiting, seen.suspects) == (3, 2)


async def test_status_shows_each_worker_with_its_lease_and_its_jobs(operations, queue, make_intake, make_job, client):
    await submit(queue, make_job(), make_job())
    one, two = make_intake("one"), make_intake("two")
    one.renew(["demo", "other"])
    one.claim(["demo"], 2)
    two.renew([])
    client.zadd("darkroom:leases", {"two": time.time() - 30})
    first, second = operations.status().workers
    assert (first.worker, first.models, first.held) == ("one", ("demo", "other"), 2)
    assert 0 < first.lease_left_s <= 6
    assert 0 <= first.heard_s < 5
    assert (second.worker, second.models, second.held, second.heard_s) == ("two", (), 0, None)
    assert second.lease_left_s < -20


async def test_status_passes_over_jobs_whose_records_are_gone(operations, queue, make_job, client):
    await submit(queue, make_job())
    client.zadd(f"rq:failed:{DEMO}", {"gone": time.time() - 1})
    client.zadd(f"rq:canceled:{DEMO}", {"gone": time.time() - 2000})
    seen = queue_status(operations)
    assert (seen.failed, seen.canceled) == (0, 0)


async def test_status_passes_over_queues_of_other_applications(operations, queue, make_job, client):
    await submit(queue, make_job(model="sd3.5-large"))
    RQQueue("mail", connection=client, serializer=JSONSerializer).enqueue("mail.send")
    RQQueue("darkroom.mail", connection=client, serializer=JSONSerializer).enqueue("mail.send")
    assert operations.models() == ["sd3.5-large"]


async def test_status_changes_nothing(operations, queue, intake, make_job, client):
    await submit(queue, make_job(), make_job(deadline=1.0))
    intake.claim(["demo"], 1)
    before = {key: client.dump(key) for key in client.scan_iter()}
    operations.status()
    assert {key: client.dump(key) for key in client.scan_iter()} == before


# pause, drain, resume


async def test_paused_model_is_not_claimed_and_its_running_jobs_go_on(operations, queue, intake, make_job):
    running, waiting = await submit(queue, make_job(), make_job())
    (claim,) = intake.claim(["demo"], 1)
    operations.pause(["demo"])
    assert intake.claim(["demo"], 1) == []
    assert intake.commit(claim, "succeeded", Result())
    await submit(queue, make_job(model="other"))
    assert [claim.job.model for claim in intake.claim(["demo", "other"], 5)] == ["other"]
    assert [(await queue.view(job.id)).status for job in (running, waiting)] == ["succeeded", "queued"]
    assert (model_status(operations).paused, model_status(operations, "other").paused) == (True, False)


async def test_suspects_of_a_paused_model_do_not_start_with_their_group(operations, queue, make_intake, make_job):
    jobs = [make_job(model=model) for model in ("a", "b", "a", "b")]
    await submit(queue, *jobs)
    make_intake("dead").claim(["a", "b"], 4)
    undertaker = make_intake("undertaker")
    undertaker.bury("dead", 3)
    operations.pause(["a"])
    started = [undertaker.claim(["a", "b"], 4), make_intake("other").claim(["a", "b"], 4)]
    assert sorted(claim.job.model for claims in started for claim in claims) == ["b", "b"]
    operations.resume(["a"])
    assert {claim.job.model for claim in make_intake("third").claim(["a", "b"], 4)} == {"a"}


async def test_resumed_model_is_claimed_again_and_workers_are_woken(operations, queue, intake, make_job, client):
    job = await submit(queue, make_job())
    operations.pause(["demo"])
    with client.pubsub(ignore_subscribe_messages=True) as channel:
        channel.subscribe("darkroom:submitted")
        channel.get_message(timeout=5)
        operations.resume(["demo"])
        assert channel.get_message(timeout=5)["data"] == b"demo"
    assert [claim.job.id for claim in intake.claim(["demo"], 1)] == [job.id]


async def test_draining_model_refuses_new_jobs_and_does_those_that_wait(operations, queue, intake, make_job):
    waiting = await submit(queue, make_job())
    operations.drain(["demo"])
    refused = make_job()
    with pytest.raises(ModelDraining, match="'demo' is being drained") as caught:
        await queue.submit(refused)
    assert caught.value.retry_after_s > 0
    with pytest.raises(UnknownGeneration):
        await queue.view(refused.id)
    assert (await queue.submit(waiting)).position == 0  # accepted before
    await submit(queue, make_job(model="other"))
    assert [claim.job.id for claim in intake.claim(["demo"], 5)] == [waiting.id]


async def test_job_put_back_while_its_model_drains_is_done_all_the_same(operations, queue, intake, make_job):
    job = await submit(queue, make_job())
    claims = intake.claim(["demo"], 1)
    operations.drain(["demo"])
    intake.hand_back(claims)
    assert [claim.job.id for claim in intake.claim(["demo"], 1)] == [job.id]


async def test_drain_ends_a_pause_and_resume_ends_both(operations, queue, intake, make_job):
    await submit(queue, make_job())
    operations.pause(["demo"])
    operations.drain(["demo"])
    assert (model_status(operations).paused, model_status(operations).draining) == (False, True)
    operations.pause(["demo"])
    assert (model_status(operations).paused, model_status(operations).draining) == (True, True)
    operations.resume(["demo"])
    assert (model_status(operations).paused, model_status(operations).draining) == (False, False)
    await submit(queue, make_job())
    assert len(intake.claim(["demo"], 5)) == 2


async def test_unknown_model_is_refused_with_the_known_ones(operations, queue, intake, make_job):
    intake.publish([card("a")])
    await submit(queue, make_job(model="b"))
    asks = (operations.pause, operations.resume, operations.drain, operations.waiting, operations.failed)
    for ask in asks:
        with pytest.raises(UnknownModel, match="model is 'c'; known models: a, b"):
            ask(["a", "c"])
    assert not model_status(operations, "a").paused


# retry


async def test_retried_job_waits_with_a_fresh_deadline_of_the_same_length(operations, queue, intake, make_job):
    now = time.time()
    job = make_job(created_at=now - 500, deadline=now + 30)
    await fail(queue, intake, job)
    assert operations.retry(job.id).position == 0
    view = await queue.view(job.id)
    assert (view.status, view.position, view.result, view.ended_at) == ("queued", 0, None, None)
    assert view.job.deadline == pytest.approx(time.time() + 530, abs=10)
    (claim,) = intake.claim(["demo"], 1)
    assert claim.job == view.job
    assert claim.queued_s < 10
    intake.commit(claim, "failed", BROKEN)
    operations.retry(job.id)
    assert (await queue.view(job.id)).job.deadline == pytest.approx(time.time() + 530, abs=10)


async def test_deadline_of_a_retried_job_is_kept_by_redis_too(operations, queue, intake, make_job, client):
    job = make_job()
    await fail(queue, intake, job)
    operations.retry(job.id)
    deadline = (await queue.view(job.id)).job.deadline
    assert client.zscore("darkroom:deadlines", job.id) == pytest.approx(deadline)
    assert json.loads(client.hget(f"rq:job:{job.id}", "meta"))["deadline"] == deadline


async def test_job_that_missed_its_deadline_can_be_retried(operations, queue, intake, make_job):
    now = time.time()
    job = await submit(queue, make_job(created_at=now - 20, deadline=now - 1))
    assert (await queue.view(job.id)).status == "failed"
    assert operations.retry(job.id).position == 0
    (claim,) = intake.claim(["demo"], 1)
    assert intake.commit(claim, "succeeded", Result())


async def test_canceled_job_can_be_retried_and_is_not_canceled_by_its_past(operations, queue, intake, make_job):
    job = await submit(queue, make_job())
    (claim,) = intake.claim(["demo"], 1)
    await queue.cancel(job.id)
    assert intake.commit(claim, "canceled", Result())
    assert operations.retry(job.id).position == 0
    (again,) = intake.claim(["demo"], 1)
    assert not (await queue.view(job.id)).cancel_requested
    assert intake.commit(again, "succeeded", Result())


async def test_each_life_of_a_job_has_one_terminal_event(operations, queue, intake, make_job, client):
    job = make_job()
    await fail(queue, intake, job)
    operations.retry(job.id)
    (claim,) = intake.claim(["demo"], 1)
    intake.commit(claim, "succeeded", Result())
    assert await events_of(client, job) == ["queued", "running", "failed", "queued", "running", "succeeded"]


async def test_late_commit_of_an_earlier_life_is_fenced(operations, queue, intake, make_job):
    job = make_job()
    stale = await fail(queue, intake, job)
    operations.retry(job.id)
    assert not intake.commit(stale, "succeeded", Result())
    (claim,) = intake.claim(["demo"], 1)
    assert not intake.commit(stale, "failed", BROKEN)
    assert intake.commit(claim, "succeeded", Result())
    assert (await queue.view(job.id)).status == "succeeded"


@pytest.mark.parametrize("ending", ["failed", "canceled"])
async def test_rq_sees_a_retried_job_as_queued_and_nowhere_else(operations, queue, intake, make_job, client, ending):
    job = await submit(queue, make_job())
    (claim,) = intake.claim(["demo"], 1)
    intake.commit(claim, ending, BROKEN if ending == "failed" else Result())
    operations.retry(job.id)
    theirs = rq_queue(client)
    assert theirs.get_job_ids() == [job.id]
    for registry in (FailedJobRegistry, CanceledJobRegistry, StartedJobRegistry):
        assert registry(DEMO, connection=client).get_job_ids() == []
    read = RQJob.fetch(job.id, connection=client, serializer=JSONSerializer)
    assert (read.get_status(), read.started_at, read.ended_at, read.timeout) == ("queued", None, None, 60)
    assert read.args[0] == (await queue.view(job.id)).job.to_payload()


async def test_retry_writes_the_fields_that_rq_requeue_writes(operations, queue, intake, make_job, client):
    ours, theirs = make_job(), make_job()
    for job in (ours, theirs):
        await fail(queue, intake, job)
    operations.retry(ours.id)
    FailedJobRegistry(DEMO, connection=client, serializer=JSONSerializer).requeue(theirs.id)
    mine, rqs = (client.hgetall(f"rq:job:{job.id}") for job in (ours, theirs))
    past = {b"outcome", b"execution", b"exc_info"}  # which only `claim` removes from theirs
    assert mine.keys() == rqs.keys() - past
    same = {b"status", b"origin", b"started_at", b"ended_at", b"timeout", b"description", b"result_ttl"}
    assert {name: mine[name] for name in same} == {name: rqs[name] for name in same}
    assert rq_queue(client).get_job_ids() == [ours.id, theirs.id]


async def test_keys_of_a_retried_job_do_not_expire_before_it_ends_again(operations, queue, intake, make_job, client):
    job = make_job()
    await fail(queue, intake, job)
    operations.retry(job.id)
    keys = [key for key in client.scan_iter() if job.id.encode() in key]
    assert {key.split(b":")[1] for key in keys} == {b"job", b"results", b"events"}
    assert {client.ttl(key) for key in keys} == {-1}
    (claim,) = intake.claim(["demo"], 1)
    intake.commit(claim, "succeeded", Result())
    assert all(client.ttl(key) > 0 for key in client.scan_iter() if job.id.encode() in key)


async def test_job_that_killed_its_worker_is_retried_apart_and_with_no_death_counted(
    operations, queue, make_intake, make_job
):
    poison, other = await submit(queue, make_job(), make_job(priority="low"))
    undertaker = make_intake("undertaker")
    make_intake("w1").claim(["demo"], 1)
    undertaker.bury("w1", 1)
    assert (await queue.view(poison.id)).result.failure.code == "worker_lost"
    operations.retry(poison.id)
    assert queue_status(operations).suspects == 1
    claims = make_intake("w2").claim(["demo"], 5)
    assert [(claim.job.id, claim.suspect) for claim in claims] == [(poison.id, True)]
    undertaker.bury("w2", 2)
    assert [(await queue.view(job.id)).status for job in (poison, other)] == ["queued", "queued"]


@pytest.mark.parametrize(
    ("state", "reason"),
    [("queued", "waits already"), ("running", "is running"), ("succeeded", "has succeeded")],
)
async def test_job_that_has_not_failed_is_not_retried(operations, queue, intake, make_job, client, state, reason):
    job = await submit(queue, make_job())
    if state != "queued":
        (claim,) = intake.claim(["demo"], 1)
        if state == "succeeded":
            intake.commit(claim, "succeeded", Result())
    before = {key: client.dump(key) for key in client.scan_iter() if job.id.encode() in key}
    assert reason in operations.retry(job.id).refused
    assert {key: client.dump(key) for key in client.scan_iter() if job.id.encode() in key} == before


@pytest.mark.parametrize("job_id", ["gen_0", "", "a:b", "x:dependents", "ü"])
def test_job_without_a_record_is_not_retried(operations, job_id):
    assert "its record has expired" in operations.retry(job_id).refused


async def test_job_of_another_application_is_not_retried(operations, client):
    RQQueue("mail", connection=client, serializer=JSONSerializer).enqueue("mail.send", job_id="m1")
    assert operations.retry("m1").refused
    assert RQQueue("mail", connection=client, serializer=JSONSerializer).get_job_ids() == ["m1"]


async def test_job_of_another_schema_is_not_retried(operations, queue, make_job):
    job = await submit(queue, make_job(schema=SCHEMA + 1))
    assert f"schema {SCHEMA + 1}" in operations.retry(job.id).refused


async def test_full_queue_refuses_a_retry_and_leaves_the_job_failed(settings, intake, make_job):
    small = settings.model_copy(update={"queue_bound": 1})
    queue, job = JobQueue.connect(small), make_job()
    await fail(queue, intake, job)
    await submit(queue, make_job())
    with Operations.connect(small) as operations:
        assert "is full" in operations.retry(job.id).refused
    assert (await queue.view(job.id)).status == "failed"
    await queue.close()


async def test_draining_model_refuses_a_retry(operations, queue, intake, make_job):
    job = make_job()
    await fail(queue, intake, job)
    operations.drain(["demo"])
    assert "is being drained" in operations.retry(job.id).refused


async def test_job_ended_by_a_tool_of_rq_while_it_ran_is_retried_clean(operations, queue, intake, make_job, client):
    job = await submit(queue, make_job())
    (stale,) = intake.claim(["demo"], 1)
    RQJob.fetch(job.id, connection=client, serializer=JSONSerializer).cancel()
    assert operations.retry(job.id).position == 0
    assert client.scard("darkroom:held:w1") == 0
    assert rq_queue(client).started_job_registry.get_job_ids(cleanup=False) == []
    assert not intake.commit(stale, "succeeded", Result())


async def test_failed_lists_the_failed_jobs_of_models_as_submitted(operations, queue, intake, make_job, client):
    jobs = [make_job(id=f"gen_{n}", priority=priority) for n, priority in enumerate(("low", "high", "normal"))]
    for job in reversed(jobs):
        await fail(queue, intake, job)
    await fail(queue, intake, make_job(model="other"))
    client.zadd(f"rq:failed:{DEMO}", {"gone": time.time() + 100})
    assert operations.failed(["demo"]) == [job.id for job in jobs]
    client.hset(f"rq:job:{jobs[0].id}", "ended_at", "2020-01-01T00:00:00.000000Z")
    assert operations.failed(["demo"], since_s=3600) == [job.id for job in jobs[1:]]


# purge


async def test_purged_waiting_jobs_end_as_canceled(operations, queue, intake, make_job, client):
    jobs = [make_job(priority=priority) for priority in ("low", "high", "normal")]
    await submit(queue, *jobs, make_job(model="other"))
    ids = operations.waiting(["demo"])
    assert ids == [jobs[1].id, jobs[2].id, jobs[0].id]
    assert operations.purge("queued", ids) == 3
    for job in jobs:
        assert (await queue.view(job.id)).status == "canceled"
        assert await events_of(client, job) == ["queued", "canceled"]
        assert job.id in CanceledJobRegistry(job.queue, connection=client)
    assert operations.waiting(["demo", "other"]) != []
    assert intake.claim(["demo"], 5) == []
    assert client.zcard("darkroom:deadlines") == 1


async def test_purge_leaves_a_job_that_has_started_meanwhile(operations, queue, intake, make_job):
    jobs = await submit(queue, make_job(), make_job())
    ids = operations.waiting(["demo"])
    (claim,) = intake.claim(["demo"], 1)
    assert operations.purge("queued", ids) == 1
    assert [(await queue.view(job.id)).status for job in jobs] == ["running", "canceled"]
    assert intake.commit(claim, "succeeded", Result())


async def test_purge_takes_more_jobs_than_one_script_does(settings, make_job, client):
    many = settings.model_copy(update={"queue_bound": 1000})
    queue = JobQueue.connect(many)
    await submit(queue, *[make_job() for _ in range(450)])
    with Operations.connect(many) as operations:
        assert operations.purge("queued", operations.waiting(["demo"])) == 450
        assert operations.waiting(["demo"]) == []
    assert client.zcard(f"rq:canceled:{DEMO}") == 450
    await queue.close()


async def test_purged_failed_jobs_leave_no_trace(operations, queue, intake, make_job, client):
    failed, fine = make_job(), make_job()
    await fail(queue, intake, failed)
    await submit(queue, fine)
    assert operations.purge("failed", [failed.id, fine.id]) == 1
    assert [key for key in client.scan_iter() if failed.id.encode() in key] == []
    assert client.zcard(f"rq:failed:{DEMO}") == 0
    with pytest.raises(UnknownGeneration):
        await queue.view(failed.id)
    assert (await queue.view(fine.id)).status == "queued"


async def test_purge_leaves_jobs_of_other_applications(operations, client):
    theirs = RQQueue(DEMO, connection=client, serializer=JSONSerializer)
    theirs.enqueue("mail.send", job_id="m1")
    assert operations.purge("queued", operations.waiting(["demo"])) == 0
    assert theirs.get_job_ids() == ["m1"]


def test_every_verb_says_that_redis_is_not_there(own_valkey, settings):
    gone = settings.model_copy(update={"redis_url": own_valkey.url})
    own_valkey.stop()
    with Operations.connect(gone) as operations:
        verbs = (
            operations.status,
            operations.reap,
            *[lambda verb=verb: verb(["demo"]) for verb in (operations.pause, operations.drain, operations.resume)],
            *[lambda verb=verb: verb(["demo"]) for verb in (operations.waiting, operations.failed)],
            lambda: operations.retry("gen_0"),
            lambda: operations.purge("queued", ["gen_0"]),
        )
        for verb in verbs:
            with pytest.raises(QueueUnavailable) as caught:
                verb()
            assert isinstance(caught.value.__cause__, redis.ConnectionError)


def test_every_key_of_ours_is_documented(client):
    """The list of keys in the transitions' docstring is the whole list."""
    sources = [*Path(transitions.__file__).parent.glob("*.lua"), *Path(transitions.__file__).parent.parent.glob("*.py")]
    used = set(re.findall(r"['\"](darkroom:[a-z_]+:?)", "\n".join(source.read_text() for source in sources)))
    listed = set(re.findall(r"^(darkroom:[a-z_]+:?)", transitions.__doc__, re.MULTILINE))
    assert used == listed


# forget


def test_forgotten_model_is_known_to_nobody_until_a_worker_offers_it_again(operations, intake, client):
    intake.publish([card("demo"), card("other")])
    intake.renew(["demo"], {"demo": 10.0})
    operations.pause(["demo"])
    operations.drain(["demo"])
    intake.retire()
    assert operations.forget("demo") is None
    assert operations.models() == ["other"]
    assert client.hkeys("darkroom:speed") == []
    assert client.exists("darkroom:paused", "darkroom:draining") == 0
    intake.publish([card("demo")])
    assert operations.models() == ["demo", "other"]


async def test_model_that_is_held_or_waited_for_is_not_forgotten(operations, queue, intake, make_job):
    intake.publish([card("demo")])
    intake.renew(["demo"])
    await submit(queue, make_job(), make_job(priority="low"))
    (claim,) = intake.claim(["demo"], 1)
    assert operations.forget("demo") == "1 worker holds it and 2 jobs of it wait or run"
    (other,) = intake.claim(["demo"], 1)
    assert intake.commit(other, "succeeded", Result())
    intake.renew([])
    assert operations.forget("demo") == "1 job of it waits or runs"
    assert intake.commit(claim, "succeeded", Result())
    assert operations.forget("demo") is None
    assert operations.models() == []


async def test_failed_job_of_a_forgotten_model_can_be_retried(operations, queue, intake, make_job):
    job = make_job()
    await fail(queue, intake, job)
    assert operations.forget("demo") is None
    assert operations.retry(job.id).position == 0
    assert operations.models() == ["demo"]


def test_model_that_is_not_known_cannot_be_forgotten(operations):
    with pytest.raises(UnknownModel):
        operations.forget("nothing")
