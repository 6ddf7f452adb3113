"""The GPU loop over a fake pipeline: batching, ending, and that one bad job harms no other."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from structlog.testing import capture_logs

from model.work import Decode, Denoise, Encode, NonFiniteLatents, Work
from tests.worker.fake_pipeline import Bench, FakePipeline, seed_of
from tests.worker.jobs import make_job
from worker.failures import explain
from worker.task import Task


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Nobody reads these logs, and drawing tracebacks takes seconds."""
    with capture_logs():
        yield


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


def test_texts_of_several_tasks_are_encoded_together_and_pictures_decoded_one_by_one() -> None:
    bench = Bench()
    for _ in range(3):
        bench.submit()
    bench.drain()
    assert bench.pipeline.sizes(Encode) == [3]
    assert bench.pipeline.sizes(Decode) == [1, 1, 1]


def test_a_batch_takes_no_more_rows_than_allowed() -> None:
    bench = Bench(max_batch_rows=4)  # guided: two rows each
    for _ in range(3):
        bench.submit(steps=1)
    bench.drain()
    assert bench.pipeline.sizes(Denoise) == [2, 1]


def test_a_batch_takes_no_more_tokens_than_its_budget() -> None:
    bench = Bench(token_budget=2 * 3 * (16 + 4))  # of three guided pictures of 64x64, with the fake's texts
    for _ in range(4):
        bench.submit(steps=1)
    bench.drain()
    assert bench.pipeline.sizes(Denoise) == [3, 1]


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


def test_a_short_job_overtakes_a_long_one_of_another_size() -> None:
    bench = Bench()
    long = bench.submit(steps=20, width=256)
    bench.steps(4)  # text, noise, two steps
    short = bench.submit(steps=2)
    bench.drain()
    assert bench.ended == [short, long]


def test_a_job_of_high_priority_overtakes_a_shorter_one() -> None:
    bench = Bench()
    normal, high = bench.submit(steps=2), bench.submit(steps=4, width=128, priority="high")
    bench.drain()
    assert bench.ended == [high, normal]


def test_models_in_one_worker_take_turns_step_by_step() -> None:
    turbo = FakePipeline()
    bench = Bench(others={"turbo": turbo})
    long = bench.submit(steps=20)
    bench.steps(4)
    short = bench.submit(model="turbo", steps=2)
    bench.drain()
    assert bench.ended == [short, long]
    assert (turbo.sizes(Denoise), bench.pipeline.sizes(Denoise)) == ([1, 1], [1] * 20)


def test_a_long_job_is_not_starved_by_short_ones_that_keep_coming() -> None:
    bench = Bench()
    bench.pipeline.seconds = {"denoise": 1.0}
    long = bench.submit(steps=10, width=256)
    for _ in range(400):
        if long.outcome:
            break
        bench.submit(steps=3)
        bench.steps(3)
    assert long.outcome == "succeeded"


def test_a_bad_row_fails_its_own_task_and_no_other() -> None:
    def fault(batch: Sequence[Work]) -> None:
        if any(isinstance(w, Denoise) and seed_of(w) == 13 for w in batch):
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


def test_a_gpu_that_is_lost_ends_the_engine() -> None:
    def fault(batch: Sequence[Work]) -> None:
        raise torch.AcceleratorError("an illegal memory access was encountered")

    bench = Bench(FakePipeline(fault))
    task = bench.submit()
    with pytest.raises(torch.AcceleratorError):
        bench.drain()
    assert task.outcome is None


def test_a_canceled_task_ends_before_its_next_step_and_frees_its_row() -> None:
    bench = Bench()
    task, other = bench.submit(steps=50, seed=7), bench.submit(steps=5)

    def cancel_at_third_step(batch: Sequence[Work]) -> None:
        if task.steps_done == 2:
            task.cancel()

    bench.pipeline.fault = cancel_at_third_step
    bench.drain()
    assert (task.outcome, task.steps_done, other.outcome) == ("canceled", 3, "succeeded")
    assert bench.pipeline.sizes(Denoise) == [2, 2, 2, 1, 1]


def test_a_withdrawn_task_is_dropped_before_its_next_step_without_a_word() -> None:
    bench = Bench()
    ours, theirs = bench.submit(steps=5), bench.submit(steps=5)
    bench.steps(4)
    bench.engine.withdraw([theirs.job.id, "unknown"])
    bench.drain()
    assert bench.ended == [ours]
    assert (theirs.outcome, theirs.steps_done) == (None, 2)


def test_a_task_that_is_submitted_again_after_its_withdrawal_runs() -> None:
    bench = Bench()
    first = bench.submit()
    bench.engine.withdraw([first.job.id])
    again = Task(first.job)
    bench.engine.submit(again)
    bench.drain()
    assert bench.ended == [again]


def test_a_withdrawal_reaches_an_engine_that_is_told_to_stop() -> None:
    bench = Bench()
    task = bench.submit(steps=5)
    bench.steps(3)
    bench.engine.stop()
    bench.engine.withdraw([task.job.id])
    bench.engine.run()
    assert bench.ended == []


@pytest.fixture
def _no_garbage_collector() -> Iterator[None]:
    """What only it would free is not freed in time for the next picture."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("_no_garbage_collector")
@pytest.mark.parametrize("end", ["success", "cancel", "withdraw", "deadline", "failure", "memory", "non-finite"])
def test_however_a_task_ends_its_latents_and_texts_are_freed_at_once(end: str) -> None:
    clock = [0.0]
    bench = Bench(now=lambda: clock[0])
    task = bench.submit(steps=3, num_images=2)
    bench.steps(3)
    assert bench.pipeline.alive() == 2 * (2 + 1)

    def fault(batch: Sequence[Work]) -> None:
        local = bench.pipeline.noted(torch.zeros(9))  # lives in the traceback's frame
        if end == "failure":
            raise RuntimeError(f"boom {local.shape}")
        if end == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory")

    bench.pipeline.fault = fault
    if end == "cancel":
        task.cancel()
    elif end == "withdraw":
        bench.engine.withdraw([task.job.id])
    elif end == "deadline":
        clock[0] = task.job.deadline + 1
    elif end == "non-finite":
        bench.pipeline._one = lambda work: NonFiniteLatents("nan")  # type: ignore[method-assign]
    bench.drain()
    bench.pipeline.batches.clear()
    assert task.outcome == {"success": "succeeded", "cancel": "canceled", "withdraw": None}.get(end, "failed")
    assert bench.pipeline.alive() == 0


def test_a_picture_with_non_finite_latents_fails_alone() -> None:
    class Poisoned(FakePipeline):
        def _one(self, work: Work) -> Any:
            if isinstance(work, Decode) and seed_of(work) == 13:
                return NonFiniteLatents("the latents became NaN")
            return super()._one(work)

    bench = Bench(Poisoned())
    bad, good = bench.submit(seed=13), bench.submit(seed=1)
    bench.drain()
    assert bad.failure is not None
    assert (bad.failure.code, good.outcome) == ("non_finite", "succeeded")


def test_a_job_of_a_model_that_is_not_held_fails() -> None:
    bench = Bench()
    task = bench.submit(model="other")
    bench.drain()
    assert task.failure is not None
    assert task.failure.code == "invalid_job"
    assert task.failure.message == "this worker holds no model 'other'; it holds tiny"


def test_a_deterministic_task_shares_no_batch() -> None:
    bench = Bench()
    task = bench.submit(deterministic=True, num_images=2)
    others = [bench.submit() for _ in range(2)]
    bench.drain()
    assert [one.outcome for one in (task, *others)] == ["succeeded"] * 3
    for batch in bench.pipeline.batches:
        assert len(batch) == 1 or not any(work.deterministic for work in batch)


def test_time_of_a_batch_is_shared_by_the_rows_in_it_and_makes_the_speed() -> None:
    bench = Bench()
    guided, unguided = bench.submit(guidance_scale=4.0), bench.submit(guidance_scale=1.0)
    bench.drain()
    spent = guided.gpu_s + unguided.gpu_s
    assert guided.gpu_s > unguided.gpu_s > 0
    assert spent < sum(guided.seconds.values()) + sum(unguided.seconds.values())
    work = (guided.job.pixel_steps + unguided.job.pixel_steps) / 1e6
    assert bench.engine.speed.measured()[guided.job.model] == pytest.approx(work / spent, rel=0.05)


def test_metrics_tell_batches_cache_and_overhead() -> None:
    bench = Bench()
    bench.pipeline.seconds = {"denoise": 0.5}
    for _ in range(2):
        bench.submit(steps=3)
    bench.steps(2)
    assert bench.metric("pending_rows", model="tiny") == 4
    bench.drain()
    assert bench.metric("batch_size_sum", model="tiny") == 12
    assert bench.metric("batch_tokens_sum", model="tiny") == 12 * (16 + 4)
    assert bench.metric("stage_seconds_sum", model="tiny", stage="denoise") == pytest.approx(1.5)
    assert bench.metric("embedding_cache_misses_total", model="tiny") == 4
    assert bench.metric("engine_overhead_seconds_total") == pytest.approx(0.0)
    assert bench.metric("pending_rows", model="tiny") == 0


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "out_of_memory"),
        (RuntimeError("secret path /etc"), "internal_error"),
    ],
)
def test_explain_names_the_kind_of_failure_and_leaks_nothing(error: Exception, code: str) -> None:
    failure = explain(make_job(), error)
    assert failure.code == code
    assert "secret" not in failure.message


def test_the_next_batch_is_picked_while_one_runs() -> None:
    class Watched(FakePipeline):
        picked = 0

        def settle(self) -> None:
            self.picked += bool(bench.engine._next)
            super().settle()

    pipeline = Watched(ahead=True)
    bench = Bench(pipeline)
    task = bench.submit(steps=4)
    bench.drain()
    assert task.outcome == "succeeded"
    # All but decoding, whose result is a picture that is waited for.
    assert pipeline.picked == len(pipeline.batches) - 1


@pytest.mark.parametrize("ahead", [False, True], ids=["waiting", "ahead"])
def test_what_comes_while_a_batch_runs_is_looked_at_before_the_next(ahead: bool) -> None:
    class Busy(FakePipeline):
        def settle(self) -> None:
            if self._running_s and isinstance(self.batches[-1][0], Denoise) and len(came) == 0:
                came.append(bench.submit(steps=1, priority="high", width=128))
            super().settle()

    came: list[Task] = []
    bench = Bench(Busy(ahead=ahead))
    bench.submit(steps=6)
    bench.drain()
    first = next(n for n, batch in enumerate(bench.pipeline.batches) if isinstance(batch[0], Denoise))
    assert isinstance(bench.pipeline.batches[first + 1][0], Encode)
    assert came[0].outcome == "succeeded"


@pytest.mark.parametrize("ahead", [False, True], ids=["waiting", "ahead"])
def test_a_task_that_is_canceled_while_its_step_runs_takes_no_other(ahead: bool) -> None:
    class Busy(FakePipeline):
        def settle(self) -> None:
            if self._running_s and isinstance(self.batches[-1][0], Denoise):
                task.cancel()
            super().settle()

    bench = Bench(Busy(ahead=ahead))
    task = bench.submit(steps=6)
    bench.drain()
    assert task.outcome == "canceled"
    assert bench.pipeline.sizes(Denoise) == [1]


@pytest.mark.parametrize("ahead", [False, True], ids=["waiting", "ahead"])
def test_time_is_noted_for_what_ran_not_for_what_comes_next(ahead: bool) -> None:
    bench = Bench(FakePipeline(ahead=ahead))
    bench.pipeline.seconds = {"text_encode": 1.0, "noise": 2.0, "denoise": 4.0, "vae_decode": 8.0}
    task = bench.submit(steps=3)
    bench.drain()
    assert task.seconds == {"text_encode": 1.0, "noise": 2.0, "denoise": 12.0, "vae_decode": 8.0}
    assert task.gpu_s == 23.0
