"""How long work takes: what is known of it, and jobs that cannot make their deadline."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from model.work import Denoise
from tests.worker.fake_pipeline import Bench, Clock, FakePipeline
from tests.worker.jobs import make_job
from worker.forecast import FIRST_S, FRESH_S, MAX_KINDS, Forecast, Kind
from worker.task import Task

STEP = Kind("tiny", "denoise", (64, 64))
WIDE = Kind("tiny", "denoise", (64, 128))


def observed(*batches: tuple[int, float], kind: Kind = STEP) -> Forecast:
    forecast = Forecast()
    for rows, seconds in batches:
        forecast.observe(kind, rows, 100 * rows, seconds)
    return forecast


def test_nothing_is_claimed_of_what_never_ran_or_ran_once() -> None:
    assert Forecast().least(STEP, 2) == 0
    assert observed((2, 5.0)).least(STEP, 2) == 0


def test_the_first_batch_is_forgotten_once_there_is_another() -> None:
    assert observed((2, 9.0), (2, 1.0)).least(STEP, 2) == 1.0


def test_one_slow_batch_among_many_changes_nothing() -> None:
    assert observed((2, 9.0), *[(2, 1.0)] * 4, (2, 50.0)).least(STEP, 2) == 1.0


def test_a_lasting_change_of_pace_is_followed() -> None:
    forecast = observed(*[(2, 1.0)] * 20, *[(2, 3.0)] * 9)
    assert forecast.least(STEP, 2) == 3.0
    assert forecast.expected(STEP, 2, 200) == 3.0


def test_of_a_pace_that_varies_the_least_is_the_fastest() -> None:
    assert observed((2, 1.0), *[(2, 9.0)] * 5, (2, 2.0)).least(STEP, 2) == 2.0


def test_what_was_measured_long_ago_says_nothing_of_the_least() -> None:
    clock = Clock()
    forecast = Forecast(clock=clock)
    for _ in range(2):
        forecast.observe(STEP, 2, 200, 3.0)
    clock.seconds = FRESH_S
    assert forecast.least(STEP, 2) == 3.0
    clock.seconds += 1
    assert forecast.least(STEP, 2) == 0
    assert forecast.expected(STEP, 2, 200) == 3.0


def test_of_a_larger_batch_the_least_is_its_share_and_of_a_smaller_one_no_less_than_that() -> None:
    forecast = observed((4, 2.0), (4, 2.0))
    assert forecast.least(STEP, 2) == 1.0
    assert forecast.least(STEP, 8) == 2.0
    assert forecast.expected(STEP, 8, 800) == 4.0


def test_what_never_ran_is_expected_by_its_tokens() -> None:
    forecast = observed((2, 1.0))
    assert forecast.expected(WIDE, 2, 400) == 2.0
    assert forecast.least(WIDE, 2) == 0


def test_a_pace_that_was_measured_beforehand_stands_in_until_something_ran() -> None:
    forecast = Forecast({"tiny": {"denoise": 0.5}})
    assert forecast.expected(STEP, 2, 100) == 50.0
    assert forecast.allowance(STEP, 2, 100) == 50.0
    assert forecast.least(STEP, 2) == 0
    forecast.observe(STEP, 2, 100, 1.0)
    assert forecast.expected(WIDE, 2, 100) == 1.0


def test_the_first_of_a_kind_is_allowed_more_time_than_expected() -> None:
    forecast = observed((2, 1.0))
    assert forecast.allowance(STEP, 2, 200) == 1.0
    assert forecast.allowance(WIDE, 2, 400) == FIRST_S
    assert forecast.allowance(WIDE, 2, 10_000) == 50.0


def test_kinds_are_remembered_up_to_a_bound() -> None:
    forecast = Forecast()
    for n in range(MAX_KINDS + 1):
        for _ in range(2):
            forecast.observe(Kind("tiny", "denoise", (n,)), 1, 1, 1.0)
    assert forecast.least(Kind("tiny", "denoise", (0,)), 1) == 0
    assert forecast.least(Kind("tiny", "denoise", (1,)), 1) == 1.0


@pytest.fixture
def bench() -> Bench:
    """Its clock is the wall's too; a step takes a second, a decoding two."""
    pipeline = FakePipeline()
    pipeline.seconds = {"denoise": 1.0, "vae_decode": 2.0}
    return Bench(pipeline, now=pipeline.clock)


def run_two(bench: Bench, **asked: Any) -> None:
    """Two jobs, one after the other, so that their like is known."""
    for n in range(2):
        bench.submit(steps=3, **asked)
        while len(bench.ended) <= n:
            bench.engine.step()
    bench.pipeline.batches.clear()


def due(bench: Bench, seconds: float, **asked: Any) -> Task:
    """A task whose deadline is so far off, by the bench's clock."""
    task = Task(replace(make_job(**asked), deadline=bench.clock.seconds + seconds))
    bench.engine.submit(task)
    return task


def test_a_job_that_cannot_make_it_fails_before_its_first_step(bench: Bench) -> None:
    run_two(bench)
    task = due(bench, 10, steps=9)
    bench.drain()
    assert task.failure.code == "deadline_exceeded"
    assert task.failure.message == (
        "the deadline cannot be met: 10.0 s are left, at least 11.0 s are needed, after 0 of 9 steps"
    )
    assert bench.pipeline.sizes(Denoise) == []


def test_a_worker_that_was_slow_once_takes_jobs_again_when_it_is_not(bench: Bench) -> None:
    run_two(bench)
    bench.pipeline.seconds["denoise"] = 12.0  # the machine is busy with something else
    bench.submit(steps=10)
    while len(bench.ended) < 3:
        bench.engine.step()
    bench.pipeline.seconds["denoise"] = 1.0
    hopeless = due(bench, 30, steps=9)
    while len(bench.ended) < 4:
        bench.engine.step()
    assert hopeless.failure.code == "deadline_exceeded"
    bench.clock.seconds += FRESH_S + 1
    tried = due(bench, 30, steps=9)
    bench.drain()
    assert tried.outcome == "succeeded"


def test_a_job_that_can_just_make_it_runs(bench: Bench) -> None:
    run_two(bench)
    task = due(bench, 11.2, steps=9)
    bench.drain()
    assert task.outcome == "succeeded"


def test_a_job_that_others_have_made_late_fails_as_soon_as_that_is_sure(bench: Bench) -> None:
    run_two(bench)
    task, rival = due(bench, 12.5, steps=9, width=128), due(bench, 500, steps=4)
    bench.drain()
    assert rival.outcome == "succeeded"
    assert task.failure.code == "deadline_exceeded"
    assert bench.clock.seconds < 500


def test_a_job_of_a_size_that_never_ran_is_given_its_chance(bench: Bench) -> None:
    run_two(bench)
    task = due(bench, 3.5, steps=9, width=256)
    bench.drain()
    assert task.failure.code == "deadline_exceeded"
    assert len(bench.pipeline.sizes(Denoise)) == 2  # then its pace is known


def test_pictures_that_share_a_batch_are_not_counted_twice(bench: Bench) -> None:
    run_two(bench, num_images=4)
    task = due(bench, 9 + 4 * 2 + 0.5, steps=9, num_images=4)
    bench.drain()
    assert task.outcome == "succeeded"


def test_pictures_of_a_deterministic_job_are_counted_one_by_one(bench: Bench) -> None:
    run_two(bench)
    task = due(bench, 3 * 9 + 3 * 2 - 0.5, steps=9, num_images=3, deterministic=True)
    bench.drain()
    assert task.failure.message.startswith("the deadline cannot be met")
    assert bench.pipeline.sizes(Denoise) == []
