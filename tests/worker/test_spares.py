"""Who gets a new job: a worker that has none before one that has, and that one soon enough."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from model.work import Work
from tests.app.fake_worker import TINY
from tests.processes import wait_until
from tests.worker.fake_pipeline import FakePipeline
from tests.worker.jobs import make_job
from worker.contract.queue import JobQueue
from worker.contract.store import FolderStore
from worker.intake import Intake
from worker.main import Worker
from worker.metrics import WorkerMetrics
from worker.models import Model
from worker.settings import WorkerSettings


class Hand:
    """A worker in a thread of ours, whose GPU stands still until it is let go. A context manager."""

    def __init__(self, intake: Intake, folder: Path, *, stands_still: bool) -> None:
        self.go_on, self.metrics = threading.Event(), WorkerMetrics()
        if not stands_still:
            self.go_on.set()
        model = Model(TINY, FakePipeline(self._hold), 0.0, "fp", {})  # type: ignore[arg-type]
        self._worker = Worker(WorkerSettings(), {"tiny": model}, intake, FolderStore(folder), self.metrics)
        self._thread = threading.Thread(target=self._worker.serve)

    def __enter__(self) -> Hand:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.go_on.set()
        self._worker.stop()
        self._thread.join()

    def claimed(self) -> float:
        return self.metrics.registry.get_sample_value("darkroom_request_queue_seconds_count", {"model": "tiny"}) or 0

    def _hold(self, batch: Sequence[Work]) -> None:
        self.go_on.wait(30)


@pytest.fixture
def hire(make_intake: Callable[[str], Intake], tmp_path: Path) -> Iterator[Callable[..., Hand]]:
    with ExitStack() as crew:
        yield lambda name, **how: crew.enter_context(Hand(make_intake(name), tmp_path, **how))


@pytest.fixture
async def busy(queue: JobQueue, hire: Callable[..., Hand]) -> Hand:
    """A worker that is at a job and has room for more."""
    hand = hire("busy", stands_still=True)
    await queue.submit(make_job())
    wait_until(lambda: hand.claimed() == 1)
    return hand


async def test_jobs_go_to_the_worker_that_has_none(
    queue: JobQueue, busy: Hand, hire: Callable[..., Hand], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.main.SPARE_AFTER_S", 5.0)  # this machine may do much else
    idle = hire("idle", stands_still=False)
    for seed in range(10):
        job = make_job(seed=seed)
        await queue.submit(job)
        assert (await queue.wait(job.id, 20)).status == "succeeded"
    assert (busy.claimed(), idle.claimed()) == (1, 10)


async def test_a_worker_that_is_busy_takes_more_where_no_other_does(queue: JobQueue, busy: Hand) -> None:
    for seed in range(3):
        await queue.submit(make_job(seed=seed))
    wait_until(lambda: busy.claimed() == 4)
