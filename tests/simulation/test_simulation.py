"""The simulation: it loses no job, agrees with formulas where there are any, and decides as the real parts do."""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import redis
import torch
from PIL import Image

from model.embeddings import Text
from model.work import Denoise, Encode, Work
from tests.benchmarks.plot import COLORS
from tests.benchmarks.workload import Request
from tests.simulation import __main__ as script
from tests.simulation import redis_load, validation
from tests.simulation.broker import Broker
from tests.simulation.fleet import Coming, Fleet, Run, Site
from tests.simulation.gpu import Gpu, Limits, SimJob, profiles
from tests.simulation.pace import EIGHT_STEP_S, FULL_S, SOLO_S, h100, rows_of
from tests.simulation.redis_load import AS_IS, MEASURED, Habits, Shape
from tests.simulation.study import MEDIUM, MIXED, Answer, Question, bursty, capacity, poisson
from tests.worker.fake_pipeline import Bench, FakePipeline
from tests.worker.jobs import make_job
from worker.contract.job import PRIORITIES
from worker.contract.queue import JobQueue
from worker.contract.settings import ContractSettings
from worker.intake import Intake
from worker.scheduler import pick
from worker.task import Task

PACE = h100()
TEXT_TOKENS = 333


def serve(mix: Sequence[Request], arrivals: list[Coming], gpus: int = 1, **site: Any) -> Run:
    return Fleet(Site(gpus, PACE, **site), mix).run(arrivals)


def lost(run: Run) -> list[float]:
    return [job.ended - job.at - job.profile.solo_s for job in run.jobs]


def p95(found: list[float]) -> float:
    return statistics.quantiles(found, n=100)[94]


@pytest.mark.parametrize("arrivals", [poisson, bursty])
def test_every_job_ends_once_after_it_was_claimed_after_it_came(arrivals: Any) -> None:
    coming = list(arrivals(MIXED, 3.0, 200))
    run = serve(MIXED, coming, gpus=4)
    assert [job.at for job in run.jobs] == [one.at for one in coming]
    assert all(job.at <= job.claimed < job.ended < job.delivered for job in run.jobs)
    assert run.gpu_busy_s <= 4 * run.ended


def test_a_job_with_nothing_beside_it_takes_its_solo_time() -> None:
    coming = [Coming(20.0 * n, request) for n, request in enumerate(MIXED)]
    assert lost(serve(MIXED, coming, hop_s=0.0)) == pytest.approx([0.0] * len(MIXED), abs=1e-9)


def test_one_at_a_time_waits_as_the_formula_for_equal_jobs_says() -> None:
    load, service = 0.6, PACE.solo_s("medium", 1024, 40, 2)
    coming = list(poisson(MEDIUM, load / service, 4000))
    run = serve(MEDIUM, coming, limits=Limits(max_jobs=1), hop_s=0.0, delivery_s=0.0)
    expected = load * service / (2 * (1 - load))  # Pollaczek and Khinchine, all services equal
    assert statistics.mean(lost(run)) == pytest.approx(expected, rel=0.1)


def test_more_gpus_at_the_same_load_make_no_job_wait_longer() -> None:
    rate = capacity(MEDIUM, PACE, 60)
    found = [p95(lost(serve(MEDIUM, list(poisson(MEDIUM, 0.7 * n * rate, 400)), gpus=n))) for n in (1, 4, 12)]
    assert found[1] < 1.2 * found[0]
    assert found[2] < 1.2 * found[1]


def test_where_idle_workers_claim_first_a_half_empty_fleet_loses_no_time() -> None:
    rate = capacity(MEDIUM, PACE, 60)
    coming = list(poisson(MEDIUM, 0.5 * 16 * rate, 300))
    eager, patient = (serve(MEDIUM, coming, gpus=16, spare_after_s=after) for after in (0.0, 0.05))
    assert p95(lost(patient)) < 0.05 * p95(lost(eager))


def test_steps_of_a_job_alone_may_be_skipped_over() -> None:
    coming = list(poisson(MIXED, 1.0, 150))
    ends = [[job.ended for job in serve(MIXED, coming, gpus=2, skip_alone=skip).jobs] for skip in (True, False)]
    assert ends[0] == pytest.approx(ends[1])


def test_what_chooses_is_the_workers_scheduler() -> None:
    assert Site(1, PACE).choose is pick
    coming = list(poisson(MIXED, 0.5, 100))

    def last_come(pending: Any, now: float, room: Any) -> Any:
        return pending[-1:]

    assert [job.ended for job in serve(MIXED, coming, choose=last_come).jobs] != [
        job.ended for job in serve(MIXED, coming).jobs
    ]


class Timed(FakePipeline):
    """Takes as long as an H100."""

    def __init__(self, model: str) -> None:
        super().__init__()
        self.model, self.side = model, 512

    def run(self, batch: Sequence[Work], max_rows: int | None = None) -> list[Any]:
        rows = sum(work.rows for work in batch)
        self.seconds = {batch[0].stage: PACE.seconds(self.model, self.side, batch[0].stage, rows)}
        return super().run(batch, max_rows)

    def _one(self, work: Work) -> Any:
        if isinstance(work, Encode):
            return [Text(torch.zeros(TEXT_TOKENS, 8), torch.zeros(8)) for _ in work.prompts]
        return super()._one(work)


def test_the_real_engine_runs_the_same_batches_at_the_same_times() -> None:
    mix = [Request("medium", 512, 12, 4.5), Request("large-turbo", 512, 4, 1.0), Request("medium", 512, 5, 1.0)]
    chance = random.Random(3)
    asked = sorted((chance.uniform(0.0, 4.0), chance.randrange(3)) for _ in range(24))
    pipelines = {model: Timed(model) for model in ("medium", "large-turbo")}
    bench = Bench(pipelines["medium"], others=dict(pipelines), token_budget=9_000, max_jobs=64)
    known = profiles(mix, PACE)
    for profile in known.values():
        for stage in profile.stages.values():
            for _ in range(2):
                bench.engine.forecast.observe(stage.kind, stage.rows, stage.tokens, stage.own_s)
    tasks: dict[int, Task] = {}
    ends: dict[int, float] = {}
    coming = list(enumerate(asked))
    while len(ends) < len(asked):
        if not tasks.keys() - ends.keys():
            bench.clock.seconds = max(bench.clock.seconds, coming[0][1][0])
        while coming and coming[0][1][0] <= bench.clock.seconds:
            n, (_, kind) = coming.pop(0)
            tasks[n] = bench.submit(**_params(mix[kind]))
        bench.engine.step()
        ends |= {n: bench.clock.seconds for n, task in tasks.items() if task.outcome and n not in ends}
    gpu = Gpu(["medium", "large-turbo"], PACE, Limits(max_jobs=64), skip_alone=False)
    # The engine picks the next batch while one runs, by a guess of when that ends: two short works may swap.
    assert _alone(gpu, [(at, known[mix[kind]]) for at, kind in asked]) == pytest.approx(
        [ends[n] for n in range(len(asked))], abs=0.005
    )
    real = [len(batch) for pipeline in pipelines.values() for batch in pipeline.batches]
    assert gpu.batches == len(real)
    assert any(len(b) > 1 for p in pipelines.values() for b in p.batches if isinstance(b[0], Denoise))


def _params(request: Request) -> dict[str, Any]:
    side = {"width": request.side, "height": request.side}
    return {"model": request.model, "steps": request.steps, "guidance_scale": request.guidance_scale, **side}


def _alone(gpu: Gpu, coming: list[tuple[float, Any]]) -> list[float]:
    """Ends of jobs that are submitted straight to one GPU."""
    jobs = [SimJob(profile, at) for at, profile in coming]
    waiting, now = list(jobs), 0.0
    while any(job.ended < 0 for job in jobs):
        if not gpu.held:
            now = max(now, waiting[0].at)
        while waiting and waiting[0].at <= now:
            gpu.submit(waiting.pop(0))
        end = gpu.begin(now)
        assert end is not None
        now = end
        gpu.finish(now)
    return [job.ended for job in jobs]


async def test_claims_give_the_jobs_that_the_real_scripts_give(redis_url: str) -> None:
    chance, models, now = random.Random(5), ["a", "b"], 0.0
    settings = ContractSettings(redis_url=redis_url)  # type: ignore[arg-type]
    queue, intake = JobQueue.connect(settings), Intake.connect(settings, "w")
    broker: Broker[Any] = Broker(models)
    given, left_alone = 0, 0
    try:
        for _ in range(150):
            if chance.random() < 0.5:
                for _ in range(chance.randrange(1, 4)):
                    made = make_job(model=chance.choice(models), priority=chance.choice(PRIORITIES))
                    job = replace(made, owner=f"key-{chance.randrange(3)}")
                    await queue.submit(job)
                    broker.submit(job, now)
            elif chance.random() < 0.3:
                now += 60
                _all_came_earlier(redis_url, 60)
            else:
                want, spare_after_s, intake._first = chance.randrange(1, 5), chance.choice((0.0, 100.0)), 0
                claims = await asyncio.to_thread(intake.claim, models, want, spare_after_s)
                expected = [job.id for job in broker.claim(models, want, now, spare_after_s)]
                assert [claim.job.id for claim in claims] == expected
                given += len(expected)
                left_alone += not expected and any(broker.waiting.values())
    finally:
        intake.close()
        await queue.close()
    assert given > 50
    assert left_alone > 5


def _all_came_earlier(redis_url: str, seconds: int) -> None:
    with redis.Redis.from_url(redis_url) as client:
        for job_id, text in client.hgetall("darkroom:open").items():
            entry = json.loads(text)
            entry["place"] = str(int(entry["place"]) - 1_000_000 * seconds)
            client.hset("darkroom:open", job_id, json.dumps(entry))


def test_one_worker_on_paper_does_as_the_measured_one() -> None:
    """Within 30 %: the arrivals are the same, but one measured run has noise, and paper has no overhead."""
    for pair in validation.against_results():
        assert 0.7 < pair.simulated / pair.measured < 1.3, pair


def test_the_paces_give_back_what_was_measured() -> None:
    for (model, side), (steps, seconds) in (*SOLO_S.items(), *FULL_S.items()):
        assert PACE.solo_s(model, side, steps, rows_of(model)) == pytest.approx(seconds, rel=0.01)
    for (model, side), (rows, seconds) in EIGHT_STEP_S.items():
        assert PACE.denoise[model, side](rows) == pytest.approx(seconds, rel=0.02)


SHAPE = Shape(jobs_s=0.3, claims_s=0.3, events_s=2.0, busy=0.5, open_busy=0.5, open_idle=0.5)


def test_the_wall_is_where_one_core_is_full() -> None:
    gpus = redis_load.wall(lambda n: redis_load.cores(SHAPE, n))
    assert redis_load.cores(SHAPE, gpus) == pytest.approx(1.0, rel=0.05)


@pytest.mark.parametrize(
    "other",
    [replace(AS_IS, woken="one"), replace(AS_IS, progress_s=1.0), Habits("", replace(MEASURED, renew_worker=0.0))],
)
def test_what_moves_the_wall_moves_it_outwards(other: Habits) -> None:
    assert redis_load.cores(SHAPE, 500, other) < redis_load.cores(SHAPE, 500)


def test_a_loop_that_hears_nothing_turns_when_its_time_is_up_and_else_as_often_as_it_hears() -> None:
    assert redis_load.turns_s(0.0, 0.25) == 4
    assert redis_load.turns_s(1000.0, 0.25) == pytest.approx(1000)


def test_a_loop_that_lets_a_while_pass_after_news_turns_no_more_often_than_that() -> None:
    assert redis_load.turns_s(0.0, 0.25, 0.05) == 4
    assert redis_load.turns_s(1e6, 0.25, 0.05) == pytest.approx(20, rel=0.01)


def test_waits_are_drawn(tmp_path: Path) -> None:
    cells = [
        Question("mixed", gpus, load, 300, spare) for gpus in (1, 8) for load in (0.5, 0.9) for spare in (0.0, 0.05)
    ]
    times = (0.1, 1.0, 2.0)
    script.draw([Answer(cell, 1.0, times, 0.1, times, times, SHAPE) for cell in cells], tmp_path / "waits.png")
    with Image.open(tmp_path / "waits.png") as plot:
        assert plot.format == "PNG"
        assert {plot_color[1] for plot_color in plot.getcolors(1 << 20)} >= {_rgb(color) for color in COLORS[:2]}


def _rgb(color: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(color[1:]))


@pytest.mark.slow  # two processes load torch
@pytest.mark.timeout(300)
def test_the_script_writes_its_tables_and_draws_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["simulate", "--quick", "--out", str(tmp_path)])
    script.main()
    tables = (tmp_path / "simulation.md").read_text()
    assert [line for line in tables.splitlines() if line.startswith("### ")] == [
        "### One worker, on paper and measured",
        "### Pictures a second of one GPU",
        "### Waits",
        "### Redis",
    ]
    assert tables.count("| mixed | 50 ms |") == tables.count("| mixed | no |") == 4
    assert (tmp_path / "simulation.png").stat().st_size > 0
