"""The GPU loop over a fake pipeline: batching, ending, and that one bad job harms no other."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from model.pipeline import Begin, Decode, Denoise, Encode, Latents, Work
from model.text import Text
from tests.worker.jobs import make_job
from worker.contract.errors import StoreUnavailable
from worker.engine import Engine, Task, explain
from worker.metrics import WorkerMetrics


class FakePipeline:
    """Does no arithmetic; records each batch; `fault` may raise for a batch."""

    shift = 3.0
    device = torch.device("cpu")

    def __init__(self, fault: Callable[[Sequence[Work]], None] = lambda batch: None) -> None:
        self.batches: list[list[Work]] = []
        self.fault = fault

    def run(self, batch: Sequence[Work]) -> list[Any]:
        self.batches.append(list(batch))
        self.fault(batch)
        return [self._one(work) for work in batch]

    def _one(self, work: Work) -> Any:
        match work:
            case Encode():
                return [Text(torch.zeros(4, 8), torch.zeros(8)) for _ in work.prompts]
            case Begin():
                return Latents(torch.full((16, work.height // 8, work.width // 8), float(work.seed)))
            case Denoise():
                return None
            case Decode():
                return torch.zeros(8, 8, 3, dtype=torch.uint8)

    def sizes(self, kind: type) -> list[int]:
        """Batch sizes of one kind of work."""
        return [len(batch) for batch in self.batches if isinstance(batch[0], kind)]


class Bench:
    """An engine driven step by step."""

    def __init__(
        self, pipeline: FakePipeline | None = None, *, max_rows: int = 8, now: Callable[[], float] | None = None
    ) -> None:
        self.pipeline = pipeline or FakePipeline()
        self.ended: list[Task] = []
        options = {"now": now} if now else {}
        self.engine = Engine(
            {"tiny": self.pipeline}, max_rows=max_rows, metrics=WorkerMetrics(), ended=self.ended.append, **options
        )

    def submit(self, **asked: Any) -> Task:
        task = Task(make_job(**asked))
        self.engine.submit(task)
        return task

    def drain(self) -> None:
        self.engine.stop()
        self.engine.run()


def test_a_task_ends_with_one_rendering_an_image() -> None:
    bench = Bench()
    task = bench.submit(num_images=3)
    bench.drain()
    assert bench.ended == [task]
    assert (task.outcome, len(task.renderings)) == ("succeeded", 3)
    assert (task.progress.step, task.progress.steps) == (6, 6)


def test_tasks_of_different_steps_share_batches_and_the_short_one_leaves_early() -> None:
    bench = Bench()
    long, short = bench.submit(steps=4), bench.submit(steps=2)
    bench.drain()
    assert bench.pipeline.sizes(Denoise) == [2, 2, 1, 1]
    assert bench.ended == [short, long]


def test_a_batch_takes_no_more_rows_than_allowed() -> None:
    bench = Bench(max_rows=4)  # guided: two rows each
    for _ in range(3):
        bench.submit(steps=1)
    bench.drain()
    assert bench.pipeline.sizes(Denoise) == [2, 1]


def test_pictures_of_different_sizes_do_not_share_a_batch() -> None:
    bench = Bench()
    bench.submit(steps=1)
    bench.submit(steps=1, width=128)
    bench.drain()
    assert bench.pipeline.sizes(Denoise) == [1, 1]


def test_an_unguided_task_encodes_no_negative_prompt() -> None:
    bench = Bench()
    bench.submit(guidance_scale=1.0, negative_prompt="red")
    bench.drain()
    (encode,) = [work for batch in bench.pipeline.batches for work in batch if isinstance(work, Encode)]
    assert encode.prompts == ("a red circle",)


def test_a_bad_row_fails_its_own_task_and_no_other() -> None:
    def fault(batch: Sequence[Work]) -> None:
        if any(isinstance(w, Denoise) and w.latents.x.flatten()[0] == 13 for w in batch):
            raise RuntimeError("boom")

    bench = Bench(FakePipeline(fault))
    good, bad, other = bench.submit(seed=1), bench.submit(seed=13), bench.submit(seed=2)
    bench.drain()
    assert [task.outcome for task in (good, bad, other)] == ["succeeded", "failed", "succeeded"]
    assert bad.failure is not None
    assert bad.failure.code == "internal_error"
    assert "boom" not in bad.failure.message


def test_one_failed_picture_fails_the_whole_task_once() -> None:
    def fault(batch: Sequence[Work]) -> None:
        if any(isinstance(w, Decode) for w in batch):
            raise RuntimeError("boom")

    bench = Bench(FakePipeline(fault))
    task = bench.submit(num_images=2)
    bench.drain()
    assert bench.ended == [task]
    assert task.outcome == "failed"


def test_a_canceled_task_ends_before_its_next_step_and_lets_go_of_its_latents() -> None:
    bench = Bench()
    task = bench.submit(steps=50)

    def cancel_at_third_step(batch: Sequence[Work]) -> None:
        if task.steps_done == 2:
            task.cancel()

    bench.pipeline.fault = cancel_at_third_step
    bench.drain()
    assert (task.outcome, task.steps_done) == ("canceled", 3)
    assert all(child.work is None for child in task.children)


def test_a_task_past_its_deadline_fails_and_says_how_far_it_came() -> None:
    clock = {"now": 0.0}
    bench = Bench(now=lambda: clock["now"])
    task = bench.submit(steps=50)

    def tick(batch: Sequence[Work]) -> None:
        if isinstance(batch[0], Denoise):
            clock["now"] = task.job.deadline + 1

    bench.pipeline.fault = tick
    bench.drain()
    assert task.failure is not None
    assert (task.failure.code, task.failure.message) == (
        "deadline_exceeded",
        "the deadline passed after 1 of 50 steps",
    )


def test_a_late_task_that_is_also_asked_to_stop_has_failed() -> None:
    clock = {"now": 0.0}
    bench = Bench(now=lambda: clock["now"])
    task = bench.submit(steps=50)
    clock["now"] = task.job.deadline + 1
    task.cancel()
    bench.drain()
    assert task.outcome == "failed"


def test_a_job_of_a_model_that_is_not_held_fails() -> None:
    bench = Bench()
    task = bench.submit(model="other")
    bench.drain()
    assert task.failure is not None
    assert task.failure.code == "invalid_job"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "out_of_memory"),
        (StoreUnavailable("disk full"), "store_unavailable"),
        (RuntimeError("secret path /etc"), "internal_error"),
    ],
)
def test_explain_names_the_kind_of_failure_and_leaks_nothing(error: Exception, code: str) -> None:
    failure = explain(make_job(), error)
    assert failure.code == code
    assert "secret" not in failure.message
