from __future__ import annotations

import asyncio
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import redis

from worker.contract.errors import QueueUnavailable
from worker.contract.job import SCHEMA, Picture, Progress, Result
from worker.contract.settings import ContractSettings
from worker.intake import Intake

PICTURE = Picture(key="j/e/0.png", seed=7, width=64, height=64, format="png", bytes=10)


def until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


async def submit(queue, *jobs):
    for job in jobs:
        await queue.submit(job)
    return [job.id for job in jobs]


def ids(claims):
    return [claim.job.id for claim in claims]


async def test_claim_gives_the_job_and_marks_it_running(queue, intake, make_job):
    job = make_job()
    await queue.submit(job)
    (claim,) = intake.claim(["demo"], 4)
    assert claim.job == job
    assert claim.claimed_at == pytest.approx(time.time(), abs=5)
    assert 0 <= claim.queued_s < 5
    view = await queue.view(job.id)
    assert (view.status, view.position, view.started_at) == ("running", None, claim.claimed_at)


async def test_claim_of_nothing_is_empty(queue, intake, make_job):
    await queue.submit(make_job())
    assert intake.claim([], 4) == []
    assert intake.claim(["other"], 4) == []
    assert intake.claim(["demo"], 0) == []
    assert len(intake.claim(["demo"], 4)) == 1


async def test_high_goes_before_normal_before_low_and_first_come_first_served_within(queue, intake, make_job):
    low, normal1, normal2, high = (make_job(priority=p) for p in ("low", "normal", "normal", "high"))
    await submit(queue, low, normal1, normal2, high)
    assert ids(intake.claim(["demo"], 3)) == [high.id, normal1.id, normal2.id]
    assert ids(intake.claim(["demo"], 3)) == [low.id]


async def test_models_take_turns_within_one_claim(queue, intake, make_job):
    a = await submit(queue, *[make_job(model="a") for _ in range(4)])
    b = await submit(queue, *[make_job(model="b") for _ in range(1)])
    c = await submit(queue, *[make_job(model="c") for _ in range(2)])
    assert ids(intake.claim(["a", "b", "c"], 6)) == [a[0], b[0], c[0], a[1], c[1], a[2]]


async def test_models_take_turns_over_claims_of_one(queue, intake, make_job):
    a = await submit(queue, *[make_job(model="a") for _ in range(2)])
    b = await submit(queue, *[make_job(model="b") for _ in range(2)])
    assert [ids(intake.claim(["a", "b"], 1)) for _ in range(4)] == [[a[0]], [b[0]], [a[1]], [b[1]]]


async def test_busy_worker_leaves_a_new_job_to_one_that_has_none(queue, make_intake, make_job):
    job, *_ = await submit(queue, make_job())
    busy, idle = make_intake("w1"), make_intake("w2")
    assert busy.claim(["demo"], 4, spare_after_s=60) == []
    assert ids(idle.claim(["demo"], 4)) == [job]


async def test_busy_worker_takes_a_job_that_nobody_took(queue, intake, make_job):
    await submit(queue, make_job())
    until(lambda: intake.claim(["demo"], 4, spare_after_s=0.05))


async def test_busy_worker_takes_all_of_a_model_once_any_of_it_has_waited(queue, intake, make_job, client):
    old, low, new, high = make_job(), make_job(priority="low"), make_job(), make_job(priority="high")
    await submit(queue, make_job(model="other"), old, low, new, high)
    came_earlier(client, old, 61)
    assert ids(intake.claim(["other", "demo"], 9, spare_after_s=60)) == [high.id, old.id, new.id, low.id]


async def test_job_that_was_put_back_has_waited_since_it_came(queue, make_intake, make_job, client):
    job = make_job()
    await submit(queue, job)
    came_earlier(client, job, 61)
    first, second = make_intake("w1"), make_intake("w2")
    first.hand_back(first.claim(["demo"], 1))
    assert ids(second.claim(["demo"], 1, spare_after_s=60)) == [job.id]


def came_earlier(client, job, seconds):
    """As if the job had been submitted so long before."""
    entry = json.loads(client.hget("darkroom:open", job.id))
    entry["place"] = str(int(entry["place"]) - round(1e6 * seconds))
    client.hset("darkroom:open", job.id, json.dumps(entry))


async def test_no_job_is_claimed_twice_by_workers_at_once(queue, make_intake, make_job):
    submitted = await submit(queue, *[make_job() for _ in range(120)])
    workers = [make_intake(f"w{n}") for n in range(4)]

    def drain(worker):
        found = []
        while got := worker.claim(["demo"], 3):
            found += ids(got)
        return found

    with ThreadPoolExecutor(4) as pool:
        claimed = [job_id for found in pool.map(drain, workers) for job_id in found]
    assert sorted(claimed) == sorted(submitted)


async def test_job_of_an_unknown_schema_stays_queued_and_holds_up_nobody(queue, intake, make_job, client):
    newer = [make_job(schema=SCHEMA + 1) for _ in range(60)]
    await submit(queue, *newer[:59])
    known = make_job()
    await submit(queue, known, newer[59])
    assert ids(intake.claim(["demo"], 5)) == [known.id]
    assert client.lrange("rq:queue:darkroom.demo.normal", 0, -1) == [job.id.encode() for job in newer]
    assert client.hget(f"rq:job:{newer[0].id}", "status") == b"queued"


async def test_id_whose_job_is_gone_is_dropped_from_the_queue(queue, intake, make_job, client):
    gone, here = make_job(), make_job()
    await submit(queue, gone, here)
    client.delete(f"rq:job:{gone.id}")
    assert ids(intake.claim(["demo"], 1)) == [here.id]
    assert client.llen("rq:queue:darkroom.demo.normal") == 0


async def test_overdue_job_is_failed_by_a_claim_not_given(queue, intake, make_job):
    overdue, here = make_job(deadline=time.time() - 1), make_job()
    await submit(queue, here, overdue)
    assert ids(intake.claim(["demo"], 2)) == [here.id]
    assert (await queue.view(overdue.id)).result.failure.code == "deadline_exceeded"


async def test_job_with_a_broken_payload_fails_and_the_others_are_claimed(queue, intake, make_job, client):
    broken, here = make_job(), make_job()
    await submit(queue, broken, here)
    client.hset(f"rq:job:{broken.id}", "data", b"junk")
    assert ids(intake.claim(["demo"], 2)) == [here.id]
    assert client.hget(f"rq:job:{broken.id}", "status") == b"failed"
    assert b"payload_unreadable" in client.hget(f"rq:job:{broken.id}", "outcome")


async def test_committed_success_is_seen_with_its_result(queue, intake, make_job):
    await submit(queue, make_job())
    (claim,) = intake.claim(["demo"], 1)
    result = Result(pictures=(PICTURE,), warnings=("cut",), timings={"denoise": 0.5}, expires_at=time.time() + 60)
    assert intake.commit(claim, "succeeded", result)
    view = await queue.view(claim.job.id)
    assert (view.status, view.result) == ("succeeded", result)
    assert view.ended_at >= view.started_at


async def test_commit_of_another_execution_is_refused(queue, intake, make_job):
    await submit(queue, make_job())
    (claim,) = intake.claim(["demo"], 1)
    stale = replace(claim, execution="0" * 32)
    for status in ("succeeded", "failed", "canceled"):
        assert not intake.commit(stale, status, Result())
    assert (await queue.view(claim.job.id)).status == "running"
    assert intake.commit(claim, "succeeded", Result())


async def test_repeated_commit_answers_as_the_first_did(queue, intake, make_job):
    await submit(queue, make_job(), make_job())
    done, canceled = intake.claim(["demo"], 2)
    await queue.cancel(canceled.job.id)
    for _ in range(2):
        assert intake.commit(done, "succeeded", Result(pictures=(PICTURE,)))
        assert not intake.commit(canceled, "succeeded", Result(pictures=(PICTURE,)))
    assert (await queue.view(done.job.id)).result.pictures == (PICTURE,)


async def test_commit_of_a_job_that_is_gone_is_refused_and_leaves_nothing(queue, intake, make_job, client):
    await submit(queue, make_job())
    (claim,) = intake.claim(["demo"], 1)
    client.flushall()
    intake.progress({claim: Progress(step=1, steps=2)})
    assert not intake.commit(claim, "succeeded", Result())
    assert client.keys() == []


async def test_progress_under_another_execution_is_not_noted(queue, intake, make_job):
    await submit(queue, make_job())
    (claim,) = intake.claim(["demo"], 1)
    intake.progress({replace(claim, execution="0" * 32): Progress(step=1, steps=2)})
    assert (await queue.view(claim.job.id)).progress is None


async def test_events_of_a_job_tell_its_life_in_order_and_stay_few(queue, intake, make_job, client):
    await submit(queue, make_job())
    (claim,) = intake.claim(["demo"], 1)
    intake.progress({claim: Progress(step=1, steps=2)})
    intake.commit(claim, "succeeded", Result())
    told = [fields[b"event"] for _, fields in client.xrange(f"darkroom:events:{claim.job.id}")]
    assert told == [b"queued", b"running", b"progress", b"succeeded"]

    await submit(queue, make_job())
    (claim,) = intake.claim(["demo"], 1)
    for step in range(1000):
        intake.progress({claim: Progress(step=step, steps=1000)})
    assert client.xlen(f"darkroom:events:{claim.job.id}") < 500


async def test_cancel_reaches_the_worker_that_holds_the_job_once(queue, make_intake, make_job):
    await submit(queue, make_job(), make_job())
    mine, others = make_intake("w1"), make_intake("w2")
    (claim,), (other,) = mine.claim(["demo"], 1), others.claim(["demo"], 1)
    assert mine.canceled() == set()
    await queue.cancel(claim.job.id)
    mine.renew(["demo"])
    assert mine.canceled() == {claim.key}
    assert others.canceled() == set()
    assert mine.commit(claim, "canceled", Result())
    assert mine.canceled() == set()
    assert others.commit(other, "succeeded", Result())


def returns_within_10_s(thread):
    thread.join(10)
    return not thread.is_alive()


def start_waiting(intake):
    thread = threading.Thread(target=intake.wait, args=(60,), daemon=True)
    thread.start()
    return thread


async def test_wait_returns_when_a_job_is_submitted_or_is_to_stop(queue, intake, make_job):
    intake.wait(10)  # the listener has begun
    job = make_job()
    waiting = start_waiting(intake)
    await queue.submit(job)
    assert await asyncio.to_thread(returns_within_10_s, waiting)
    (claim,) = intake.claim(["demo"], 1)
    waiting = start_waiting(intake)
    await queue.cancel(job.id)
    assert await asyncio.to_thread(returns_within_10_s, waiting)
    assert intake.canceled() == {claim.key}


def test_wait_returns_when_woken_and_when_time_is_up(intake):
    intake.wait(10)
    intake.wait(0.01)
    waiting = start_waiting(intake)
    intake.wake()
    assert returns_within_10_s(waiting)


async def test_busy_worker_hears_of_a_job_once_it_may_claim_it(queue, intake, make_job):
    intake.wait(10)  # the listener has begun
    await submit(queue, make_job())
    began = time.monotonic()
    intake.wait(60, spare_after_s=0.3)
    assert 0.2 < time.monotonic() - began < 30
    assert len(intake.claim(["demo"], 1, spare_after_s=0.3)) == 1


async def test_busy_worker_hears_of_a_job_that_came_while_it_left_another_alone(queue, make_intake, make_job):
    busy, idle = make_intake("w1"), make_intake("w2")
    busy.wait(10)
    began, found = time.monotonic(), []
    await submit(queue, make_job())
    idle.claim(["demo"], 1)
    busy.wait(0.1, spare_after_s=0.5)
    await submit(queue, make_job())
    while not found:
        busy.wait(60, spare_after_s=0.5)
        found = busy.claim(["demo"], 1, spare_after_s=0.5)
    assert time.monotonic() - began < 30


class AnswerLost(redis.Redis):
    """Redis does what it is told, but the answer to the next claim never arrives."""

    losing = False

    def evalsha(self, *args):
        answer = super().evalsha(*args)
        if self.losing:
            self.losing = False
            raise redis.TimeoutError
        return answer


async def test_jobs_of_a_claim_whose_answer_was_lost_go_back_at_the_next_renewal(queue, redis_url, make_job):
    client = AnswerLost.from_url(redis_url)
    intake = Intake(client, "w1")
    held, lost, waiting = [make_job() for _ in range(3)]
    await submit(queue, held)
    assert ids(intake.claim(["demo"], 1)) == [held.id]
    await submit(queue, lost, waiting)
    client.losing = True
    with pytest.raises(QueueUnavailable):
        intake.claim(["demo"], 1)
    assert (await queue.view(lost.id)).status == "running"
    intake.renew(["demo"])
    assert (await queue.view(lost.id)).status == "queued"
    assert ids(intake.claim(["demo"], 2)) == [lost.id, waiting.id]
    intake.close()


async def test_intake_says_that_redis_is_away_and_goes_on_when_it_is_back(own_valkey, make_job):
    intake = Intake.connect(ContractSettings(redis_url=own_valkey.url), "w1")
    intake.renew(["demo"])
    intake.wait(10)
    own_valkey.stop()
    for call in (
        lambda: intake.claim(["demo"], 1),
        lambda: intake.renew(["demo"]),
        lambda: intake.retire(),
    ):
        with pytest.raises(QueueUnavailable):
            call()
    own_valkey.start()
    assert intake.claim(["demo"], 1) == []
    with redis.Redis.from_url(own_valkey.url) as client:
        until(lambda: client.pubsub_numsub("darkroom:submitted") == [(b"darkroom:submitted", 1)])
    intake.close()
