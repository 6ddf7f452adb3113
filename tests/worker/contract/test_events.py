"""Following a job: history first, then live, each event once, and an end."""

from __future__ import annotations

import asyncio

import pytest

from worker.contract.errors import UnknownGeneration
from worker.contract.events import UNREAD_AT_MOST, Event, Unread
from worker.contract.job import Progress, Result
from worker.contract.operations import Operations
from worker.contract.queue import JobQueue
from worker.contract.settings import ContractSettings


async def read(events):
    async with asyncio.timeout(20):
        return [event async for event in events]


async def follow(queue, job_id, after="0-0"):
    """A reader that has read the past, and its list that grows."""
    seen, started = [], asyncio.Event()

    async def go_on():
        async for event in queue.events(job_id, after):
            seen.append(event)
            started.set()

    task = asyncio.create_task(go_on())
    async with asyncio.timeout(20):
        await started.wait()
    return task, seen


def names(events):
    return [event.name for event in events]


async def run(intake, *, steps=2):
    (claim,) = intake.claim(["demo"], 1)
    for step in range(1, steps + 1):
        await asyncio.to_thread(intake.progress, {claim: Progress(step=step, steps=steps)})
    assert await asyncio.to_thread(intake.commit, claim, "succeeded", Result(warnings=("w",)))
    return claim


async def test_events_of_an_ended_job_are_its_history_with_data(queue, intake, make_job):
    job = make_job()
    await queue.submit(job)
    await run(intake)
    events = await read(queue.events(job.id))
    assert names(events) == ["queued", "running", "progress", "progress", "succeeded"]
    assert events[2].data == {"step": 1, "steps": 2}
    assert events[-1].data["warnings"] == ["w"]


async def test_events_go_on_live_from_history_to_the_end(queue, intake, make_job):
    job = make_job()
    await queue.submit(job)
    reader, seen = await follow(queue, job.id)
    await run(intake)
    async with asyncio.timeout(20):
        await reader
    assert names(seen) == ["queued", "running", "progress", "progress", "succeeded"]


async def test_reader_that_comes_back_gets_what_it_missed_and_no_more(queue, intake, make_job):
    job = make_job()
    await queue.submit(job)
    await run(intake)
    events = await read(queue.events(job.id))
    for n in range(len(events)):
        assert await read(queue.events(job.id, events[n].id)) == events[n + 1 :]


@pytest.mark.parametrize("after", ["", "0", "x-y", "-1-0", "9" * 40 + "-0", "1-1\n", "+", "$"])
async def test_reader_with_an_id_of_nowhere_gets_everything(queue, make_job, after):
    job = make_job()
    await queue.submit(job)
    await queue.cancel(job.id)
    assert names(await read(queue.events(job.id, after))) == ["queued", "canceled"]


async def test_events_of_an_unknown_job_are_refused(queue):
    with pytest.raises(UnknownGeneration):
        await read(queue.events("gen_0"))


async def test_events_end_when_the_job_is_forgotten(queue, make_job):
    job = make_job()
    await queue.submit(job)
    reader, seen = await follow(queue, job.id)
    await queue.forget(job.id)
    async with asyncio.timeout(20):
        await reader
    assert names(seen)[0] == "queued"


async def test_readers_of_one_process_share_one_subscription_and_see_the_same(queue, intake, make_job, client):
    jobs = [make_job() for _ in range(3)]
    readers = []
    for job in jobs:
        await queue.submit(job)
        readers += [await follow(queue, job.id) for _ in range(3)]
    assert client.pubsub_numsub("darkroom:event") == [(b"darkroom:event", 1)]
    for _ in jobs:
        await run(intake)
    for task, _ in readers:
        async with asyncio.timeout(20):
            await task
    for n in range(3):
        (first, second, third) = (seen for _, seen in readers[3 * n : 3 * n + 3])
        assert first == second == third
        assert names(first) == ["queued", "running", "progress", "progress", "succeeded"]


async def test_reader_of_a_job_in_a_new_life_reads_on_to_its_next_end(queue, intake, settings, make_job):
    job = make_job()
    await queue.submit(job)
    await queue.cancel(job.id)
    first = await read(queue.events(job.id))
    with Operations.connect(settings) as operations:
        operations.retry(job.id)
    reader, seen = await follow(queue, job.id, first[-1].id)
    await run(intake)
    async with asyncio.timeout(20):
        await reader
    assert names(seen) == ["queued", "running", "progress", "progress", "succeeded"]


async def test_readers_survive_a_reconnect_and_miss_nothing(own_valkey, make_job):
    queue = JobQueue.connect(ContractSettings(redis_url=own_valkey.url))
    job = make_job()
    await queue.submit(job)
    reader, seen = await follow(queue, job.id)
    control = queue._redis
    await control.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
    await queue.cancel(job.id)
    async with asyncio.timeout(20):
        await reader
    assert names(seen) == ["queued", "canceled"]
    await queue.close()


async def test_slow_reader_is_sent_back_to_the_stream():
    unread = Unread()
    events = [Event(f"{n}-0", "progress", {}) for n in range(1, UNREAD_AT_MOST + 3)]
    for event in events:
        unread.put(event)
    assert [event async for event in unread.after("0-0", 1)] == []
    assert [event async for event in unread.after("0-0", 0.01)] == [events[-1]]


async def test_reader_passes_over_what_it_read_in_the_stream():
    unread = Unread()
    for n in (9, 10, 11):
        unread.put(Event(f"{n}-0", "progress", {}))
    assert [event.id async for event in unread.after("9-5", 0.01)] == ["10-0", "11-0"]
