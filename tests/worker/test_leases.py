"""Jobs of workers that are gone, frozen or leaving are run by others, each to one end."""

from __future__ import annotations

import time

import pytest
import redis

from worker.contract.errors import QueueUnavailable
from worker.contract.job import Result
from worker.contract.settings import ContractSettings
from worker.contract.transitions import script
from worker.intake import Intake

MANY = 8


async def submit(queue, *jobs):
    for job in jobs:
        await queue.submit(job)


async def status(queue, *jobs):
    return [(await queue.view(job.id)).status for job in jobs]


def ids(claims):
    return [claim.job.id for claim in claims]


def lapse(client, worker):
    """As if the worker had said nothing for longer than its lease, while somebody kept looking."""
    client.zadd("darkroom:leases", {worker: time.time() - 1})
    client.set("darkroom:reaped_at", time.time())


async def test_jobs_of_a_worker_whose_lease_lapsed_are_given_to_another(queue, make_intake, make_job, client):
    jobs = [make_job() for _ in range(2)]
    await submit(queue, *jobs)
    gone, other = make_intake("gone"), make_intake("other")
    late = gone.claim(["demo"], MANY)
    lapse(client, "gone")
    assert await queue.reap() == (0, 2)
    assert await status(queue, *jobs) == ["queued", "queued"]
    while claims := other.claim(["demo"], MANY):
        assert all(other.commit(claim, "succeeded", Result()) for claim in claims)
    assert await status(queue, *jobs) == ["succeeded", "succeeded"]
    assert not any(gone.commit(claim, "failed", Result()) for claim in late)
    assert await status(queue, *jobs) == ["succeeded", "succeeded"]


async def test_a_worker_that_renews_keeps_its_jobs(queue, intake, make_job, client):
    await submit(queue, make_job())
    (claim,) = intake.claim(["demo"], MANY)
    lapse(client, "w1")
    intake.renew(["demo"])
    assert await queue.reap() == (0, 0)
    assert intake.commit(claim, "succeeded", Result())


async def test_a_worker_that_wakes_after_its_lease_is_told_that_its_jobs_are_no_longer_its_own(
    queue, make_intake, make_job, client
):
    await submit(queue, make_job())
    asleep, other = make_intake("asleep"), make_intake("other")
    (claim,) = asleep.claim(["demo"], MANY)
    lapse(client, "asleep")
    await queue.reap()
    (taken,) = other.claim(["demo"], MANY)
    asleep.renew(["demo"])
    assert asleep.canceled() == {claim.key}
    assert not asleep.commit(claim, "succeeded", Result())
    assert other.commit(taken, "succeeded", Result())


async def test_nobody_is_reaped_right_after_a_time_in_which_nobody_could_renew(queue, intake, make_job, client):
    await submit(queue, make_job())
    intake.claim(["demo"], MANY)
    lapse(client, "w1")
    client.set("darkroom:reaped_at", time.time() - 60)
    assert await queue.reap() == (0, 0)
    assert client.zscore("darkroom:leases", "w1") > time.time() + 1


async def test_a_reaper_that_seldom_comes_reaps_too(queue, intake, make_job, client):
    await submit(queue, make_job())
    intake.claim(["demo"], MANY)
    lapse(client, "w1")
    for _ in range(2):
        client.set("darkroom:reaped_at", time.time() - 60)
        client.zadd("darkroom:leases", {"w1": time.time() - 1})
        _, taken = await queue.reap()
    assert taken == 1


async def test_jobs_of_a_dead_worker_run_again_in_halves_apart_from_all_else(queue, make_intake, make_job):
    held, later = [make_job() for _ in range(5)], make_job()
    await submit(queue, *held)
    dead, busy, idle = (make_intake(name) for name in ("dead", "busy", "idle"))
    dead.claim(["demo"], MANY)
    await submit(queue, later)
    (one,) = busy.claim(["demo"], 1)
    assert idle.bury("dead", 3) == 5
    assert busy.claim(["demo"], MANY) == []  # not beside the one that it holds
    first = idle.claim(["demo"], MANY)
    assert (ids(first), [claim.suspect for claim in first]) == (ids_of(held[:3]), [True] * 3)
    assert idle.claim(["demo"], MANY) == []
    busy.commit(one, "succeeded", Result())
    assert ids(busy.claim(["demo"], MANY)) == ids_of(held[3:])
    for claim in first:
        idle.commit(claim, "succeeded", Result())


def ids_of(jobs):
    return [job.id for job in jobs]


async def test_only_the_job_that_kills_its_worker_fails_and_only_after_dying_alone_as_often_as_allowed(
    queue, make_intake, make_job, client
):
    jobs = [make_job() for _ in range(20)]
    poison = jobs[13].id
    await submit(queue, *jobs)
    undertaker, deaths = make_intake("undertaker"), []
    for n in range(100):
        worker = make_intake(f"w{n}")
        claims = worker.claim(["demo"], MANY)
        if not claims:
            break
        if poison in ids(claims):
            deaths.append(len(claims))
            undertaker.bury(f"w{n}", 3)
        else:
            assert all(worker.commit(claim, "succeeded", Result()) for claim in claims)
    views = [await queue.view(job.id) for job in jobs]
    assert [view.job.id for view in views if view.status == "failed"] == [poison]
    assert views[13].result.failure.code == "worker_lost"
    assert sum(view.status == "succeeded" for view in views) == 19
    assert deaths[-4:] != [1, 1, 1, 1]
    assert deaths[-3:] == [1, 1, 1]
    assert client.keys("darkroom:suspects:*") + client.keys("darkroom:held:*") == []


async def test_a_lapsed_lease_is_not_held_against_a_job_that_was_alone(queue, make_intake, make_job, client):
    job = make_job()
    await submit(queue, job)
    for n in range(5):
        (claim,) = make_intake(f"w{n}").claim(["demo"], MANY)
        lapse(client, f"w{n}")
        await queue.reap()
    assert claim.suspect
    assert await status(queue, job) == ["queued"]


async def test_a_job_that_hangs_its_worker_each_time_fails_though_the_lease_lapses_first(
    queue, make_intake, make_job, client
):
    poison = make_job()
    await submit(queue, poison)
    for n in range(3):
        (claim,) = make_intake(f"w{n}").claim(["demo"], MANY)
        lapse(client, f"w{n}")
        await queue.reap()
        assert await status(queue, poison) == ["queued"]
        make_intake("supervisor").bury(f"w{n}", 3)
    assert claim.suspect
    view = await queue.view(poison.id)
    assert (view.status, view.result.failure.code) == ("failed", "worker_lost")
    assert client.keys("darkroom:lost:*") == []


async def test_a_worker_that_came_back_did_not_die_of_what_it_had_lost(queue, make_intake, make_job, client):
    job = make_job()
    await submit(queue, job)
    worker = make_intake("w1")
    worker.claim(["demo"], MANY)
    lapse(client, "w1")
    await queue.reap()
    worker.renew(["demo"])
    make_intake("supervisor").bury("w1", 1)
    assert await status(queue, job) == ["queued"]


async def test_suspects_that_have_waited_for_long_go_before_what_always_comes(queue, make_intake, make_job, client):
    suspect = make_job(priority="normal")
    await submit(queue, suspect)
    dead, busy, other = (make_intake(name) for name in ("dead", "busy", "other"))
    dead.claim(["demo"], MANY)
    await submit(queue, *[make_job(priority="high") for _ in range(4)])
    (first,), _ = busy.claim(["demo"], 1), other.claim(["demo"], 1)
    make_intake("supervisor").bury("dead", 3)
    (second,) = busy.claim(["demo"], 1)
    (group,) = client.keys("darkroom:suspects:*")
    client.expire(group, client.ttl(group) - 31)
    assert busy.claim(["demo"], 1) == []  # it yields
    assert len(other.claim(["demo"], 1)) == 1  # and nobody else does
    await submit(queue, make_job(priority="high"))
    for claim in (first, second):
        busy.commit(claim, "succeeded", Result())
    assert ids(busy.claim(["demo"], MANY)) == [suspect.id]


async def test_jobs_handed_back_are_the_next_in_their_old_order_and_are_no_suspects(queue, make_intake, make_job):
    first, second, third = (make_job() for _ in range(3))
    await submit(queue, first, second, third)
    leaving, other = make_intake("leaving"), make_intake("other")
    leaving.hand_back(leaving.claim(["demo"], 2))
    claims = other.claim(["demo"], MANY)
    assert ids(claims) == ids_of([first, second, third])
    assert not any(claim.suspect for claim in claims)


class NeverHandsBack(redis.Redis):
    """Redis is away whenever jobs are to be handed back."""

    def evalsha(self, sha, *args):
        if sha == self.register_script(script("hand_back")).sha:
            raise redis.ConnectionError
        return super().evalsha(sha, *args)


async def test_jobs_that_could_not_be_handed_back_go_back_at_the_next_renewal(queue, redis_url, make_job):
    intake = Intake(NeverHandsBack.from_url(redis_url), "w1")
    kept, given = make_job(), make_job()
    await submit(queue, kept, given)
    claims = intake.claim(["demo"], MANY)
    with pytest.raises(QueueUnavailable):
        intake.hand_back(claims[1:])
    assert await status(queue, kept, given) == ["running", "running"]
    intake.renew(["demo"])
    assert await status(queue, kept, given) == ["running", "queued"]
    intake.close()


async def test_a_job_that_was_to_stop_ends_as_canceled_when_its_worker_dies(queue, intake, make_intake, make_job):
    job = make_job()
    await submit(queue, job)
    intake.claim(["demo"], MANY)
    await queue.cancel(job.id)
    make_intake("w2").bury("w1", 3)
    assert await status(queue, job) == ["canceled"]


async def test_a_worker_that_retires_leaves_nothing_behind(queue, intake, make_job, client):
    job = make_job()
    await submit(queue, job)
    intake.renew(["demo"])
    intake.claim(["demo"], MANY)
    intake.retire()
    assert await status(queue, job) == ["queued"]
    assert client.zcard("darkroom:leases") == 0
    assert await queue.workers() == {}


async def test_suspects_of_models_that_a_worker_does_not_hold_wait_for_another(queue, make_intake, make_job):
    a, b = make_job(model="a"), make_job(model="b")
    await submit(queue, a, b)
    dead, only_a, only_b = (make_intake(name) for name in ("dead", "only_a", "only_b"))
    assert len(dead.claim(["a", "b"], MANY)) == 2
    only_a.bury("dead", 3)
    assert ids(only_a.claim(["a"], MANY)) == [a.id]
    assert ids(only_b.claim(["b"], MANY)) == [b.id]


async def test_jobs_of_a_paused_model_are_not_claimed(queue, intake, make_job, client):
    await submit(queue, make_job(model="a"), make_job(model="b"))
    client.sadd("darkroom:paused", "a")
    assert [claim.job.model for claim in intake.claim(["a", "b"], MANY)] == ["b"]


def test_every_lease_call_says_that_redis_is_away(make_job):
    intake = Intake.connect(ContractSettings(redis_url="redis://127.0.0.1:1/0"), "w1")
    calls = (lambda: intake.renew(["demo"]), intake.reap, intake.retire, lambda: intake.bury("w2", 3))
    for call in calls:
        with pytest.raises(QueueUnavailable):
            call()
