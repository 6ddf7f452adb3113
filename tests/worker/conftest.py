"""Fixtures for the queue: jobs, a gateway's end and workers' ends."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
import redis

from model.params import GenerationParams
from worker.contract.job import Job, new_job_id
from worker.contract.queue import JobQueue
from worker.contract.settings import ContractSettings
from worker.intake import Intake

LIFETIME_S = 1000


@pytest.fixture
def make_job() -> Callable[..., Job]:
    def make(**fields: Any) -> Job:
        params = GenerationParams(prompt="a red circle", width=64, height=64, steps=2, guidance_scale=1.0, seed=7)
        now = time.time()
        given = {"id": new_job_id(), "model": "demo", "revision": "r1", "params": params, "created_at": now}
        return Job(**{**given, "deadline": now + 60, **fields})

    return make


@pytest.fixture
def settings(redis_url: str) -> ContractSettings:
    return ContractSettings(
        redis_url=redis_url, picture_lifetime_s=LIFETIME_S, record_lifetime_s=LIFETIME_S, queue_bound=200
    )


@pytest.fixture
def client(redis_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_url) as client:
        yield client


@pytest.fixture
async def queue(settings: ContractSettings) -> AsyncIterator[JobQueue]:
    queue = JobQueue.connect(settings)
    yield queue
    await queue.close()


@pytest.fixture
def make_intake(settings: ContractSettings) -> Iterator[Callable[[str], Intake]]:
    made: list[Intake] = []

    def make(worker: str) -> Intake:
        made.append(Intake.connect(settings, worker))
        return made[-1]

    yield make
    for intake in made:
        intake.close()


@pytest.fixture
def intake(make_intake: Callable[[str], Intake]) -> Intake:
    return make_intake("w1")
