"""A worker that is told to stop while its GPU no longer answers, one whose GPU is lost, and one whose disk is full."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from model.work import Work
from tests.processes import wait_until
from tests.worker.contract.test_queue import card
from tests.worker.fake_pipeline import FakePipeline
from tests.worker.jobs import make_job
from worker.contract.errors import StoreUnavailable
from worker.contract.queue import JobQueue
from worker.contract.store import FolderStore
from worker.intake import Intake
from worker.main import Worker, serve_to_the_end
from worker.metrics import WorkerMetrics
from worker.models import Model
from worker.settings import WorkerSettings
from worker.status import ProcessStatus


@pytest.mark.slow  # it waits a while for the GPU
async def test_a_worker_does_not_wait_for_a_gpu_that_hangs_and_hands_its_jobs_back(
    redis_url: str, tmp_path: Path
) -> None:
    stuck, released = threading.Event(), threading.Event()

    def hang(batch: Sequence[Work]) -> None:
        if batch[0].stage == "denoise":
            stuck.set()
            released.wait(60)

    file = tmp_path / "status.json"
    settings = WorkerSettings(redis_url=redis_url, worker_status=file, grace_s=0, worker_name="w1")  # type: ignore[arg-type]
    pipeline: Any = FakePipeline(hang)
    worker = Worker(
        settings,
        {"tiny": Model(card("tiny"), pipeline, 0.0, "fp", {})},
        Intake.connect(settings, "w1"),
        FolderStore(tmp_path / "pictures"),
        WorkerMetrics(),
    )
    queue, job, gpu_is_done = JobQueue.connect(settings), make_job(), []
    serving = threading.Thread(target=lambda: gpu_is_done.append(worker.serve()))
    serving.start()
    await queue.submit(job)
    wait_until(lambda: stuck.is_set() and _said(file) == ("ready", 1))
    worker.stop()
    wait_until(lambda: _said(file)[0] == "draining")
    serving.join(30)
    assert gpu_is_done == [False]
    assert (await queue.view(job.id)).status == "queued"
    released.set()
    await queue.close()


class Away(FolderStore):
    """A store that takes nothing."""

    asked = False

    def put(self, key: str, data: bytes) -> None:
        self.asked = True
        raise StoreUnavailable("away")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_a_worker_whose_gpu_is_lost_ends_though_its_store_is_away(redis_url: str, tmp_path: Path) -> None:
    store = Away(tmp_path / "pictures")

    def lose(batch: Sequence[Work]) -> None:
        if store.asked:
            raise torch.AcceleratorError("an illegal memory access was encountered")

    settings = WorkerSettings(redis_url=redis_url, worker_name="w2")  # type: ignore[arg-type]
    pipeline: Any = FakePipeline(lose)
    models = {"tiny": Model(card("tiny"), pipeline, 0.0, "fp", {})}
    worker = Worker(settings, models, Intake.connect(settings, "w2"), store, WorkerMetrics())
    queue, ended = JobQueue.connect(settings), []
    serving = threading.Thread(target=lambda: ended.append(serve_to_the_end(worker)))
    serving.start()
    await queue.submit(make_job(steps=1))
    wait_until(lambda: store.asked)
    await queue.submit(make_job())
    serving.join(30)
    assert ended == [(1, True)]
    await queue.close()


def test_a_status_that_cannot_be_written_is_not_left_to_grow_old(redis_url: str, tmp_path: Path) -> None:
    file = tmp_path / "status.json"
    settings = WorkerSettings(redis_url=redis_url, worker_status=file, grace_s=0, worker_name="w3")  # type: ignore[arg-type]
    pipeline: Any = FakePipeline()
    models = {"tiny": Model(card("tiny"), pipeline, 0.0, "fp", {})}
    store = FolderStore(tmp_path / "pictures")
    worker = Worker(settings, models, Intake.connect(settings, "w3"), store, WorkerMetrics())
    serving = threading.Thread(target=worker.serve)
    serving.start()
    wait_until(lambda: _said(file) == ("ready", 0))
    (tmp_path / "status.json.new").mkdir()  # as a full disk, it takes no draft
    wait_until(lambda: not file.exists())
    worker.stop()
    serving.join(30)
    assert not serving.is_alive()


def _said(file: Path) -> tuple[str, int]:
    status = ProcessStatus.read(file)
    return (status.state, status.jobs) if status else ("loading", 0)
