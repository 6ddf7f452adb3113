"""Running out of memory: the batch is halved, what failed is remembered, and what would fit is said."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from structlog.testing import capture_logs

from model.work import Decode, Denoise, Encode, Work
from tests.worker.fake_pipeline import Bench, FakePipeline
from tests.worker.jobs import make_job
from worker.budget import RECOVERY, Budget
from worker.failures import explain
from worker.forecast import Kind

STEP = Kind("tiny", "denoise", (8, 8))


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with capture_logs():
        yield


class SmallMemory(FakePipeline):
    """Runs out of memory above so many rows in one pass."""

    def __init__(self, fits: int, kind: type[Work] = Denoise) -> None:
        super().__init__()
        self.fits, self.kind = fits, kind
        self.failures = 0

    def run(self, batch: Sequence[Work], max_rows: int | None = None) -> list[object]:
        rows = sum(work.rows for work in batch)
        if isinstance(batch[0], self.kind) and min(rows, max_rows or rows) > self.fits:
            self.failures += 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().run(batch, max_rows)


def test_a_batch_that_does_not_fit_is_halved_until_it_does_and_all_succeed() -> None:
    bench = Bench(SmallMemory(fits=2))
    tasks = [bench.submit(steps=1) for _ in range(4)]
    bench.drain()
    assert [task.outcome for task in tasks] == ["succeeded"] * 4
    assert all(task.steps_done == 1 for task in tasks)
    assert sum(bench.pipeline.sizes(Denoise)) == 4


def test_the_size_that_failed_is_not_tried_again() -> None:
    pipeline = SmallMemory(fits=4)
    bench = Bench(pipeline)
    for _ in range(4):
        bench.submit(steps=5)
    bench.drain()
    assert pipeline.failures == 1
    assert max(pipeline.sizes(Denoise)) == 2
    assert bench.metric("out_of_memory_total", model="tiny", stage="denoise") == 1


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        torch.AcceleratorError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_memory_runs_out_in_several_words(error: Exception) -> None:
    def fault(batch: Sequence[Work]) -> None:
        if isinstance(batch[0], Denoise) and len(batch) > 1:
            raise error

    bench = Bench(FakePipeline(fault))
    tasks = [bench.submit(steps=1) for _ in range(2)]
    bench.drain()
    assert [task.outcome for task in tasks] == ["succeeded"] * 2
    assert bench.metric("out_of_memory_total", model="tiny", stage="denoise") == 1


def test_another_size_of_picture_is_not_held_back_by_it() -> None:
    pipeline = SmallMemory(fits=4)
    bench = Bench(pipeline)
    for _ in range(4):
        bench.submit(steps=1)
    bench.steps(4)
    pipeline.fits = 99
    for _ in range(4):
        bench.submit(steps=1, width=128)
    bench.drain()
    assert max(pipeline.sizes(Denoise)) == 4


def test_the_rows_of_one_picture_are_taken_one_by_one_when_both_do_not_fit() -> None:
    pipeline = SmallMemory(fits=1)
    bench = Bench(pipeline)
    task = bench.submit(steps=3)
    bench.drain()
    assert (task.outcome, pipeline.failures) == ("succeeded", 1)
    assert [rows for rows in pipeline.max_rows if rows] == [1, 1, 1]


def test_a_row_that_does_not_fit_fails_its_job_alone_and_says_what_would_fit() -> None:
    class Wide(FakePipeline):
        def run(self, batch: Sequence[Work], max_rows: int | None = None) -> list[object]:
            if isinstance(batch[0], Denoise) and batch[0].shape[1] > 8:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().run(batch, max_rows)

    bench = Bench(Wide())
    bench.submit(steps=1)
    bench.steps(5)
    wide, small = bench.submit(width=128), bench.submit()
    bench.drain()
    assert small.outcome == "succeeded"
    assert wide.failure is not None
    assert wide.failure.code == "out_of_memory"
    assert wide.failure.message == (
        "128x64 does not fit this worker's GPU memory; the largest picture that did fit so far is 64x64"
    )


def test_a_picture_that_does_not_fit_its_decoding_fails_so() -> None:
    bench = Bench(SmallMemory(fits=0, kind=Decode))
    task = bench.submit()
    bench.drain()
    assert task.failure is not None
    assert (task.failure.code, task.failure.message.split("; ")[1]) == ("out_of_memory", "try a smaller picture")


def test_texts_that_do_not_fit_together_are_encoded_in_smaller_batches() -> None:
    bench = Bench(SmallMemory(fits=2, kind=Encode))
    tasks = [bench.submit() for _ in range(4)]
    bench.drain()
    assert [task.outcome for task in tasks] == ["succeeded"] * 4
    assert sum(bench.pipeline.sizes(Encode)) == 4


def test_the_two_texts_of_one_job_are_encoded_one_by_one_when_both_do_not_fit() -> None:
    bench = Bench(SmallMemory(fits=1, kind=Encode))
    task = bench.submit()
    bench.drain()
    assert task.outcome == "succeeded"


def test_a_deterministic_picture_is_never_split() -> None:
    pipeline = SmallMemory(fits=1)
    bench = Bench(pipeline)
    task = bench.submit(deterministic=True)
    bench.drain()
    assert task.failure is not None
    assert (task.failure.code, pipeline.failures) == ("out_of_memory", 1)


def budget() -> Budget:
    return Budget(8, {"tiny": 1000})


def full_batches(budget: Budget, rows: int, times: int) -> int | None:
    for _ in range(times):
        budget.ran(STEP, rows)
    return budget.fits(STEP)


def test_a_size_that_failed_recovers_slowly() -> None:
    one = budget()
    one.failed(STEP, 8)
    assert one.room(STEP).rows == 4
    assert full_batches(one, 4, RECOVERY - 1) == 4
    assert full_batches(one, 4, 1) == 5
    assert full_batches(one, 2, 10 * RECOVERY) == 5  # not full: they prove nothing


def test_a_budget_never_holds_less_than_a_row() -> None:
    one = budget()
    one.failed(STEP, 1)
    assert one.room(STEP).rows == 1


@pytest.mark.parametrize(
    ("largest", "says"),
    [
        ((0, 0), "256x128 does not fit this worker's GPU memory; try a smaller picture"),
        ((128, 64), "256x128 does not fit this worker's GPU memory; the largest picture that did fit so far is 128x64"),
        (
            (256, 256),
            "256x128 does not fit this worker's GPU memory now; 256x256 did fit beside less other work: "
            "try again, or a smaller picture",
        ),
    ],
)
def test_the_owner_of_a_picture_that_is_too_large_is_told_what_did_fit(largest: tuple[int, int], says: str) -> None:
    failure = explain(make_job(width=256, height=128), torch.OutOfMemoryError("CUDA out of memory"), largest)
    assert failure.message == says
