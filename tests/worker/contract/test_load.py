"""How much work there is and how long a job would wait; what was used; whose pictures are to go."""

from __future__ import annotations

import itertools
import json
import time
from datetime import UTC, datetime

import pytest

from tests.worker.contract.test_queue import card
from worker.contract.errors import QueueFull, TooManyJobs
from worker.contract.job import Failure, Result
from worker.contract.load import ASSUMED_SPEED, Load
from worker.contract.operations import Operations
from worker.contract.queue import JobQueue
from worker.contract.usage import Usage

WORK = 64 * 64 * 2 / 1e6  # megapixel-steps of one job of make_job
GIVEN = {"model": "demo", "priority": "normal"}


def near(seconds):
    return pytest.approx(seconds, rel=1e-6)


async def fill(queue, make_job, count, **fields):
    jobs = [make_job(**fields) for _ in range(count)]
    for job in jobs:
        await queue.submit(job)
    return jobs


def test_work_counts_pixels_steps_rows_and_pictures(make_job):
    job = make_job(num_images=3)
    assert job.pixel_steps / 1e6 == near(3 * WORK)


async def test_wait_is_what_waits_by_the_speed_of_all_workers(queue, make_intake, make_job):
    for name, speed in (("w1", WORK), ("w2", 3 * WORK)):
        make_intake(name).renew(["demo"], {"demo": speed})
    assert await queue.expected_wait(**GIVEN) == 0
    await fill(queue, make_job, 8)
    assert await queue.expected_wait(**GIVEN) == near(2.0)
    assert await queue.expected_wait("demo", "high") == 0
    assert await queue.expected_wait("demo", "low") == near(2.0)


async def test_wait_is_for_room_where_jobs_run(queue, intake, make_job):
    intake.renew(["demo"], {"demo": WORK})
    await fill(queue, make_job, 4)
    claims = intake.claim(["demo"], 2)
    assert await queue.expected_wait(**GIVEN) == near(2.0 + 1.0)
    for claim in claims:
        intake.commit(claim, "succeeded", Result())
    assert await queue.expected_wait(**GIVEN) == near(2.0)


async def test_wait_is_unknown_without_a_worker_or_a_measure(queue, intake, make_job):
    assert await queue.expected_wait(**GIVEN) is None
    intake.renew(["demo"])
    assert await queue.expected_wait(**GIVEN) is None
    intake.renew(["demo"], {"demo": 1.0})
    assert await queue.expected_wait(**GIVEN) == 0
    intake.retire()
    assert await queue.expected_wait(**GIVEN) is None


async def test_worker_that_has_not_measured_yet_is_taken_to_be_as_fast_as_the_last(queue, make_intake, make_job):
    make_intake("w1").renew(["demo"], {"demo": WORK})
    make_intake("w2").renew(["demo"])
    await fill(queue, make_job, 4)
    assert await queue.expected_wait(**GIVEN) == near(2.0)


async def test_new_owner_waits_for_its_turn_not_for_all(queue, intake, make_job):
    intake.renew(["demo"], {"demo": WORK})
    await fill(queue, make_job, 10, owner="a")
    assert await queue.expected_wait("demo", "normal", "a") == near(10.0)
    assert await queue.expected_wait("demo", "normal", "b") <= 2.0
    assert await queue.expected_wait(**GIVEN) == near(10.0)


async def test_models_of_one_worker_wait_for_each_other(queue, intake, make_job):
    intake.renew(["demo", "other"], {"demo": WORK, "other": WORK})
    await fill(queue, make_job, 2)
    await fill(queue, make_job, 10, model="other")
    assert await queue.expected_wait("demo", "normal") == near(2.0 + 2.0)
    assert await queue.expected_wait("other", "normal") == near(10.0 + 2.0)


async def test_outstanding_is_queued_and_running_work_by_known_model(queue, intake, make_job):
    intake.publish([card("demo"), card("other"), card("idle")])
    intake.renew(["demo", "other", "idle"], {"demo": 2 * WORK, "idle": 1.0})
    await fill(queue, make_job, 4)
    await fill(queue, make_job, 1, model="other")
    intake.claim(["demo"], 1)
    survey = await queue.survey()
    assert {model: survey.load.outstanding_s(model) for model in survey.models} == {
        "demo": near(2.0),
        "idle": 0.0,
        "other": near(WORK / ASSUMED_SPEED),  # of which nothing was ever measured
    }
    intake.retire()
    survey = await queue.survey()
    assert survey.load.outstanding_s("demo") == near(2.0)  # a worker as fast as the last would need as long
    assert survey.workers("demo") == 0


async def test_survey_tells_how_long_the_oldest_job_waits_also_of_those_put_back(queue, intake, make_job, client):
    intake.publish([card("demo")])
    jobs = await fill(queue, make_job, 3)
    for job, at in zip(jobs, ("2020-01-01T00:00:03.000000Z", "2020-01-01T00:00:01.000000Z", None), strict=True):
        if at:
            client.hset(f"rq:job:{job.id}", "enqueued_at", at)
    survey = await queue.survey()
    assert survey.oldest_s["demo", "normal"] == pytest.approx(time.time() - 1_577_836_801, abs=60)
    assert survey.oldest_s["demo", "high"] == 0
    claims = intake.claim(["demo"], 2)
    assert (await queue.survey()).oldest_s["demo", "normal"] < 60
    intake.hand_back(claims)
    assert (await queue.survey()).oldest_s["demo", "normal"] > 1e6


async def test_survey_counts_how_jobs_ended_whoever_ended_them(queue, intake, make_job):
    assert (await queue.survey()).ended == {}
    await fill(queue, make_job, 3)
    done, broken, _running = intake.claim(["demo"], 3)
    intake.commit(done, "succeeded", Result())
    intake.commit(broken, "failed", Result(failure=Failure(code="non_finite", message="it is")))
    (waiting,) = await fill(queue, make_job, 1)
    await queue.cancel(waiting.id)
    await fill(queue, make_job, 2, model="other", deadline=1.0)
    await queue.reap()
    assert (await queue.survey()).ended == {
        ("demo", "succeeded", ""): 1,
        ("demo", "failed", "non_finite"): 1,
        ("demo", "canceled", ""): 1,
        ("other", "failed", "deadline_exceeded"): 2,
    }


async def test_survey_of_many_models_is_one_command(queue, intake, make_job, client):
    intake.publish([card(f"model{n}") for n in range(5)])
    await fill(queue, make_job, 2, model="model1")
    await queue.survey()  # from now on Redis knows the script
    with client.monitor() as monitor:
        survey = await queue.survey()
        client.echo("enough")
        heard = itertools.takewhile(lambda said: "enough" not in said["command"], monitor.listen())
        sent = [said["command"].split()[0] for said in heard if said["client_type"] != "lua"]
    assert [command for command in sent if command not in ("HELLO", "CLIENT")] == ["EVALSHA"]  # those: our own echo's
    assert len(survey.waiting) == 15
    assert len(survey.models) == 5


async def test_full_queue_tells_when_to_come_back_by_its_work(settings, intake, make_job):
    queue = JobQueue.connect(settings.model_copy(update={"queue_bound": 3}))
    await fill(queue, make_job, 3)
    for speed, seconds in ((WORK / 6.9, 21), (WORK / 1e5, 3600), (1e6, 1)):
        intake.renew(["demo"], {"demo": speed})
        with pytest.raises(QueueFull) as caught:
            await queue.submit(make_job())
        assert caught.value.retry_after_s == seconds
    await queue.close()


async def test_owner_with_too_many_jobs_is_told_when_to_come_back(queue, intake, make_job):
    intake.renew(["demo"], {"demo": WORK / 6.9})
    await queue.submit(make_job(owner="a"), max_active=1)
    with pytest.raises(TooManyJobs) as caught:
        await queue.submit(make_job(owner="a"), max_active=1)
    assert caught.value.retry_after_s == 7


def test_load_of_nothing_is_read():
    load = Load.from_json('{"workers":{},"speed":{},"load":{}}')
    assert (load.speed("demo"), load.wait_s("demo", "normal"), load.outstanding_s("demo")) == (None, None, 0)


def today():
    return datetime.now(UTC).date().isoformat()


async def test_usage_counts_what_was_done_by_owner_and_model(queue, intake, make_job):
    await fill(queue, make_job, 1, owner="a", num_images=3)
    await fill(queue, make_job, 2, owner="b")
    await fill(queue, make_job, 1, owner="b", model="other")
    ending = {"a": "succeeded", "b": "failed"}
    for claim in intake.claim(["demo", "other"], 9):
        failure = Failure(code="x", message="y")
        intake.commit(claim, ending[claim.job.owner], Result(gpu_seconds=1.25, failure=failure))
    (canceled,) = await fill(queue, make_job, 1, owner="b")
    await queue.cancel(canceled.id)
    day = today()
    assert await queue.usage(7) == [
        Usage(day=day, owner="a", model="demo", jobs=1, pictures=3, megapixel_steps=near(3 * WORK), gpu_seconds=1.25),
        Usage(day=day, owner="b", model="demo", jobs=3, pictures=0, megapixel_steps=0.0, gpu_seconds=2.5),
        Usage(day=day, owner="b", model="other", jobs=1, pictures=0, megapixel_steps=0.0, gpu_seconds=1.25),
    ]


@pytest.fixture
def run(queue, intake, make_job):
    """Submits a job and starts it."""

    async def run(**fields):
        await queue.submit(make_job(owner="a", **fields))
        (claim,) = intake.claim(["demo"], 1)
        return claim

    return run


def let_deadline_pass(client, job):
    meta = json.loads(client.hget(f"rq:job:{job.id}", "meta"))
    client.hset(f"rq:job:{job.id}", "meta", json.dumps(meta | {"deadline": 1.0}))


async def gpu_seconds(queue):
    (row,) = await queue.usage(1)
    return row.jobs, row.gpu_seconds


async def test_usage_counts_the_gpu_of_a_success_that_was_canceled(queue, intake, run):
    claim = await run()
    await queue.cancel(claim.job.id)
    for _ in range(2):
        assert not intake.commit(claim, "succeeded", Result(gpu_seconds=1.25))
    assert await gpu_seconds(queue) == (1, 1.25)


async def test_usage_counts_the_gpu_of_a_success_that_came_too_late(queue, intake, run, client):
    claim = await run()
    let_deadline_pass(client, claim.job)
    for _ in range(2):
        assert not intake.commit(claim, "succeeded", Result(gpu_seconds=1.25))
    assert await gpu_seconds(queue) == (1, 1.25)


@pytest.mark.parametrize("status", ["succeeded", "failed"])
async def test_usage_counts_the_gpu_of_a_job_that_its_deadline_ended(queue, intake, run, client, status):
    claim = await run()
    let_deadline_pass(client, claim.job)
    assert (await queue.view(claim.job.id)).status == "failed"
    for _ in range(2):
        intake.commit(claim, status, Result(gpu_seconds=1.25, failure=Failure(code="x", message="y")))
    assert await gpu_seconds(queue) == (1, 1.25)


async def test_usage_counts_the_gpu_of_a_committed_job_once(queue, intake, run):
    claim = await run()
    for _ in range(2):
        assert intake.commit(claim, "succeeded", Result(gpu_seconds=1.25))
    assert await gpu_seconds(queue) == (1, 1.25)


async def test_usage_counts_the_gpu_of_an_earlier_life_once(queue, intake, make_intake, run, client, settings):
    stale = await run()
    let_deadline_pass(client, stale.job)
    await queue.view(stale.job.id)
    with Operations.connect(settings) as operations:
        assert operations.retry(stale.job.id).position == 0
    (claim,) = make_intake("w2").claim(["demo"], 1)
    assert claim.job.id == stale.job.id
    for _ in range(2):
        assert not intake.commit(stale, "succeeded", Result(gpu_seconds=1.25))
    assert await gpu_seconds(queue) == (1, 1.25)


async def test_usage_counts_the_gpu_of_a_job_that_was_forgotten_while_it_ran(queue, intake, run, client):
    claim = await run()
    await queue.forget(claim.job.id)
    for _ in range(2):
        assert not intake.commit(claim, "canceled", Result(gpu_seconds=1.25))
    assert await gpu_seconds(queue) == (1, 1.25)
    assert not client.keys("darkroom:untold:*")


async def test_usage_outlives_the_job_and_is_of_the_days_asked_for(queue, make_job, client):
    (job,) = await fill(queue, make_job, 1, owner='"; a')
    await queue.forget(job.id)
    (key,) = client.keys("darkroom:usage:*")
    client.rename(key, "darkroom:usage:2020-01-01")
    assert await queue.usage(90) == []
    client.rename("darkroom:usage:2020-01-01", key)
    (row,) = await queue.usage(1)
    assert (row.owner, row.jobs) == ('"; a', 1)
    assert 89 * 86_400 < client.ttl(key) <= 91 * 86_400


async def expired(queue):
    """All that are given now."""
    given = []
    while one := await queue.expired_pictures(60):
        given.append(one)
    return given


async def test_pictures_expire_at_their_time_and_are_given_to_one_that_deletes_them(queue, intake, make_job, client):
    jobs = await fill(queue, make_job, 3)
    now = time.time()
    for claim, expires_at in zip(intake.claim(["demo"], 3), (now - 2, now - 1, now + 100), strict=True):
        intake.commit(claim, "succeeded", Result(expires_at=expires_at))
    given = await expired(queue)
    assert [one.job_id for one in given] == [jobs[0].id, jobs[1].id]
    assert [await queue.pictures_deleted(one) for one in given] == [True, True]
    assert client.zrange("darkroom:pictures", 0, -1) == [jobs[2].id.encode()]


async def test_pictures_that_nobody_deleted_in_time_are_given_to_another(queue, intake, make_job, client):
    (job,) = await fill(queue, make_job, 1)
    (claim,) = intake.claim(["demo"], 1)
    intake.commit(claim, "succeeded", Result(expires_at=time.time() - 1))
    late = await queue.expired_pictures(60)
    assert await queue.expired_pictures(60) is None
    client.zincrby("darkroom:pictures", -60, job.id)
    again = await queue.expired_pictures(60)
    assert again.job_id == job.id
    assert not await queue.pictures_deleted(late)
    assert await queue.pictures_deleted(again)
    assert client.keys("darkroom:pictures") == []


async def test_what_a_failed_or_forgotten_job_may_have_stored_goes_soon(queue, intake, make_job, client):
    jobs = await fill(queue, make_job, 3)
    failed, forgotten, running = intake.claim(["demo"], 3)
    intake.commit(failed, "failed", Result())
    intake.commit(forgotten, "succeeded", Result(expires_at=time.time() + 1e6))
    for claim in (forgotten, running):
        await queue.forget(claim.job.id)
    assert await expired(queue) == []
    for job in jobs:
        client.zincrby("darkroom:pictures", -601, job.id)
    assert {one.job_id for one in await expired(queue)} == {job.id for job in jobs}


async def test_pictures_of_a_job_in_a_new_life_are_not_those_that_expire(queue, intake, settings, make_job, client):
    (job,) = await fill(queue, make_job, 1)
    (claim,) = intake.claim(["demo"], 1)
    intake.commit(claim, "failed", Result())
    with Operations.connect(settings) as operations:
        operations.retry(job.id)
    assert client.zscore("darkroom:pictures", job.id) is None


async def test_pictures_of_a_new_life_stay_listed_when_those_of_the_last_are_deleted(
    queue, intake, settings, make_job, client
):
    (job,) = await fill(queue, make_job, 1)
    (claim,) = intake.claim(["demo"], 1)
    intake.commit(claim, "failed", Result())
    client.zincrby("darkroom:pictures", -601, job.id)
    leftovers = await queue.expired_pictures(60)
    with Operations.connect(settings) as operations:
        operations.retry(job.id)
    (claim,) = intake.claim(["demo"], 1)
    intake.commit(claim, "succeeded", Result(expires_at=2e9))
    assert not await queue.pictures_deleted(leftovers)
    assert client.zscore("darkroom:pictures", job.id) == 2e9
