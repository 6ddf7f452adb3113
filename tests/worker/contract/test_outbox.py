"""What webhooks are to be told: each event asked for, at least once, by one sender at a time, and in the job's log."""

from __future__ import annotations

import asyncio

import pytest

from worker.contract.job import Failure, Progress, Result, Webhook
from worker.contract.operations import Operations
from worker.contract.outbox import KEPT, Outbox

URL = "https://example.com/hook"
ALL = Webhook(url=URL, events=("started", "progress", "completed"))
OK = {"event": "completed", "at": 1.5, "attempt": 1, "status": 200, "seconds": 0.1}
BAD = OK | {"status": 500}


@pytest.fixture
async def outbox(settings):
    outbox = Outbox.connect(settings)
    yield outbox
    await outbox.close()


async def ended_job(queue, make_job, **fields):
    """A job that has ended at once, so that its webhook is to be told."""
    job = make_job(**{"webhook": Webhook(url=URL), **fields})
    await queue.submit(job)
    await queue.cancel(job.id)
    return job


async def events(outbox, lease_s=60.0):
    return [entry.event for entry in await outbox.due("s1", 100, lease_s)]


async def test_webhook_is_told_what_it_asked_for_as_it_happens(queue, intake, outbox, make_job):
    job = make_job(webhook=ALL)
    await queue.submit(job)
    assert await events(outbox) == []
    (claim,) = intake.claim(["demo"], 1)
    assert await events(outbox) == ["started"]
    intake.progress({claim: Progress(step=1, steps=2)})
    assert await events(outbox) == ["progress"]
    intake.commit(claim, "succeeded", Result())
    (entry,) = await outbox.due("s1", 100, 60)
    assert (entry.job_id, entry.event, entry.attempt) == (job.id, "completed", 1)
    assert entry.at == pytest.approx((await queue.view(job.id)).ended_at, abs=1)


@pytest.mark.parametrize("end", ["succeeded", "failed", "canceled", "deadline", "canceled while queued"])
async def test_webhook_is_told_of_the_end_whatever_it_is(queue, intake, outbox, make_job, end):
    job = make_job(webhook=Webhook(url=URL), deadline=1.0) if end == "deadline" else make_job(webhook=Webhook(url=URL))
    await queue.submit(job)
    if end == "canceled while queued":
        await queue.cancel(job.id)
    elif end == "deadline":
        await queue.reap()
    else:
        (claim,) = intake.claim(["demo"], 1)
        intake.commit(claim, end, Result(failure=Failure(code="x", message="y") if end == "failed" else None))
    assert await events(outbox) == ["completed"]


async def test_job_without_a_webhook_tells_nobody(queue, intake, outbox, make_job):
    await queue.submit(make_job())
    (claim,) = intake.claim(["demo"], 1)
    intake.commit(claim, "succeeded", Result())
    assert await outbox.waiting() == 0


async def test_of_progress_one_message_waits_and_none_after_the_end(queue, intake, outbox, make_job):
    await queue.submit(make_job(webhook=ALL))
    (claim,) = intake.claim(["demo"], 1)
    for step in (1, 2, 3):
        intake.progress({claim: Progress(step=step, steps=4)})
    assert await outbox.waiting() == 2
    (started, progress) = await outbox.due("s1", 100, 60)
    await outbox.done(progress, OK)
    intake.progress({claim: Progress(step=4, steps=4)})
    (later,) = await outbox.due("s1", 100, 60)
    assert (later.event, later.id == progress.id) == ("progress", False)
    intake.commit(claim, "succeeded", Result())
    await outbox.retry(later, BAD, 0.0)
    assert await events(outbox, 0.0) == ["completed"]
    await outbox.done(started, OK)


async def test_progress_does_not_wait_after_the_end_where_only_progress_was_asked_for(queue, intake, outbox, make_job):
    await queue.submit(make_job(webhook=Webhook(url=URL, events=("progress",))))
    (claim,) = intake.claim(["demo"], 1)
    intake.progress({claim: Progress(step=1, steps=2)})
    assert await outbox.waiting() == 1
    intake.commit(claim, "succeeded", Result())
    assert await outbox.waiting() == 0


async def test_job_that_starts_again_has_started_once(queue, intake, make_intake, outbox, make_job):
    await queue.submit(make_job(webhook=ALL))
    claims = intake.claim(["demo"], 1)
    (entry,) = await outbox.due("s1", 100, 60)
    await outbox.done(entry, OK)
    intake.hand_back(claims)
    make_intake("w2").claim(["demo"], 1)
    assert await outbox.waiting() == 0


async def test_message_is_one_sender_s_until_its_lease_is_over(queue, outbox, make_job):
    await ended_job(queue, make_job)
    (first,) = await outbox.due("s1", 10, 0.05)
    assert await outbox.due("s2", 10, 60) == []
    async with asyncio.timeout(10):
        while not (again := await outbox.due("s2", 10, 60)):
            await asyncio.sleep(0.01)
    assert (again[0].id, again[0].attempt) == (first.id, 2)


async def test_message_is_overdue_until_a_sender_takes_it(queue, outbox, make_job):
    assert await outbox.overdue_s() == 0
    await ended_job(queue, make_job)
    await outbox.due("s1", 10, 0.05)  # by a sender that dies
    async with asyncio.timeout(10):
        while (overdue_s := await outbox.overdue_s()) == 0:
            await asyncio.sleep(0.01)
    assert overdue_s < 10
    (again,) = await outbox.due("s2", 10, 60)
    assert await outbox.overdue_s() == 0
    await outbox.retry(again, BAD, 60)
    assert await outbox.overdue_s() == 0  # it waits, but nobody is to send it now


async def test_due_gives_no_more_than_asked_for_the_longest_due_first(queue, outbox, make_job):
    jobs = [await ended_job(queue, make_job) for _ in range(5)]
    assert [entry.job_id for entry in await outbox.due("s1", 2, 60)] == [job.id for job in jobs[:2]]
    assert [entry.job_id for entry in await outbox.due("s2", 9, 60)] == [job.id for job in jobs[2:]]


async def test_delivered_message_is_gone_and_in_the_job_s_log(queue, outbox, make_job):
    job = await ended_job(queue, make_job)
    (entry,) = await outbox.due("s1", 10, 60)
    await outbox.done(entry, OK)
    assert await outbox.waiting() == 0
    assert (await queue.view(job.id)).deliveries == (OK,)


async def test_failed_message_comes_again_after_its_delay_with_the_same_id(queue, outbox, make_job, client):
    job = await ended_job(queue, make_job)
    (first,) = await outbox.due("s1", 10, 60)
    await outbox.retry(first, BAD, 1000)
    assert await outbox.due("s1", 10, 60) == []
    client.zincrby("darkroom:outbox", -1001, f"{job.id}:completed")
    (second,) = await outbox.due("s1", 10, 60)
    assert (second.id, second.attempt, second.at) == (first.id, 2, first.at)
    await outbox.done(second, OK)
    assert (await queue.view(job.id)).deliveries == (BAD, OK)


async def test_dead_message_is_given_up_and_in_the_log(queue, outbox, make_job):
    job = await ended_job(queue, make_job)
    (entry,) = await outbox.due("s1", 10, 60)
    await outbox.dead(entry, BAD)
    assert (await outbox.waiting(), (await queue.view(job.id)).deliveries) == (0, (BAD,))


async def test_sender_that_was_too_slow_neither_puts_off_nor_gives_up_another_s_message(queue, outbox, make_job):
    await ended_job(queue, make_job)
    (slow,) = await outbox.due("s1", 10, 0)
    (taken,) = await outbox.due("s2", 10, 0)
    await outbox.retry(slow, BAD, 1000)
    await outbox.dead(slow, BAD)
    (third,) = await outbox.due("s3", 10, 0)
    assert (taken.attempt, third.attempt) == (2, 3)
    await outbox.done(slow, OK)  # it arrived after all
    assert await outbox.waiting() == 0


async def test_message_that_is_left_comes_again_as_the_same_attempt_and_is_not_in_the_log(
    queue, outbox, make_job, client
):
    job = await ended_job(queue, make_job)
    for _ in range(3):
        (entry,) = await outbox.due("s1", 10, 60)
        await outbox.leave(entry, 1000)
        assert await outbox.due("s2", 10, 60) == []
        client.zincrby("darkroom:outbox", -1001, f"{job.id}:completed")
    (taken,) = await outbox.due("s2", 10, 60)
    assert (taken.id, taken.attempt) == (entry.id, 1)
    assert (await queue.view(job.id)).deliveries == ()


async def test_sender_that_was_too_slow_does_not_leave_another_s_message(queue, outbox, make_job):
    await ended_job(queue, make_job)
    (slow,) = await outbox.due("s1", 10, 0)
    await outbox.due("s2", 10, 0)
    await outbox.leave(slow, 1000)
    (third,) = await outbox.due("s3", 10, 0)
    assert third.attempt == 3


async def test_log_keeps_the_last_deliveries(queue, outbox, make_job):
    job = await ended_job(queue, make_job)
    for n in range(KEPT + 5):
        (entry,) = await outbox.due("s1", 10, 0)
        await outbox.retry(entry, BAD | {"attempt": n, "error": "line\nbreak"}, 0)
    log = (await queue.view(job.id)).deliveries
    assert [delivery["attempt"] for delivery in log] == list(range(5, KEPT + 5))


async def test_log_of_a_job_in_a_new_life_goes_on_and_its_end_is_told_again(queue, settings, outbox, make_job):
    job = await ended_job(queue, make_job)
    (old,) = await outbox.due("s1", 10, 60)
    with Operations.connect(settings) as operations:
        operations.retry(job.id)
    await queue.cancel(job.id)
    (new,) = await outbox.due("s1", 10, 60)
    assert (new.attempt, new.id == old.id) == (1, False)
    await outbox.done(old, BAD)  # of its earlier life: no matter to this
    assert await outbox.waiting() == 1
    await outbox.done(new, OK)
    assert (await queue.view(job.id)).deliveries == (BAD, OK)


async def test_job_in_a_new_life_is_not_told_to_have_ended_before_it_did(queue, settings, outbox, make_job, client):
    job = await ended_job(queue, make_job)
    with Operations.connect(settings) as operations:
        operations.retry(job.id)
    assert client.keys("darkroom:outbox*") == []
    await queue.cancel(job.id)
    assert await events(outbox) == ["completed"]


async def test_messages_of_a_forgotten_job_are_forgotten(queue, outbox, make_job, client):
    jobs = [await ended_job(queue, make_job) for _ in range(2)]
    (entry, _) = await outbox.due("s1", 10, 0)
    await queue.forget(jobs[0].id)
    await outbox.retry(entry, BAD, 0)
    client.delete(f"rq:job:{jobs[1].id}")  # its time was up
    assert await outbox.due("s1", 10, 60) == []
    assert client.keys("darkroom:outbox*") == []
    assert not client.exists(f"rq:job:{jobs[0].id}")


async def test_messages_that_nobody_sends_are_dropped_after_a_day(queue, outbox, make_job, client):
    job = await ended_job(queue, make_job)
    client.zincrby("darkroom:outbox", -86_401, f"{job.id}:completed")
    await queue.reap()
    assert client.keys("darkroom:outbox*") == []
