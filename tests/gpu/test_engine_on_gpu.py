"""The engine over tiny weights on a real GPU: exact pictures, freed memory, no fragments of a job left."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.worker.jobs import make_job
from worker.engine import Engine
from worker.metrics import WorkerMetrics
from worker.models import Loader, Model
from worker.pictures import encode
from worker.settings import ModelSource, WorkerSettings
from worker.task import Task

DEVICE = "cuda"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module")
def model(tiny_bundle: Path) -> Model:
    return Loader(WorkerSettings(device=DEVICE, dtype="bf16")).load(ModelSource("tiny", tiny_bundle))


def drained(model: Model, tasks: list[Task], cancel_after: int | None = None) -> list[Task]:
    engine = Engine(
        {"tiny": model.pipeline}, settings=WorkerSettings(), metrics=WorkerMetrics(), ended=lambda task: None
    )
    for task in tasks:
        task.watched = True
        engine.submit(task)
    for _ in range(cancel_after or 0):
        engine.step()
    if cancel_after:
        for task in tasks[1:]:
            task.cancel()
    engine.stop()
    engine.run()
    return tasks


def files(task: Task) -> list[bytes]:
    return [encode(rendering.pixels, task.job, n) for n, rendering in enumerate(task.renderings)]


def test_a_deterministic_job_gives_the_same_bytes_alone_and_under_load(model: Model) -> None:
    job = make_job(deterministic=True, width=256, height=256, steps=8, num_images=2)
    (alone,) = drained(model, [Task(job)])
    others = [Task(make_job(width=256, height=256, steps=4 + n, seed=n)) for n in range(6)]
    loaded, *_ = drained(model, [Task(replace(job)), *others])
    cut, *_ = drained(model, [Task(job), *[Task(one.job) for one in others]], cancel_after=9)
    assert alone.outcome == "succeeded"
    assert files(loaded) == files(alone)
    assert files(cut) == files(alone)


def test_jobs_that_ended_in_every_way_leave_no_memory_behind(model: Model) -> None:
    def allocated() -> int:
        drained(model, [Task(make_job(width=256, height=256)) for _ in range(4)])
        drained(model, [Task(make_job(width=256, height=256, steps=6, seed=n)) for n in range(6)], cancel_after=6)
        drained(model, [Task(replace(make_job(width=256, height=256, seed=n), deadline=0.0)) for n in range(3)])
        return torch.cuda.memory_allocated()

    for _ in range(3):
        before = allocated()  # workspaces, texts, graphs and their inputs stay
    assert allocated() == before


def test_a_watched_job_has_a_preview_on_the_cpu(model: Model) -> None:
    (task,) = drained(model, [Task(make_job(width=256, height=384, steps=6))])
    assert task.preview is not None
    _, rgb = task.preview
    assert (tuple(rgb.shape), rgb.dtype, rgb.device.type) == ((48, 32, 3), torch.uint8, "cpu")
