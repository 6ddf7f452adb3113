"""A finished job whose picture the store does not take."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.processes import wait_until
from tests.worker.jobs import make_job
from worker.contract.errors import QueueUnavailable, StoreUnavailable
from worker.contract.job import Job, JobView, Outcome, Result
from worker.contract.queue import JobQueue
from worker.contract.settings import ContractSettings
from worker.contract.store import FolderStore
from worker.delivery import Delivery
from worker.intake import Claim, Intake
from worker.metrics import WorkerMetrics
from worker.task import Rendering, Task

PIXELS = torch.zeros(64, 64, 3, dtype=torch.uint8)


class Away(FolderStore):
    """A folder that cannot be reached until it is back."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.back = threading.Event()
        self.knocks = 0

    def put(self, key: str, data: bytes) -> None:
        self.knocks += 1
        if not self.back.is_set():
            raise StoreUnavailable("away") from OSError("away")
        super().put(key, data)


class Silent(Away):
    """A store that takes what it is sent, and says nothing until it is back."""

    def put(self, key: str, data: bytes) -> None:
        self.knocks += 1
        self.back.wait(60)
        FolderStore.put(self, key, data)


class Deaf(Intake):
    """An intake whose Redis is away when jobs that `ended` so are to be committed, until it is back."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.ended: Outcome = "succeeded"
        self.back = threading.Event()
        self.knocks = 0

    def commit(self, claim: Claim, status: Outcome, result: Result) -> bool:
        if status == self.ended:
            self.knocks += 1
            if not self.back.is_set():
                raise QueueUnavailable from OSError("away")
        return super().commit(claim, status, result)


class Site:
    """One worker's delivery, and the queue that it takes from."""

    def __init__(self, queue: JobQueue, intake: Intake, store: Away) -> None:
        self.queue, self.intake, self.store, self.metrics = queue, intake, store, WorkerMetrics()
        self.done: list[Task] = []
        self.delivery = Delivery(
            intake, store, self.metrics, picture_lifetime_s=60, fingerprints={"tiny": "fp"}, done=self.done.append
        )

    async def claim(self, job: Job) -> Claim:
        self.intake.renew([job.model])
        await self.queue.submit(job)
        [claim] = self.intake.claim([job.model], 1)
        return claim

    async def send(self, job: Job, outcome: Outcome = "succeeded") -> Claim:
        claim = await self.claim(job)
        self.delivery.send(claim, Task(job, renderings=[Rendering(PIXELS)], outcome=outcome))
        return claim

    async def view(self, job: Job) -> JobView:
        return await self.queue.view(job.id)

    def retries(self) -> float:
        return self.metrics.registry.get_sample_value("darkroom_store_retries_total") or 0.0


@pytest.fixture
def site(queue: JobQueue, intake: Intake, tmp_path: Path) -> Iterator[Site]:
    site = Site(queue, intake, Away(tmp_path / "pictures"))
    yield site
    site.delivery.close()


@pytest.fixture
def deaf(settings: ContractSettings) -> Iterator[Deaf]:
    intake = Deaf.connect(settings, "w1")
    yield intake
    intake.close()


@pytest.fixture
def deaf_site(queue: JobQueue, deaf: Deaf, tmp_path: Path) -> Iterator[Site]:
    """A site whose store is there, and whose Redis is not."""
    site = Site(queue, deaf, Away(tmp_path / "pictures"))
    site.store.back.set()
    yield site
    site.delivery.close()


def pictures(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


async def test_finished_job_is_held_until_the_store_is_back_and_each_try_is_counted(site: Site) -> None:
    job = make_job()
    claim = await site.send(job)
    wait_until(lambda: site.retries() >= 2)
    assert (await site.view(job)).status == "running"
    assert site.delivery.unstored() == [claim]
    assert site.delivery.waited_s(time.monotonic()) > 0.1
    site.store.back.set()
    wait_until(lambda: bool(site.done))
    assert (await site.view(job)).status == "succeeded"
    assert site.delivery.unstored() == []
    assert site.delivery.waited_s(time.monotonic()) == 0
    assert site.retries() == site.store.knocks - 1


async def test_failed_job_does_not_wait_behind_pictures_that_the_store_does_not_take(site: Site) -> None:
    held = [make_job(seed=n) for n in range(3)]
    for job in held:
        await site.send(job)
    failed = make_job()
    await site.send(failed, "failed")
    wait_until(lambda: bool(site.done))
    assert (await site.view(failed)).status == "failed"
    assert [(await site.view(job)).status for job in held] == ["running"] * 3
    site.store.back.set()


async def test_job_that_was_handed_back_is_another_s_and_its_picture_only_knocks(
    site: Site, make_intake: Callable[[str], Intake], tmp_path: Path
) -> None:
    jobs = [make_job(seed=n) for n in range(4)]  # more than there are threads: some are not begun
    claims = [await site.send(job) for job in jobs]
    wait_until(lambda: site.store.knocks >= 2)
    site.intake.hand_back(claims)
    site.delivery.drop(claims)
    assert site.delivery.unstored() == []
    assert [(await site.view(job)).status for job in jobs] == ["queued"] * 4
    knocks = site.store.knocks
    wait_until(lambda: site.store.knocks > knocks)
    assert site.delivery.waited_s(time.monotonic()) > 0
    site.store.back.set()
    wait_until(lambda: len(site.done) == 4)
    assert site.delivery.waited_s(time.monotonic()) == 0
    assert [(await site.view(job)).status for job in jobs] == ["queued"] * 4
    assert pictures(tmp_path / "pictures") == []
    other = make_intake("w2")
    other.renew(["tiny"])
    assert {claim.job.id for claim in other.claim(["tiny"], 4)} == {job.id for job in jobs}


async def test_closing_while_the_store_is_away_fails_nothing_and_retiring_gives_the_job_back(site: Site) -> None:
    job = make_job()
    await site.send(job)
    wait_until(lambda: site.store.knocks >= 1)
    site.delivery.close()
    assert (await site.view(job)).status == "running"
    site.intake.retire()
    view = await site.view(job)
    assert (view.status, view.result) == ("queued", None)


async def test_closing_while_redis_is_away_fails_nothing_and_retiring_gives_the_job_back(
    deaf_site: Site, deaf: Deaf
) -> None:
    job = make_job()
    await deaf_site.send(job)
    wait_until(lambda: deaf.knocks >= 1)
    deaf_site.delivery.close()
    assert (await deaf_site.view(job)).status == "running"
    deaf.retire()
    view = await deaf_site.view(job)
    assert (view.status, view.result) == ("queued", None)


async def test_closing_commits_at_once_what_waits_for_a_redis_that_is_back(deaf_site: Site, deaf: Deaf) -> None:
    job = make_job()
    await deaf_site.send(job)
    wait_until(lambda: deaf.knocks == 4)  # the fifth would come two seconds later
    deaf.back.set()
    assert deaf_site.delivery.close()
    assert (await deaf_site.view(job)).status == "succeeded"


async def test_closing_leaves_a_silent_store_to_itself_and_begins_nothing_more(
    queue: JobQueue, intake: Intake, tmp_path: Path
) -> None:
    site = Site(queue, intake, Silent(tmp_path / "pictures"))
    jobs = [make_job(seed=n) for n in range(4)]
    for job in jobs:
        await site.send(job)
    wait_until(lambda: site.store.knocks == 2)  # one a thread
    try:
        assert not site.delivery.close(0.1)
        site.intake.retire()
        assert [(await site.view(job)).status for job in jobs] == ["queued"] * 4
    finally:
        site.store.back.set()
    wait_until(lambda: len(site.done) == 2)
    assert site.store.knocks == 2
    wait_until(lambda: pictures(tmp_path / "pictures") == [])


async def test_closing_waits_for_a_picture_that_is_on_its_way(queue: JobQueue, intake: Intake, tmp_path: Path) -> None:
    site, job = Site(queue, intake, Silent(tmp_path / "pictures")), make_job()
    await site.send(job)
    wait_until(lambda: site.store.knocks == 1)
    threading.Timer(0.2, site.store.back.set).start()
    assert site.delivery.close(30)
    assert (await site.view(job)).status == "succeeded"


async def test_job_canceled_while_it_is_held_ends_at_once_and_leaves_no_picture(site: Site, tmp_path: Path) -> None:
    job = make_job()
    await site.send(job)
    wait_until(lambda: site.store.knocks >= 1)
    await site.queue.cancel(job.id)
    site.store.back.set()
    wait_until(lambda: bool(site.done))
    assert (await site.view(job)).status == "canceled"
    assert pictures(tmp_path / "pictures") == []


async def test_what_is_no_outage_fails_the_job_at_once(queue: JobQueue, intake: Intake, tmp_path: Path) -> None:
    class Broken(Away):
        def put(self, key: str, data: bytes) -> None:
            raise RuntimeError("a bug")

    site, job = Site(queue, intake, Broken(tmp_path)), make_job()
    await site.send(job)
    site.delivery.close()
    view = await site.view(job)
    assert view.status == "failed"
    assert view.result is not None
    assert view.result.failure is not None
    assert view.result.failure.code == "internal_error"
    assert site.retries() == 0


async def test_result_that_cannot_be_committed_fails_its_job_instead_of_holding_it(site: Site) -> None:
    site.store.back.set()
    job = make_job()
    task = Task(job, renderings=[Rendering(PIXELS)], outcome="succeeded", seconds={"denoise": object()})  # type: ignore[dict-item]
    site.delivery.send(await site.claim(job), task)
    wait_until(lambda: bool(site.done))
    view = await site.view(job)
    assert (view.status, view.result and view.result.failure and view.result.failure.code) == (
        "failed",
        "internal_error",
    )


async def test_job_that_cannot_even_be_failed_is_held_no_more_and_goes_back(deaf_site: Site, deaf: Deaf) -> None:
    deaf.ended = "failed"
    job = make_job()
    task = Task(job, renderings=[Rendering(PIXELS)], outcome="succeeded", seconds={"denoise": object()})  # type: ignore[dict-item]
    deaf_site.delivery.send(await deaf_site.claim(job), task)
    wait_until(lambda: bool(deaf_site.done))
    assert (await deaf_site.view(job)).status == "running"
    deaf.renew(["tiny"])
    assert (await deaf_site.view(job)).status == "queued"
