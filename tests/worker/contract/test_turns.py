"""Fair turns: owners take turns in a queue, each one's jobs are first come, first served; RQ's list is followed."""

from __future__ import annotations

import pytest
from rq import Queue as RQQueue
from rq.job import Job as RQJob
from rq.registry import FailedJobRegistry
from rq.serializers import JSONSerializer

from worker.contract.errors import QueueFull
from worker.contract.job import SCHEMA, Failure, Result
from worker.contract.queue import JobQueue

QUEUE = "darkroom.demo.normal"


@pytest.fixture
def put(queue, make_job):
    """Submits so many jobs of an owner, in the order of their ids."""
    made = 0

    async def put(owner, count=1, **fields):
        nonlocal made
        jobs = []
        for _ in range(count):
            made += 1
            jobs.append(make_job(owner=owner, id=f"gen_{made:031x}", **fields))
            await queue.submit(jobs[-1])
        return jobs

    return put


def owners(claims):
    return "".join(claim.job.owner for claim in claims)


def ids(jobs):
    return [job.id for job in jobs]


def in_line(client):
    return sum(client.zcard(key) for key in client.keys("darkroom:line:*"))


async def test_new_owner_waits_for_one_job_of_another_not_for_all(put, intake):
    await put("a", 20)
    assert owners(intake.claim(["demo"], 3)) == "aaa"
    await put("b", 2)
    assert owners(intake.claim(["demo"], 6)) == "ababaa"


async def test_jobs_of_one_owner_are_first_come_first_served(put, intake):
    jobs = await put("a", 3) + await put("b", 1) + await put("a", 2)
    claimed = [claim.job for claim in intake.claim(["demo"], 6)]
    assert [job for job in claimed if job.owner == "a"] == [job for job in jobs if job.owner == "a"]


async def test_three_owners_take_turns_whatever_they_have(put, intake):
    await put("a", 6)
    await put("b", 2)
    await put("c", 3)
    assert owners(intake.claim(["demo"], 11)) == "abcabcacaaa"


async def test_turns_are_kept_over_single_claims(put, intake):
    await put("a", 4)
    await put("b", 4)
    assert [owners(intake.claim(["demo"], 1)) for _ in range(8)] == list("abababab")


async def test_who_comes_back_has_no_more_turns_than_who_stayed(put, intake):
    await put("a", 10)
    taken = ""
    for _ in range(5):
        await put("b")
        taken += owners(intake.claim(["demo"], 2))
    assert taken in ("ab" * 5, "ba" * 5)


async def test_jobs_that_end_while_they_wait_cost_their_owner_no_turns(queue, put, intake):
    """A deadline that passes for a hundred jobs does not put the owner's others behind a hundred of another's."""
    late = await put("a", 100)
    await put("b", 10)
    kept = await put("a", 2)
    for job in late:
        await queue.cancel(job.id)
    claims = intake.claim(["demo"], 4)
    assert owners(claims) == "abab"
    assert [claim.job for claim in claims if claim.job.owner == "a"] == kept


async def test_priority_goes_before_turns(put, intake):
    await put("a", 2, priority="low")
    await put("a", 2)
    await put("b", 1, priority="low")
    await put("a", 2, priority="high")
    assert [(c.job.priority, c.job.owner) for c in intake.claim(["demo"], 9)] == [
        ("high", "a"), ("high", "a"), ("normal", "a"), ("normal", "a"), ("low", "a"), ("low", "b"), ("low", "a"),
    ]  # fmt: skip


async def test_owners_that_come_together_are_first_come_first_served(put, intake):
    for owner in "zymab":
        await put(owner, 2)
    assert owners(intake.claim(["demo"], 10)) == "zymabzymab"


async def test_position_is_the_order_in_which_jobs_will_start(queue, put, intake):
    jobs = await put("d", 2) + await put("a", 7) + await put("b", 3)
    started = intake.claim(["demo"], 4)
    jobs += await put("c", 2) + await put("a", 2) + await put("", 1)
    positions = {job.id: (await queue.view(job.id)).position for job in jobs}
    assert {positions[claim.job.id] for claim in started} == {None}
    claims = intake.claim(["demo"], 20)
    assert [positions[claim.job.id] for claim in claims] == list(range(len(jobs) - 4))


async def test_position_counts_what_is_of_higher_priority(queue, put):
    await put("a", 3, priority="high")
    await put("b", 2)
    (job,) = await put("a")
    assert (await queue.view(job.id)).position == 3 + 1


async def fill_up(queue, make_job, owner, most=100):
    """Submits jobs of an owner until the queue takes no more of them; how many it took."""
    for taken in range(most):
        try:
            await queue.submit(make_job(owner=owner))
        except QueueFull:
            return taken
    return most


async def test_owner_that_fills_the_queue_leaves_each_other_its_share(settings, make_job):
    queue = JobQueue.connect(settings.model_copy(update={"queue_bound": 12}))
    assert await fill_up(queue, make_job, "a") == 12
    assert await fill_up(queue, make_job, "b") == 4  # the first is asked for as the second of two
    assert await fill_up(queue, make_job, "c") == 3
    assert await fill_up(queue, make_job, "a") == 0
    await queue.close()


async def test_queue_takes_no_more_than_twice_its_bound_however_many_owners_come(settings, make_job, client):
    queue = JobQueue.connect(settings.model_copy(update={"queue_bound": 10}))
    for n in range(30):
        await fill_up(queue, make_job, f"owner{n}", 10 if n == 0 else 1)
    assert client.llen(f"rq:queue:{QUEUE}") == 20
    await queue.close()


async def test_queue_of_one_owner_takes_no_more_than_its_bound(settings, make_job):
    queue = JobQueue.connect(settings.model_copy(update={"queue_bound": 1}))
    assert await fill_up(queue, make_job, "") == 1
    await queue.close()


async def test_owner_beyond_its_share_is_told_to_come_when_a_job_of_its_own_would_start(
    settings, make_job, make_intake
):
    queue = JobQueue.connect(settings.model_copy(update={"queue_bound": 12}))
    await fill_up(queue, make_job, "a")
    await fill_up(queue, make_job, "b")
    make_intake("w1").renew(["demo"], {"demo": make_job().pixel_steps / 1e6})  # a job a second
    told = {}
    for owner in "ab":
        with pytest.raises(QueueFull) as refused:
            await queue.submit(make_job(owner=owner))
        told[owner] = refused.value.retry_after_s
    assert told == {"a": 16, "b": 9}
    await queue.close()


async def test_job_handed_back_is_next_and_in_its_place(put, intake, make_intake):
    jobs = await put("a", 3)
    await put("b", 3)
    first = intake.claim(["demo"], 3)
    intake.hand_back(first)
    again = make_intake("w2").claim(["demo"], 6)
    assert {claim.job.id for claim in again[:3]} == {claim.job.id for claim in first}
    assert [claim.job for claim in again if claim.job.owner == "a"] == jobs


async def test_jobs_of_a_lost_worker_do_not_wait_for_their_turns_again(put, intake, make_intake):
    jobs = await put("a", 5)
    claims = intake.claim(["demo"], 4)
    await put("b", 2)
    intake.hand_back(claims)
    again = make_intake("w2").claim(["demo"], 7)
    assert [claim.job for claim in again[:4]] == jobs[:4]
    assert owners(again[4:]) in ("abb", "bab")


async def test_newer_jobs_stay_in_line_and_hold_up_nobody(queue, put, intake, client):
    newer = await put("a", 3, schema=SCHEMA + 1)
    known = await put("a", 1) + await put("b", 1)
    await put("c", 2, schema=SCHEMA + 1)
    assert ids(claim.job for claim in intake.claim(["demo"], 9)) == ids(known)
    assert in_line(client) == 5
    intake.claim(["demo"], 1)
    for job in newer:
        await queue.cancel(job.id) if job.schema == SCHEMA else client.delete(f"rq:job:{job.id}")
    intake.claim(["demo"], 1)
    assert in_line(client) == 2


async def test_queue_that_is_empty_keeps_no_turns(queue, put, intake, client):
    jobs = await put("a", 2) + await put("b", 2)
    intake.claim(["demo"], 2)
    for job in jobs:
        await queue.cancel(job.id)
    assert client.keys("darkroom:line:*") + client.keys("darkroom:turns:*") == []
    assert client.exists("darkroom:rounds") == 0


async def test_job_canceled_by_a_tool_of_rq_is_not_claimed_and_leaves_the_line(put, intake, client):
    gone, stays = await put("a", 2)
    RQJob.fetch(gone.id, connection=client, serializer=JSONSerializer).cancel()
    assert ids(claim.job for claim in intake.claim(["demo"], 5)) == [stays.id]
    assert in_line(client) == 0
    assert client.smembers("darkroom:active:a") == {stays.id.encode()}
    assert client.ttl(f"rq:job:{gone.id}") > 0


async def test_queue_emptied_by_a_tool_of_rq_is_empty(put, intake, client):
    await put("a", 3)
    RQQueue(QUEUE, connection=client, serializer=JSONSerializer).empty()
    assert intake.claim(["demo"], 5) == []
    assert (in_line(client), client.exists("darkroom:load"), client.exists("darkroom:active:a")) == (0, 0, 0)


async def test_queue_emptied_by_a_tool_of_rq_leaves_its_owner_the_other_jobs(queue, put, intake, client):
    (ended,) = await put("a")
    (claim,) = intake.claim(["demo"], 1)
    intake.commit(claim, "succeeded", Result())
    gone = await put("a", 2)
    RQQueue(QUEUE, connection=client, serializer=JSONSerializer).empty()
    assert intake.claim(["demo"], 5) == []
    assert client.zrange("darkroom:owner:a", 0, -1) == [ended.id.encode()]
    assert ids(view.job for view in await queue.page("a", limit=5)) == [ended.id]
    assert client.exists(*[f"darkroom:events:{job.id}" for job in gone]) == 0


async def test_running_job_deleted_by_a_tool_of_rq_leaves_nothing_behind(queue, put, intake, client):
    running, waiting = await put("a", 2)
    intake.claim(["demo"], 1)
    RQJob.fetch(running.id, connection=client, serializer=JSONSerializer).delete()
    client.zadd("darkroom:deadlines", {running.id: 1})
    await queue.reap()
    assert client.exists(f"darkroom:events:{running.id}") == 0
    assert client.zrange("darkroom:owner:a", 0, -1) == [waiting.id.encode()]


async def test_job_moved_to_another_queue_by_a_tool_of_rq_leaves_its_owner_the_other_jobs(queue, put, intake, client):
    (ended,) = await put("a")
    await queue.cancel(ended.id)
    (job,) = await put("a")
    client.lrem(f"rq:queue:{QUEUE}", 1, job.id)
    client.rpush("rq:queue:darkroom.demo.high", job.id)
    assert ids(claim.job for claim in intake.claim(["demo"], 5)) == [job.id]
    assert ids(view.job for view in await queue.page("a", limit=5)) == [job.id, ended.id]


async def test_job_put_back_by_a_tool_of_rq_waits_behind_its_owner_s_others(put, intake, client):
    (job,) = await put("a")
    (claim,) = intake.claim(["demo"], 1)
    intake.commit(claim, "failed", Result(failure=Failure(code="x", message="y")))
    other = await put("a", 1) + await put("b", 1)
    FailedJobRegistry(job.queue, connection=client, serializer=JSONSerializer).requeue(job.id)
    claims = intake.claim(["demo"], 5)
    assert owners(claims) == "aba"
    assert ids(claim.job for claim in claims) == [other[0].id, other[1].id, job.id]
    assert client.smembers("darkroom:active:a") == {job.id.encode(), other[0].id.encode()}


async def test_job_that_is_twice_in_the_list_is_claimed_once(put, intake, client):
    (job,) = await put("a")
    client.rpush(f"rq:queue:{QUEUE}", job.id)
    assert ids(claim.job for claim in intake.claim(["demo"], 5)) == [job.id]
    assert client.llen(f"rq:queue:{QUEUE}") == 0


async def test_jobs_of_a_darkroom_without_turns_are_done_in_the_order_of_the_list(put, intake, client):
    jobs = await put("", 5)
    for key in client.keys("darkroom:line:*") + client.keys("darkroom:turns:*"):
        client.delete(key)
    client.delete("darkroom:load", "darkroom:open", "darkroom:active:", "darkroom:rounds")
    assert ids(claim.job for claim in intake.claim(["demo"], 5)) == ids(jobs)
