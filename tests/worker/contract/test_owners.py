"""What belongs to whom: idempotency keys, how many jobs at once, an owner's list, forgetting."""

from __future__ import annotations

import asyncio

import pytest

from worker.contract.errors import IdempotencyKeyReused, TooManyJobs, UnknownGeneration
from worker.contract.job import SCHEMA, Failure, JobView, Result
from worker.contract.operations import Operations
from worker.contract.queue import Accepted, Idempotency, JobQueue

ONCE = Idempotency("a:/v1/generations", "key-1", "f" * 64)


async def submit_all(queue, *jobs, **options):
    return [await queue.submit(job, **options) for job in jobs]


def waiting(client):
    return client.llen("rq:queue:darkroom.demo.normal")


async def test_same_idempotency_key_gives_the_first_answer_and_no_second_job(queue, make_job, client):
    await queue.submit(make_job())
    first, again = make_job(), make_job()
    assert await queue.submit(first, idempotency=ONCE) == Accepted(first.id, 1, replayed=False)
    await queue.submit(make_job(priority="high"))
    assert await queue.submit(again, idempotency=ONCE) == Accepted(first.id, 1, replayed=True)
    assert waiting(client) == 2
    with pytest.raises(UnknownGeneration):
        await queue.view(again.id)


async def test_one_submit_with_a_key_sent_twice_is_no_replay(queue, make_job):
    job = make_job()
    assert [answer.replayed for answer in await submit_all(queue, job, job, idempotency=ONCE)] == [False, False]


async def test_two_at_once_with_one_key_are_one_job(queue, make_job, client):
    jobs = [make_job() for _ in range(20)]
    answers = await asyncio.gather(*[queue.submit(job, idempotency=ONCE) for job in jobs])
    assert len({answer.job_id for answer in answers}) == 1
    assert [answer.replayed for answer in answers].count(False) == 1
    assert waiting(client) == 1


async def test_same_key_with_another_request_is_refused_and_names_the_key(queue, make_job, client):
    await queue.submit(make_job(), idempotency=ONCE)
    other = Idempotency(ONCE.scope, ONCE.key, "0" * 64)
    with pytest.raises(IdempotencyKeyReused, match="Idempotency-Key is 'key-1'"):
        await queue.submit(make_job(), idempotency=other)
    assert waiting(client) == 1


async def test_same_key_of_another_scope_is_another_key(queue, make_job):
    first = await queue.submit(make_job(), idempotency=ONCE)
    second = await queue.submit(make_job(), idempotency=Idempotency("b:/v1/generations", ONCE.key, ONCE.fingerprint))
    assert (first.job_id == second.job_id, second.replayed) == (False, False)


async def test_key_outlives_its_job_s_end_for_a_day_and_not_its_record(queue, intake, make_job, client):
    first, after = make_job(), make_job()
    await queue.submit(first, idempotency=ONCE)
    (claim,) = intake.claim(["demo"], 1)
    intake.commit(claim, "failed", Result(failure=Failure(code="out_of_memory", message="too large")))
    assert (await queue.submit(make_job(), idempotency=ONCE)).job_id == first.id
    (key,) = client.keys("darkroom:idempotency:*")
    assert 86_000 < client.ttl(key) <= 86_400
    await queue.forget(first.id)
    assert await queue.submit(after, idempotency=ONCE) == Accepted(after.id, 0, replayed=False)


async def test_key_is_replayed_without_a_submit(queue, make_job, client):
    assert await queue.replay(ONCE) is None
    await queue.submit(make_job())
    job = make_job()
    await queue.submit(job, idempotency=ONCE)
    await queue.cancel(job.id)
    assert await queue.replay(ONCE) == JobView(job=job, status="queued", position=1)
    with pytest.raises(IdempotencyKeyReused, match="Idempotency-Key is 'key-1'"):
        await queue.replay(Idempotency(ONCE.scope, ONCE.key, "0" * 64))
    await queue.forget(job.id)
    assert await queue.replay(ONCE) is None


async def test_refused_job_leaves_no_key(queue, make_job, client):
    await queue.submit(make_job(owner="a"), max_active=1)
    with pytest.raises(TooManyJobs):
        await queue.submit(make_job(owner="a"), max_active=1, idempotency=ONCE)
    assert client.keys("darkroom:idempotency:*") == []


async def test_owner_has_no_more_jobs_at_once_than_it_may(queue, intake, make_job):
    await submit_all(queue, make_job(owner="a"), make_job(owner="a", model="other"), max_active=2)
    refused = make_job(owner="a")
    with pytest.raises(TooManyJobs, match="2 jobs are queued or running") as caught:
        await queue.submit(refused, max_active=2)
    assert caught.value.retry_after_s > 0
    await queue.submit(make_job(owner="b"), max_active=2)
    (claim,) = intake.claim(["demo"], 1)
    with pytest.raises(TooManyJobs):  # running counts too
        await queue.submit(refused, max_active=2)
    intake.commit(claim, "succeeded", Result())
    await queue.submit(refused, max_active=2)


@pytest.mark.parametrize("end", ["cancel", "forget", "purge", "deadline", "rq"])
async def test_ended_job_makes_room_for_its_owner_however_it_ended(queue, settings, make_job, client, end):
    job = make_job(owner="a")
    await queue.submit(job, max_active=1)
    if end == "cancel":
        await queue.cancel(job.id)
    elif end == "forget":
        await queue.forget(job.id)
    elif end == "purge":
        with Operations.connect(settings) as operations:
            operations.purge("queued", [job.id])
    else:  # by itself, or by somebody with no idea of ours: at the deadline
        if end == "rq":
            client.delete(f"rq:job:{job.id}")
        else:
            client.hset(f"rq:job:{job.id}", "meta", '{"schema":2,"model":"demo","priority":"normal","deadline":1}')
        client.zadd("darkroom:deadlines", {job.id: 1})
        await queue.reap()
    assert client.exists("darkroom:active:a") == 0
    await queue.submit(make_job(owner="a"), max_active=1)


async def test_job_in_a_new_life_counts_again(queue, settings, make_job):
    job = make_job(owner="a")
    await queue.submit(job, max_active=1)
    await queue.cancel(job.id)
    with Operations.connect(settings) as operations:
        operations.retry(job.id)
    with pytest.raises(TooManyJobs, match="1 job is queued or running"):
        await queue.submit(make_job(owner="a"), max_active=1)


async def test_page_is_the_owner_s_own_newest_first_and_goes_on_below_an_id(queue, make_job):
    mine = [make_job(owner="a", id=f"gen_{n:031x}") for n in range(5)]
    await submit_all(queue, *mine, make_job(owner="b", model="other"), make_job(model="other"))
    await queue.cancel(mine[4].id)
    page = await queue.page("a", limit=2)
    assert [(view.job, view.status) for view in page] == [(mine[4], "canceled"), (mine[3], "queued")]
    rest = await queue.page("a", limit=10, before=mine[3].id)
    assert [view.job.id for view in rest] == [job.id for job in reversed(mine[:3])]
    assert [view.position for view in rest] == [2, 1, 0]
    assert await queue.page("a", limit=10, before=mine[0].id) == []
    assert await queue.page("nobody", limit=10) == []


async def test_page_goes_on_below_a_job_that_is_gone(queue, make_job):
    jobs = [make_job(id=f"gen_{n:031x}") for n in range(3)]
    await submit_all(queue, *jobs)
    await queue.forget(jobs[1].id)
    assert [view.job.id for view in await queue.page("", limit=3, before=jobs[1].id)] == [jobs[0].id]


@pytest.mark.parametrize("before", ["", "x y", "\n", "x" * 100])
async def test_page_below_what_is_no_id_is_empty(queue, make_job, before):
    await queue.submit(make_job())
    assert await queue.page("", limit=3, before=before) == []


async def test_page_passes_over_jobs_whose_records_expired_and_lets_go_of_them(queue, make_job, client):
    jobs = [make_job(id=f"gen_{n:031x}") for n in range(6)]
    await submit_all(queue, *jobs)
    for job in jobs[1:5]:
        client.delete(f"rq:job:{job.id}")
    assert [view.job.id for view in await queue.page("", limit=2)] == [jobs[5].id, jobs[0].id]
    assert client.zcard("darkroom:owner:") == 2


async def test_page_leaves_out_what_a_newer_darkroom_wrote(queue, make_job):
    known = make_job()
    await submit_all(queue, make_job(schema=SCHEMA + 1), known)
    assert [view.job for view in await queue.page("", limit=9)] == [known]


async def test_owner_s_list_lets_go_of_expired_jobs_as_new_ones_come(queue, make_job, client):
    for job in [make_job(owner="a", id=f"gen_{n:031x}") for n in range(20)]:
        await queue.submit(job)
        client.delete(f"rq:job:{job.id}")
    assert client.zcard("darkroom:owner:a") <= 2


@pytest.mark.parametrize("state", ["queued", "running", "succeeded", "failed", "canceled"])
async def test_forgotten_job_leaves_nothing_behind(queue, intake, make_job, client, state):
    before = set(client.keys())
    job = make_job(owner="a")
    await queue.submit(job)
    await queue.watch(job.id)
    if state == "canceled":
        await queue.cancel(job.id)
    elif state != "queued":
        (claim,) = intake.claim(["demo"], 1)
        intake.preview(claim, 1, b"jpeg")
        if state != "running":
            intake.commit(claim, state, Result())
    assert await queue.forget(job.id)
    with pytest.raises(UnknownGeneration):
        await queue.view(job.id)
    left = {key for key in client.keys("*") if not key.startswith((b"darkroom:usage:", b"darkroom:untold:"))} - before
    assert left <= {b"rq:queues", b"darkroom:leases", b"darkroom:pictures", b"darkroom:ended"}
    assert await queue.forget(job.id) is False


async def test_worker_of_a_forgotten_job_is_told_to_stop_and_its_commit_refused(queue, intake, make_job):
    job = make_job()
    await queue.submit(job)
    (claim,) = intake.claim(["demo"], 1)
    await queue.forget(job.id)
    intake.renew(["demo"])
    assert intake.canceled() == {claim.key}
    assert not intake.commit(claim, "succeeded", Result())
    with pytest.raises(UnknownGeneration):
        await queue.view(job.id)


@pytest.mark.parametrize("job_id", ["gen_0", "", "a:b", "../x", "ü"])
async def test_forgetting_what_is_not_there_is_false(queue, job_id):
    assert await queue.forget(job_id) is False


async def test_secret_is_made_once_for_all_processes(queue, settings):
    other = JobQueue.connect(settings)
    first = await queue.secret()
    assert (len(first), await other.secret()) == (32, first)
    await other.close()


async def test_page_asks_in_short_scripts_where_many_are_gone(queue, make_job, client):
    first, last = make_job(id=f"gen_{0:031x}"), make_job(id=f"gen_{9999:031x}")
    await submit_all(queue, first, last)
    client.zadd("darkroom:owner:", {f"gen_{n:031x}": 0 for n in range(1, 5001)})
    client.config_resetstat()
    assert [view.job.id for view in await queue.page("", limit=2)] == [last.id, first.id]
    assert client.info("commandstats")["cmdstat_evalsha"]["calls"] == 3
    assert client.zcard("darkroom:owner:") == 2


async def test_owner_s_list_lives_as_long_as_the_longest_of_its_records(queue, settings, make_job, client):
    await queue.submit(kept := make_job())
    await queue.cancel(kept.id)
    brief = JobQueue.connect(settings.model_copy(update={"record_lifetime_s": 60}))
    await brief.submit(job := make_job())
    await brief.cancel(job.id)
    await brief.close()
    assert client.ttl("darkroom:owner:") > client.ttl(f"rq:job:{kept.id}") > 60
