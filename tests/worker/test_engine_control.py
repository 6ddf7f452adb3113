"""What the control thread sees of the engine: the current work, room for more jobs, previews."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest
import torch

from model.work import Latents, Work
from tests.worker.fake_pipeline import Bench, FakePipeline
from tests.worker.jobs import make_job
from worker.budget import SPARE
from worker.task import Task


def test_current_tells_the_piece_of_work_that_runs_and_nothing_in_between() -> None:
    bench = Bench()
    seen = []
    bench.pipeline.fault = lambda batch: seen.append(bench.engine.current())
    bench.pipeline.seconds = {"denoise": 2.0}
    one, two = bench.submit(steps=3), bench.submit(steps=3)
    bench.drain()
    steps = [current for current in seen if current and current.stage == "denoise"]
    assert [current.started for current in steps] == [0.0, 2.0, 4.0]
    assert steps[0].job_ids == (one.job.id, two.job.id)
    assert steps[0].predicted_s >= 10  # the first of its kind
    assert steps[2].predicted_s == pytest.approx(2.0)
    assert bench.engine.current() is None


def test_current_is_told_while_a_batch_hangs() -> None:
    hung, go_on = threading.Event(), threading.Event()

    def hang(batch: Sequence[Work]) -> None:
        hung.set()
        assert go_on.wait(30)

    bench = Bench(FakePipeline(hang))
    task = bench.submit()
    gpu = threading.Thread(target=bench.drain)
    gpu.start()
    assert hung.wait(30)
    current = bench.engine.current()
    go_on.set()
    gpu.join()
    assert current is not None
    assert (current.stage, current.job_ids) == ("text_encode", (task.job.id,))


def test_room_is_for_what_fills_a_batch_and_then_for_one_spare_job_at_a_time() -> None:
    tokens = Task(make_job()).tokens
    bench = Bench(token_budget=3 * tokens, max_jobs=64)
    rooms = [bench.engine.room()]
    for _ in range(4 + SPARE):
        bench.submit()
        rooms.append(bench.engine.room())
    assert rooms == [1, 2, 1, *[1] * SPARE, 0, 0]
    bench.drain()
    assert bench.engine.room() == 3  # as it was before


def test_room_is_never_more_than_the_jobs_that_a_worker_may_hold() -> None:
    bench = Bench(max_jobs=2)
    bench.submit()
    assert bench.engine.room() == 1
    bench.submit()
    assert bench.engine.room() == 0


def test_room_of_one_model_does_not_shrink_with_jobs_of_another() -> None:
    bench = Bench(others={"turbo": FakePipeline()}, token_budget=1, max_jobs=64)
    for _ in range(1 + SPARE):
        bench.submit()
    assert (bench.engine.room("tiny"), bench.engine.room("turbo"), bench.engine.room()) == (0, 1, 1)


def test_no_preview_is_made_unless_somebody_watches() -> None:
    bench = Bench()
    task = bench.submit()
    bench.drain()
    assert task.preview is None
    assert bench.pipeline.previewed == []


def test_previews_of_the_first_picture_are_made_twice_a_second_at_most() -> None:
    bench = Bench()
    bench.pipeline.seconds = {"denoise": 0.2}
    task = bench.submit(steps=10, num_images=2, seed=5)
    task.watched = True
    bench.drain()
    # at 0.2, 0.8, 1.4, 2.0
    assert [int(latents.x.flatten()[0]) for latents in bench.pipeline.previewed] == [5] * 4
    assert task.preview is not None
    step, rgb = task.preview
    assert (step, rgb.dtype, rgb.device.type) == (20, torch.uint8, "cpu")
    assert bench.metric("previews_total", model="tiny") == 4


def test_a_preview_is_asked_for_while_the_gpu_still_works() -> None:
    class Busy(FakePipeline):
        def preview(self, latents: Latents) -> torch.Tensor:
            left.append(self._running_s)
            return super().preview(latents)

    left: list[float] = []
    bench = Bench(Busy(ahead=True))
    bench.submit().watched = True
    bench.drain()
    assert left
    assert all(left)


def test_a_preview_that_fails_costs_the_picture_nothing() -> None:
    class NoPreview(FakePipeline):
        def preview(self, latents: Latents) -> torch.Tensor:
            raise RuntimeError("boom")

    bench = Bench(NoPreview())
    task = bench.submit()
    task.watched = True
    bench.drain()
    assert (task.outcome, task.preview) == ("succeeded", None)
