from __future__ import annotations

import asyncio
import json
import socket
import time

import pytest
import redis.asyncio
from rq import Queue as RQQueue
from rq.job import Job as RQJob
from rq.serializers import JSONSerializer

from worker.contract.cards import Defaults, ModelCard
from worker.contract.errors import QueueFull, QueueUnavailable, SchemaUnknown, UnknownGeneration
from worker.contract.events import JobEvents
from worker.contract.job import SCHEMA, Failure, Progress, Result
from worker.contract.queue import Idempotency, JobQueue
from worker.contract.settings import ContractSettings


def card(name):
    return ModelCard(
        name=name,
        description="small",
        variant="large",
        revision="r1",
        parameters=1,
        defaults=Defaults(steps=2, guidance_scale=1.0),
    )


async def until(condition):
    async with asyncio.timeout(10):
        while not await condition():
            await asyncio.sleep(0.01)


async def test_submitted_job_is_viewed_as_it_was_given(queue, make_job):
    job = make_job(num_images=3, priority="low", request_id="req_1")
    assert (await queue.submit(job)).position == 0
    view = await queue.view(job.id)
    assert (view.job, view.status, view.position) == (job, "queued", 0)
    assert (view.progress, view.started_at, view.ended_at, view.result) == (None, None, None, None)


async def test_position_counts_the_jobs_of_the_model_that_go_first(queue, make_job):
    normal = [make_job() for _ in range(2)]
    for job in normal:
        await queue.submit(job)
    await queue.submit(make_job(model="other"))
    assert (await queue.submit(make_job(priority="high"))).position == 0
    assert (await queue.submit(make_job(priority="low"))).position == 3
    assert (await queue.view(normal[1].id)).position == 2


async def test_second_submit_of_one_job_changes_nothing(queue, make_job, client):
    first, second = make_job(), make_job()
    assert [(await queue.submit(job)).position for job in (first, second, first)] == [0, 1, 0]
    assert client.lrange("rq:queue:darkroom.demo.normal", 0, -1) == [first.id.encode(), second.id.encode()]


async def test_full_queue_refuses_and_says_when_to_come_back(settings, make_job):
    queue = JobQueue.connect(settings.model_copy(update={"queue_bound": 2}))
    for _ in range(2):
        await queue.submit(make_job())
    refused = make_job()
    with pytest.raises(QueueFull, match="2 jobs already wait for 'demo'") as caught:
        await queue.submit(refused)
    assert caught.value.retry_after_s > 0
    with pytest.raises(UnknownGeneration):
        await queue.view(refused.id)
    assert (await queue.submit(make_job(priority="high"))).position == 0
    await queue.close()


async def test_overdue_jobs_make_room_in_a_full_queue_without_any_worker(settings, make_job):
    queue = JobQueue.connect(settings.model_copy(update={"queue_bound": 1}))
    overdue = make_job(deadline=time.time() - 1)
    await queue.submit(overdue)
    assert (await queue.submit(make_job())).position == 0
    assert (await queue.view(overdue.id)).status == "failed"
    await queue.close()


@pytest.mark.parametrize("job_id", ["gen_0", "", "a:b", "../x", "x" * 65, "ü", "x:dependents"])
async def test_unknown_id_is_unknown_to_every_method(queue, job_id):
    for ask in (queue.view(job_id), queue.cancel(job_id), queue.wait(job_id, 1)):
        with pytest.raises(UnknownGeneration):
            await ask


async def test_job_of_another_application_is_unknown(queue, client):
    RQQueue("mail", connection=client, serializer=JSONSerializer).enqueue("mail.send", job_id="m1", meta={"a": 1})
    with pytest.raises(UnknownGeneration):
        await queue.view("m1")


async def test_queued_job_is_canceled_at_once(queue, intake, make_job, client):
    job = make_job()
    await queue.submit(job)
    view = await queue.cancel(job.id)
    assert (view.status, view.position, view.result) == ("canceled", None, Result())
    assert view.ended_at == pytest.approx(time.time(), abs=5)
    assert client.llen("rq:queue:darkroom.demo.normal") == 0
    assert intake.claim(["demo"], 1) == []


async def test_cancel_of_a_running_job_asks_and_is_idempotent(queue, intake, make_job):
    job = make_job()
    await queue.submit(job)
    (claim,) = intake.claim(["demo"], 1)
    for _ in range(2):
        view = await queue.cancel(job.id)
        assert (view.status, view.cancel_requested) == ("running", True)
    assert intake.commit(claim, "canceled", Result())
    assert (await queue.view(job.id)).status == "canceled"


async def test_cancel_leaves_an_ended_job_as_it_is(queue, intake, make_job):
    job = make_job()
    await queue.submit(job)
    (claim,) = intake.claim(["demo"], 1)
    intake.commit(claim, "succeeded", Result(warnings=("w",)))
    before = await queue.view(job.id)
    assert await queue.cancel(job.id) == before
    assert (before.status, before.cancel_requested) == ("succeeded", False)


async def test_success_of_a_canceled_job_ends_as_canceled(queue, intake, make_job):
    job = make_job()
    await queue.submit(job)
    (claim,) = intake.claim(["demo"], 1)
    await queue.cancel(job.id)
    assert not intake.commit(claim, "succeeded", Result(warnings=("w",)))
    view = await queue.view(job.id)
    assert (view.status, view.result) == ("canceled", Result())


async def test_cancel_and_commit_at_once_agree_on_the_outcome(queue, intake, make_job):
    jobs = [make_job() for _ in range(40)]
    for job in jobs:
        await queue.submit(job)
    claims = intake.claim(["demo"], 40)

    def commit_all():
        return {claim.job.id: intake.commit(claim, "succeeded", Result()) for claim in claims}

    async def cancel_all():
        for claim in reversed(claims):
            await queue.cancel(claim.job.id)

    done, _ = await asyncio.gather(asyncio.to_thread(commit_all), cancel_all())
    views = [await queue.view(job.id) for job in jobs]
    assert [view.status for view in views] == ["succeeded" if done[job.id] else "canceled" for job in jobs]


async def test_queued_job_past_its_deadline_fails_when_viewed(queue, make_job):
    job = make_job(deadline=time.time() - 1)
    await queue.submit(job)
    view = await queue.view(job.id)
    assert view.status == "failed"
    assert view.result.failure == Failure(
        code="deadline_exceeded", message="the deadline passed before a worker could start the job"
    )


def miss_deadline(client, job):
    """Its deadline passes: meta is what Redis goes by."""
    meta = json.loads(client.hget(f"rq:job:{job.id}", "meta"))
    client.hset(f"rq:job:{job.id}", "meta", json.dumps(meta | {"deadline": 1.0}))


async def test_running_job_past_its_deadline_fails_and_its_worker_is_told(queue, intake, make_job, client):
    job = make_job()
    await queue.submit(job)
    (claim,) = intake.claim(["demo"], 1)
    miss_deadline(client, job)
    assert (await queue.view(job.id)).result.failure.message == "the deadline passed before the job was done"
    intake.renew(["demo"])
    assert intake.canceled() == {claim.key}
    assert not intake.commit(claim, "succeeded", Result())
    assert (await queue.view(job.id)).status == "failed"


async def test_success_that_comes_after_the_deadline_is_refused(queue, intake, make_job, client):
    job = make_job()
    await queue.submit(job)
    (claim,) = intake.claim(["demo"], 1)
    miss_deadline(client, job)
    assert not intake.commit(claim, "succeeded", Result())
    assert (await queue.view(job.id)).result.failure.code == "deadline_exceeded"


async def test_reap_ends_overdue_jobs_that_nobody_looks_at(queue, make_job, client):
    overdue = [make_job(deadline=time.time() - 1, model=f"m{n}") for n in range(3)]
    waiting = make_job()
    await queue.submit(waiting)
    for job in overdue:
        await queue.submit(job)  # ends those before it
    assert await queue.reap() == (1, 0)
    assert [client.hget(f"rq:job:{job.id}", "status") for job in overdue] == [b"failed"] * 3
    assert client.zrange("darkroom:deadlines", 0, -1) == [waiting.id.encode()]
    assert await queue.reap() == (0, 0)


async def test_wait_returns_when_the_job_ends(queue, intake, make_job):
    job = make_job()
    await queue.submit(job)
    waiting = asyncio.create_task(queue.wait(job.id, 60))
    (claim,) = intake.claim(["demo"], 1)
    assert intake.commit(claim, "failed", Result(failure=Failure(code="out_of_memory", message="too large")))
    async with asyncio.timeout(10):
        view = await waiting
    assert (view.status, view.result.failure.code) == ("failed", "out_of_memory")


async def test_wait_returns_the_job_as_it_is_when_time_is_up(queue, make_job):
    job = make_job()
    await queue.submit(job)
    assert (await queue.wait(job.id, 0.05)).status == "queued"
    assert (await queue.wait(job.id, 0)).status == "queued"


async def test_waiters_of_one_process_share_one_subscription_and_all_wake(queue, make_job, client):
    jobs = [make_job() for _ in range(10)]
    for job in jobs:
        await queue.submit(job)
    waiting = [asyncio.create_task(queue.wait(job.id, 60)) for job in jobs for _ in range(3)]

    async def subscribed():
        return client.pubsub_numsub("darkroom:event") == [(b"darkroom:event", 1)]

    await until(subscribed)
    for job in jobs:
        await queue.cancel(job.id)
    async with asyncio.timeout(10):
        assert {(await task).status for task in waiting} == {"canceled"}
    assert await subscribed()


async def test_ending_a_job_wakes_its_own_waiters_without_a_look_at_redis(queue, redis_url, make_job, client):
    listening = redis.asyncio.Redis.from_url(redis_url)
    events = JobEvents(listening)
    job, other = make_job(), make_job()
    await queue.submit(job)
    with events.watch(job.id) as ended, events.watch(other.id) as other_ended:
        async with asyncio.timeout(10):
            await other_ended.wait()  # the first thing heard is that it listens
        for event in (ended, other_ended):
            event.clear()
        await queue.cancel(job.id)
        async with asyncio.timeout(10):
            await ended.wait()
        assert not other_ended.is_set()
    await events.close()
    await listening.aclose()


@pytest.mark.parametrize("turns", range(0, 30, 3))
async def test_listener_closes_at_whatever_moment(redis_url, turns):
    listening = redis.asyncio.Redis.from_url(redis_url)
    events = JobEvents(listening)
    with events.watch("gen_1"):
        for _ in range(turns):
            await asyncio.sleep(0)
    async with asyncio.timeout(10):
        await events.close()
    await listening.aclose()


async def test_progress_is_as_reported_while_running_and_whole_after_a_success(queue, intake, make_job):
    job = make_job()
    await queue.submit(job)
    (claim,) = intake.claim(["demo"], 1)
    assert (await queue.view(job.id)).progress is None
    intake.progress({claim: Progress(step=1, steps=2)})
    assert (await queue.view(job.id)).progress == Progress(step=1, steps=2)
    intake.commit(claim, "succeeded", Result())
    assert (await queue.view(job.id)).progress == Progress(step=2, steps=2)


async def test_cards_stay_and_workers_come_and_go(queue, make_intake, client):
    assert (await queue.cards(), await queue.workers()) == ({}, {})
    first, second = make_intake("w1"), make_intake("w2")
    first.publish([card("demo"), card("other")])
    first.renew(["demo", "other"])
    second.renew(["demo"])
    assert await queue.workers() == {"demo": 2, "other": 1}
    first.renew(["demo"])
    assert await queue.workers() == {"demo": 2}
    first.retire()
    assert await queue.workers() == {"demo": 1}
    client.zincrby("darkroom:workers", -11, '["demo","w2"]')
    assert await queue.workers() == {}
    assert await queue.cards() == {"demo": card("demo"), "other": card("other")}


async def test_survey_counts_waiting_jobs_of_every_known_model(queue, intake, make_job):
    intake.publish([card("demo"), card("other")])
    for priority in ("high", "high", "low"):
        await queue.submit(make_job(priority=priority))
    waiting = (await queue.survey()).waiting
    assert {key: count for key, count in waiting.items() if count} == {("demo", "high"): 2, ("demo", "low"): 1}
    assert len(waiting) == 6


async def test_job_of_another_schema_is_named_as_such(queue, make_job):
    job = make_job(schema=SCHEMA + 1)
    await queue.submit(job)
    with pytest.raises(SchemaUnknown, match=f"payload schema {SCHEMA + 1}"):
        await queue.view(job.id)


async def test_job_canceled_with_tools_of_rq_is_seen_as_canceled(queue, make_job, client):
    job = make_job()
    await queue.submit(job)
    RQJob.fetch(job.id, connection=client, serializer=JSONSerializer).cancel()
    assert (await queue.view(job.id)).status == "canceled"


async def test_burst_of_calls_is_answered_whole(queue, make_job):
    jobs = [make_job() for _ in range(150)]
    await asyncio.gather(*[queue.submit(job) for job in jobs])
    views = await asyncio.gather(*[queue.view(job.id) for job in jobs * 2])
    assert {view.status for view in views} == {"queued"}


async def every_method(queue, job):
    yield queue.ping()
    yield queue.submit(job)
    yield queue.replay(Idempotency("route", "key", "f"))
    yield queue.view(job.id)
    yield queue.cancel(job.id)
    yield queue.wait(job.id, 30)
    yield queue.reap()
    yield queue.cards()
    yield queue.workers()
    yield queue.survey()
    yield queue.page("", limit=3)
    yield queue.forget(job.id)
    yield queue.secret()
    yield anext(queue.events(job.id))


async def test_every_method_says_that_redis_is_not_there(make_job):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, not listening: connections are refused
        queue = JobQueue.connect(ContractSettings(redis_url=f"redis://127.0.0.1:{taken.getsockname()[1]}/0"))
        async for call in every_method(queue, make_job()):
            with pytest.raises(QueueUnavailable):
                await call
        await queue.close()


async def test_silent_redis_is_given_up_on_and_found_again(own_valkey, make_job):
    queue = JobQueue.connect(ContractSettings(redis_url=own_valkey.url))
    job = make_job()
    await queue.submit(job)
    own_valkey.pause()
    async with asyncio.timeout(10):
        with pytest.raises(QueueUnavailable):
            await queue.view(job.id)
    own_valkey.resume()
    assert (await queue.view(job.id)).status == "queued"
    await queue.close()


async def test_queue_and_its_waiters_survive_a_restart_of_redis(own_valkey, make_job):
    queue = JobQueue.connect(ContractSettings(redis_url=own_valkey.url))
    first = make_job()
    await queue.submit(first)
    waiting = asyncio.create_task(queue.wait(first.id, 60))
    await queue.view(first.id)
    own_valkey.stop()
    with pytest.raises(QueueUnavailable):
        await waiting
    own_valkey.start()
    job = make_job()
    await queue.submit(job)
    waiting = asyncio.create_task(queue.wait(job.id, 60))
    await queue.cancel(job.id)
    async with asyncio.timeout(10):
        assert (await waiting).status == "canceled"
    await queue.close()
