"""A Redis that is full refuses new jobs; those that it has go on, and end."""

from __future__ import annotations

import json

import pytest

from worker.contract.cards import Defaults, ModelCard
from worker.contract.errors import QueueUnavailable
from worker.contract.job import Failure, Progress, Result, Webhook
from worker.contract.keys import Keyring, Keys, new_key
from worker.contract.operations import Operations
from worker.contract.outbox import Outbox

CARD = ModelCard(
    name="demo",
    description="small",
    variant="other",
    revision="r1",
    parameters=1,
    defaults=Defaults(steps=2, guidance_scale=1.0),
)


@pytest.fixture
def redis_url(own_valkey):
    """A server of each test's own, which it may fill."""
    return own_valkey.url


@pytest.fixture
def fill(client):
    """Leaves no room in Redis."""
    return lambda: client.config_set("maxmemory", 1)


async def test_new_job_is_refused(queue, make_job, fill, client):
    fill()
    with pytest.raises(QueueUnavailable) as refused:
        await queue.submit(make_job())
    assert "used memory" in str(refused.value.__cause__)
    assert client.keys() == []


async def test_failed_job_is_retried(queue, intake, settings, make_job, fill):
    job = make_job()
    await queue.submit(job)
    (claim,) = intake.claim(["demo"], 1)
    intake.commit(claim, "failed", Result(failure=Failure(code="x", message="y")))
    fill()
    with Operations.connect(settings) as operations:
        assert operations.retry(job.id).position == 0


async def test_waiting_job_is_done(queue, intake, make_job, fill):
    job = make_job()
    await queue.submit(job)
    fill()
    intake.renew(["demo"], {"demo": 1.0})
    (claim,) = intake.claim(["demo"], 1)
    intake.progress({claim: Progress(step=1, steps=2)})
    intake.preview(claim, 1, b"jpeg")
    assert await queue.preview(job.id) == b"jpeg"
    assert intake.commit(claim, "succeeded", Result())
    assert (await queue.view(job.id)).status == "succeeded"


async def test_jobs_are_shown_canceled_and_forgotten(queue, intake, make_job, fill, client):
    running, waiting, other = [make_job(owner="a") for _ in range(3)]
    for job in (running, waiting, other):
        await queue.submit(job)
    intake.claim(["demo"], 1)
    fill()
    assert {view.job.id for view in await queue.page("a", limit=5)} == {running.id, waiting.id, other.id}
    assert (await queue.cancel(waiting.id)).status == "canceled"
    await queue.cancel(running.id)
    intake.renew(["demo"])
    assert [key.partition(":")[0] for key in intake.canceled()] == [running.id]
    for job in (running, other):
        assert await queue.forget(job.id)
        assert not client.exists(f"rq:job:{job.id}")


async def test_late_jobs_end_when_they_are_looked_at(queue, intake, make_job, fill, client):
    running, waiting = make_job(), make_job()
    await queue.submit(running)
    intake.claim(["demo"], 1)
    await queue.submit(waiting)
    for job in (running, waiting):
        meta = json.loads(client.hget(f"rq:job:{job.id}", "meta"))
        client.hset(f"rq:job:{job.id}", "meta", json.dumps(meta | {"deadline": 1.0}))
    fill()
    assert [(await queue.view(job.id)).status for job in (running, waiting)] == ["failed", "failed"]


async def test_jobs_of_a_worker_that_is_gone_go_back(queue, intake, make_intake, make_job, fill):
    jobs = [make_job() for _ in range(3)]
    for job in jobs:
        await queue.submit(job)
    fill()
    claims = intake.claim(["demo"], 2)
    intake.hand_back(claims[1:])
    other = make_intake("w2")
    assert other.bury("w1", 3) == 1
    other.reap()
    await queue.reap()
    assert len(other.claim(["demo"], 3)) == 1  # a suspect
    other.retire()
    assert {(await queue.view(job.id)).status for job in jobs} == {"queued"}


async def test_webhooks_are_told_and_pictures_expire(queue, intake, settings, make_job, fill):
    await queue.submit(make_job(webhook=Webhook(url="http://receiver/")))
    (claim,) = intake.claim(["demo"], 1)
    fill()
    intake.commit(claim, "succeeded", Result(expires_at=1.0))
    outbox = Outbox.connect(settings)
    (entry,) = await outbox.due("sender", 5, 60)
    await outbox.done(entry, {"status": 200})
    assert await outbox.waiting() == 0
    given = await queue.expired_pictures(60)
    assert await queue.pictures_deleted(given)
    await outbox.close()


async def test_what_only_reads_answers_where_nothing_may_be_written(queue, settings, make_job, client):
    job = make_job()
    await queue.submit(job)
    client.config_set("min-replicas-to-write", 1)
    with pytest.raises(QueueUnavailable):
        await queue.submit(make_job())
    assert (await queue.view(job.id)).status == "queued"
    assert len(await queue.page("", limit=5)) == 1
    await queue.survey()
    assert await queue.expected_wait("demo", "normal") is None
    with Operations.connect(settings) as operations:
        operations.status()


async def test_worker_starts_and_publishes_its_models(queue, intake, fill):
    fill()
    intake.publish([CARD])
    intake.renew(["demo"])
    assert set(await queue.cards()) == {"demo"}
    assert await queue.workers() == {"demo": 1}


async def test_keys_are_used_added_and_revoked(settings, fill):
    key, _ = new_key("one")
    other, _ = new_key("two")
    with Keyring.connect(settings) as ring:
        ring.add(key)
        fill()
        keys = Keys.connect(settings)
        await keys.note_use(key.id)
        await keys.close()
        assert ring.add(other)
        assert ring.limit("one", max_active=1) is not None
        assert ring.revoke("one") is not None
        assert [known.revoked_at is None for known in ring.known()] == [False, True]
        assert ring.used()[key.id] > 0


async def test_models_are_paused_and_drained(queue, intake, settings, make_job, fill):
    await queue.submit(make_job())
    fill()
    with Operations.connect(settings) as operations:
        operations.pause(["demo"])
        assert intake.claim(["demo"], 1) == []
        operations.drain(["demo"])
        (model,) = operations.status().models
        assert (model.paused, model.draining) == (False, True)
        assert len(intake.claim(["demo"], 1)) == 1


async def test_previews_are_asked_for_and_jobs_are_left_to_be_adopted(queue, intake, make_job, fill):
    job = make_job()
    await queue.submit(job)
    (claim,) = intake.claim(["demo"], 1)
    fill()
    await queue.watch(job.id)
    assert intake.progress({claim: Progress(step=1, steps=2)}) == {claim.key}
    await queue.orphans.leave("asked", job.id)
    assert await queue.orphans.adopt("asked") == job.id


async def test_gateway_has_the_secret(queue, fill):
    fill()
    assert await queue.secret() == await queue.secret()


async def test_new_job_is_refused_also_where_another_is_late(queue, make_job, fill, client):
    late = make_job(deadline=1.0)
    await queue.submit(late)
    fill()
    with pytest.raises(QueueUnavailable):
        await queue.submit(make_job())
    assert len(client.keys("rq:job:*")) == 1
