"""Whether the simulation can be believed: against what one worker measured, with the very same arrivals."""

from __future__ import annotations

import itertools
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from model.pipeline import Pipeline
from model.text import CLIP_LENGTH
from tests.benchmarks import models, policies, serving
from tests.benchmarks.workload import Arrival, Request, at_once, poisson
from tests.simulation.fleet import Coming, Fleet, Site
from tests.simulation.gpu import DECODE, DENOISE, ENCODE, NOISE, Limits
from tests.simulation.pace import Line, Pace, h100, line
from worker.budget import TOKENS
from worker.engine import Engine
from worker.metrics import WorkerMetrics
from worker.settings import ModelSource, WorkerSettings
from worker.task import Task

MEASURED = {0.5: (0.49, 1.18, 0.28, 0.94), 0.95: (0.73, 3.48, 0.50, 1.88)}
"""By load: p50 and p95 of all, of short ones. RESULTS.md, one H100, "Serving policies", the engine's rows."""

ENGINE: Final[dict[str, Any]] = {"hop_s": 0.0, "delivery_s": 0.0, "spare_after_s": 0.0}
"""The benchmark hands requests to the engine itself: nobody submits, claims or delivers."""

CAPACITY, REQUESTS, BENCH_SEED = 2.36, 60, 1
DEMO, SIDES, LIVE_REQUESTS = "demo", (64, 128), 40


@dataclass(frozen=True)
class Pair:
    """One figure twice."""

    what: str
    measured: float
    simulated: float

    def row(self) -> str:
        """One line of the table."""
        ratio = self.simulated / self.measured
        return f"| {self.what} | {self.measured:.2f} | {self.simulated:.2f} | {ratio:.2f} |"


HEAD = "| | measured | simulated | ratio |\n| --- | --- | --- | --- |"


def serve(arrivals: Sequence[Arrival], mix: Sequence[Request], site: Site) -> list[policies.Served]:
    """The same arrivals in the simulation."""
    run = Fleet(site, mix).run([Coming(one.at, one.request) for one in arrivals])
    return [policies.Served(job.profile.request, job.at, job.ended) for job in run.jobs]


def figures(served: Sequence[policies.Served]) -> tuple[float, float, float, float]:
    """p50 and p95 of all, then of short ones."""
    every = [one.latency for one in served]
    short = [one.latency for one in served if one.request.short]
    cuts = [statistics.quantiles(found, n=100, method="inclusive") for found in (every, short)]
    return cuts[0][49], cuts[0][94], cuts[1][49], cuts[1][94]


WORDS = ("p50, s", "p95, s", "p50 of short ones, s", "p95 of short ones, s")


def against_results() -> list[Pair]:
    """The H100's serving benchmark."""
    mix = models.mix_of(["large", "large-turbo", "medium"], (512, 1024), 8)
    site = Site(1, h100(), **ENGINE)
    at_start = serve(at_once(mix, 24, BENCH_SEED), mix, site)
    found = [Pair("capacity, pictures a second", CAPACITY, 24 / max(one.ended for one in at_start))]
    for load, measured in MEASURED.items():
        served = serve(poisson(mix, load * CAPACITY, REQUESTS, BENCH_SEED), mix, site)
        found += [
            Pair(f"load {load:g}: {word}", *both) for word, *both in zip(WORDS, measured, figures(served), strict=True)
        ]
    return found


def another_draw(load: float, draws: int = 30) -> tuple[float, float]:
    """Lowest and highest p95 of all among other draws of the same sixty arrivals: what one draw is worth."""
    mix = models.mix_of(["large", "large-turbo", "medium"], (512, 1024), 8)
    site = Site(1, h100(), **ENGINE)
    found = [figures(serve(poisson(mix, load * CAPACITY, REQUESTS, seed), mix, site))[1] for seed in range(draws)]
    return min(found), max(found)


def live(load: float = 0.7) -> list[Pair]:
    """This machine, now, with the demo model: serving.py's engine policy, then the same arrivals on paper."""
    settings = WorkerSettings(device="cpu")
    (source,) = [one for one in WorkerSettings.model_fields["models"].get_default(call_default_factory=True)
                 if one.name == DEMO]  # fmt: skip
    assert isinstance(source, ModelSource)
    pipelines = models.loaded([source], settings)
    mix = models.mix_of([DEMO], SIDES, 40)
    pace = calibrated(pipelines, settings, mix)
    tokens = settings.token_budget or TOKENS["cpu"]
    site = Site(1, pace, Limits(tokens=tokens), **ENGINE)
    bench = serving.Bench(pipelines, settings, BENCH_SEED)
    rate = load * bench.capacity(mix, "engine", 20)
    arrivals = poisson(mix, rate, LIVE_REQUESTS, BENCH_SEED)
    measured = policies.drive(pipelines, settings, policies.POLICIES["engine"], arrivals)
    simulated = serve(arrivals, mix, site)
    return [
        Pair(f"load {load:g}: {word}", *both)
        for word, *both in zip(WORDS, figures(measured), figures(simulated), strict=True)
    ]


def calibrated(pipelines: Mapping[str, Pipeline], settings: WorkerSettings, mix: Sequence[Request]) -> Pace:
    """Seconds of every stage on this machine, by the engine's own forecast, with one to four jobs at a time."""
    text: list[tuple[float, float]] = []
    noise: list[float] = []
    steps: dict[int, list[tuple[float, float]]] = defaultdict(list)
    decode: dict[int, list[float]] = defaultdict(list)
    sides = sorted({request.side for request in mix})
    seeds = itertools.count(10_000)  # each text anew: of those that are kept the engine learns nothing
    _paces(pipelines, settings, mix[0], 1, seeds)
    for request in [next(one for one in mix if one.side == side) for side in sides]:
        for count in (1, 2, 3, 4):
            found = _paces(pipelines, settings, request, count, seeds)
            text += found[ENCODE].items()
            noise += [seconds / rows for rows, seconds in found[NOISE].items()]
            steps[request.side] += found[DENOISE].items()
            decode[request.side] += found[DECODE].values()
    (name,) = pipelines
    return Pace(
        text={name: _fit(text)},
        denoise={(name, side): _fit(found) for side, found in steps.items()},
        decode_s={(name, side): statistics.median(seconds) for side, seconds in decode.items()},
        noise_s=statistics.median(noise),
        text_tokens=next(iter(pipelines.values())).t5_length + CLIP_LENGTH,
    )


def _fit(points: list[tuple[float, float]]) -> Line:
    return line(points) if len({rows for rows, _ in points}) > 1 else Line(0.0, points[0][1] / points[0][0])


def _paces(
    pipelines: Mapping[str, Pipeline], settings: WorkerSettings, request: Request, count: int, seeds: Iterator[int]
) -> dict[str, dict[int, float]]:
    """Seconds by stage and rows of so many such jobs at once."""
    engine = Engine(pipelines, settings=settings, metrics=WorkerMetrics(), ended=lambda task: None)
    for _ in range(count):
        engine.submit(Task(request.job(next(seeds))))
    engine.stop()
    engine.run()
    found: dict[str, dict[int, float]] = {}
    for kind, paces in engine.forecast._paces.items():
        found[kind.stage] = {rows: pace.seconds for rows, pace in paces.items()}
    return found
