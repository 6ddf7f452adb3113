"""Workers whose picture store goes away: no job is lost, and none runs in vain."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import redis

from tests.app.fake_worker import TINY
from tests.bucket import SECRET, S3Server
from tests.processes import wait_until
from tests.worker.fake_pipeline import FakePipeline
from tests.worker.jobs import make_job
from tests.worker.test_delivery import Away, Silent
from tests.worker.test_leases import NeverHandsBack
from tests.worker.test_worker_process import Process
from worker.contract.queue import JobQueue
from worker.intake import Intake
from worker.main import Worker
from worker.metrics import WorkerMetrics
from worker.models import Model
from worker.settings import WorkerSettings

HELD = "holding a finished job"
START_S = 150.0
"""A worker loads torch, which takes seconds, or a minute on a machine that does much else."""


class Hand:
    """A worker in a thread of ours, over a pipeline without arithmetic and a store that is away. A context manager."""

    def __init__(self, name: str, intake: Intake, folder: Path, store: type[Away] = Away, **settings: Any) -> None:
        self.folder, self.store, self.metrics = folder, store(folder), WorkerMetrics()
        model = Model(TINY, FakePipeline(), 0.0, "fp", {})  # type: ignore[arg-type]
        asked = WorkerSettings(worker_name=name, **{"store_patience_s": 1.0, **settings})
        self._worker = Worker(asked, {"tiny": model}, intake, self.store, self.metrics)
        self.is_done: bool | None = None  # what `serve` gave
        self._thread = threading.Thread(target=self._serve, name=name)

    def __enter__(self) -> Hand:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """As SIGTERM does."""
        self._worker.stop()
        self._thread.join()

    def _serve(self) -> None:
        self.is_done = self._worker.serve()

    def pictures(self) -> list[Path]:
        return [path for path in self.folder.rglob("*") if path.is_file()]

    def claimed(self) -> float:
        return self.metrics.registry.get_sample_value("darkroom_request_queue_seconds_count", {"model": "tiny"}) or 0

    def running(self) -> float | None:
        return self.metrics.registry.get_sample_value("darkroom_requests_running")


@pytest.fixture
def hire(make_intake: Callable[[str], Intake], tmp_path: Path) -> Iterator[Callable[..., Hand]]:
    """Workers of one queue, who share a folder for pictures."""
    with ExitStack() as crew:
        yield lambda name, **settings: crew.enter_context(
            Hand(name, make_intake(name), tmp_path / "pictures", **settings)
        )


async def test_finished_job_waits_for_the_store_and_is_not_run_again(
    queue: JobQueue, hire: Callable[..., Hand]
) -> None:
    job = make_job()
    await queue.submit(job)
    hand = hire("one", store_patience_s=60.0)
    wait_until(lambda: hand.store.knocks >= 3)
    assert (await queue.view(job.id)).status == "running"
    hand.store.back.set()
    assert (await queue.wait(job.id, 20)).status == "succeeded"
    assert hand.claimed() == 1


async def test_job_goes_to_another_worker_and_the_first_takes_none_until_its_own_store_is_back(
    queue: JobQueue, hire: Callable[..., Hand]
) -> None:
    jobs = [make_job(seed=n) for n in range(3)]
    for job in jobs:
        await queue.submit(job)
    blocked = hire("blocked")
    wait_until(lambda: blocked.claimed() == 3)
    while {(await queue.view(job.id)).status for job in jobs} != {"queued"}:
        await queue.wait(jobs[0].id, 0.05)
    other = hire("other")
    other.store.back.set()
    for job in jobs:
        assert (await queue.wait(job.id, 20)).status == "succeeded"
    assert (blocked.claimed(), other.claimed()) == (3, 3)
    other.stop()
    late = make_job()
    await queue.submit(late)
    knocks = blocked.store.knocks
    wait_until(lambda: blocked.store.knocks > knocks)
    assert (await queue.view(late.id)).status == "queued"
    blocked.store.back.set()
    assert (await queue.wait(late.id, 20)).status == "succeeded"
    wait_until(lambda: len(blocked.pictures()) == 4)  # one a job: those of the first runs are deleted


async def test_worker_told_to_stop_gives_back_what_its_store_does_not_take(
    queue: JobQueue, hire: Callable[..., Hand]
) -> None:
    job = make_job()
    await queue.submit(job)
    hand = hire("one", store_patience_s=60.0, grace_s=0.5)
    wait_until(lambda: hand.store.knocks >= 1)
    hand.stop()
    view = await queue.view(job.id)
    assert (view.status, view.result) == ("queued", None)


async def test_worker_told_to_stop_does_not_wait_for_a_store_that_says_nothing(
    queue: JobQueue, hire: Callable[..., Hand]
) -> None:
    jobs = [make_job(seed=n) for n in range(4)]
    for job in jobs:
        await queue.submit(job)
    hand = hire("one", store=Silent, store_patience_s=60.0, grace_s=0)
    wait_until(lambda: hand.claimed() == 4 and hand.store.knocks == 2)
    began = time.monotonic()
    hand.stop()
    try:
        assert time.monotonic() - began < 20  # each of the four would be silent for a minute
        assert hand.is_done is False
        assert {(await queue.view(job.id)).status for job in jobs} == {"queued"}
    finally:
        hand.store.back.set()


async def test_job_that_was_handed_back_is_not_counted_as_running_though_its_picture_still_knocks(
    queue: JobQueue, hire: Callable[..., Hand]
) -> None:
    job = make_job()
    await queue.submit(job)
    hand = hire("one")
    wait_until(lambda: hand.running() == 1)
    wait_until(lambda: hand.running() == 0)
    assert (await queue.view(job.id)).status == "queued"
    assert not hand.store.back.is_set()
    hand.store.back.set()
    assert (await queue.wait(job.id, 20)).status == "succeeded"
    wait_until(lambda: hand.running() == 0)
    hand.stop()
    assert hand.running() == 0


async def test_job_that_cannot_be_handed_back_is_let_go_and_goes_back_when_the_worker_renews(
    queue: JobQueue, redis_url: str, tmp_path: Path
) -> None:
    job = make_job()
    await queue.submit(job)
    client: redis.Redis = NeverHandsBack.from_url(redis_url)
    with Hand("one", Intake(client, "one"), tmp_path / "pictures") as hand:
        wait_until(lambda: hand.running() == 1)
        wait_until(lambda: hand.running() == 0)
        while (await queue.view(job.id)).status != "queued":
            await queue.wait(job.id, 0.05)
        assert not hand.store.back.is_set()
        hand.store.back.set()
        assert (await queue.wait(job.id, 20)).status == "succeeded"


@pytest.fixture
def start(redis_url: str, tmp_path: Path, tiny_bundle: Path) -> Iterator[Callable[..., Process]]:
    """Starts workers, each in a folder of its own; away: what shall be their pictures' folder is a file."""
    started: list[Process] = []

    def begin(name: str, *, away: bool, **env: str) -> Process:
        folder = tmp_path / name
        folder.mkdir()
        if away:
            (folder / "pictures").touch()
        started.append(Process(redis_url, folder, tiny_bundle, **env))
        return started[-1]

    yield begin
    for process in started:
        process.popen.kill()
        process.popen.wait()


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.timeout(400)
async def test_process_keeps_a_job_for_the_store(queue: JobQueue, start: Callable[..., Process]) -> None:
    job = make_job()
    await queue.submit(job)
    worker = start("one", away=True)
    wait_until(lambda: HELD in worker.log.read_text(), START_S)
    assert (await queue.view(job.id)).status == "running"
    worker.store.unlink()
    view = await queue.wait(job.id, 30)
    assert view.status == "succeeded", worker.log.read_text()
    assert view.result is not None
    assert (worker.store / view.result.pictures[0].key).exists()
    assert worker.log.read_text().count('"claimed"') == 1


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.timeout(400)
async def test_process_gives_a_job_to_one_whose_store_is_there(queue: JobQueue, start: Callable[..., Process]) -> None:
    job = make_job()
    await queue.submit(job)
    blocked = start("one", away=True, DARKROOM_STORE_PATIENCE_S="1")
    wait_until(lambda: "a finished job goes back to its queue" in blocked.log.read_text(), START_S)
    assert (await queue.view(job.id)).status == "queued"
    other = start("other", away=False)
    view = await queue.wait(job.id, START_S)
    assert view.status == "succeeded", other.log.read_text()
    assert view.result is not None
    assert (other.store / view.result.pictures[0].key).exists()
    assert blocked.log.read_text().count('"claimed"') == 1  # nothing more, while it waits
    other.end()
    blocked.store.unlink()
    after = make_job()
    await queue.submit(after)
    assert (await queue.wait(after.id, 30)).status == "succeeded", blocked.log.read_text()


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.timeout(400)
async def test_sigterm_while_the_store_is_away_gives_the_job_back(
    queue: JobQueue, start: Callable[..., Process]
) -> None:
    job = make_job()
    await queue.submit(job)
    worker = start("one", away=True, DARKROOM_GRACE_S="1")
    wait_until(lambda: HELD in worker.log.read_text(), START_S)
    worker.popen.send_signal(signal.SIGTERM)
    assert worker.popen.wait(30) == 0, worker.log.read_text()
    assert (await queue.view(job.id)).status == "queued"
    other = start("other", away=False)
    view = await queue.wait(job.id, START_S)
    assert view.status == "succeeded", other.log.read_text()


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.timeout(400)
async def test_process_keeps_a_job_for_the_bucket(
    queue: JobQueue, start: Callable[..., Process], tmp_path: Path
) -> None:
    bucket = S3Server(tmp_path)
    (tmp_path / "secret").write_text(f"{SECRET}\n")
    given = bucket.settings(s3_secret_access_key_file=tmp_path / "secret")
    del given["s3_secret_access_key"]
    worker = start("one", away=False, **{f"DARKROOM_{name.upper()}": str(value) for name, value in given.items()})
    job = make_job()
    await queue.submit(job)
    wait_until(lambda: HELD in worker.log.read_text(), START_S)
    bucket.start()
    try:
        view = await queue.wait(job.id, 30)
        assert view.status == "succeeded", worker.log.read_text()
        assert view.result is not None
        assert bucket.keys() == {picture.key for picture in view.result.pictures}
        assert SECRET not in worker.log.read_text()
    finally:
        bucket.stop()
