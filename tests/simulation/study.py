"""The cells of the study: a fleet, a mix and a load each; what is read from one."""

from __future__ import annotations

import gc
import random
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from tests.benchmarks.workload import Request
from tests.simulation.fleet import Coming, Fleet, Site
from tests.simulation.pace import Pace, h100
from tests.simulation.redis_load import Shape
from worker.main import SPARE_AFTER_S

OWNERS, SEED = 10, 1

MEDIUM: Final = (Request("medium", 1024, 40, 4.5),)
MIXED: Final = (
    Request("large", 1024, 28, 4.5, 0.10),
    Request("large", 512, 28, 4.5, 0.05),
    Request("large-turbo", 1024, 4, 1.0, 0.35),
    Request("large-turbo", 512, 4, 1.0, 0.15),
    Request("medium", 1024, 40, 4.5, 0.25),
    Request("medium", 512, 40, 4.5, 0.10),
)
MIXES: Final = {"medium": MEDIUM, "mixed": MIXED, "bursty": MIXED}

BURST_S, CALM_S, BURST, CALM = 20.0, 60.0, 2.5, 0.5
"""Bursty: for 20 s on average 2.5 times the mean rate, for 60 s half of it."""

WARM, TAIL = 0.3, 0.95
"""Jobs before this share of all only warm the fleet up; those behind that share only keep it busy."""

GROUPS = 8


@dataclass(frozen=True)
class Question:
    """One cell."""

    mix: str
    gpus: int
    load: float
    jobs: int
    spare_after_s: float = SPARE_AFTER_S


@dataclass(frozen=True)
class Answer:
    """What came out. Seconds: p50, p95, p99."""

    question: Question
    rate: float  # of arrivals, a second
    lost: tuple[float, float, float]  # beyond what such a job takes alone
    lost_error: float  # standard error of its p95
    total: tuple[float, float, float]  # from submit to commit
    queued: tuple[float, float, float]  # from submit to claim
    shape: Shape


def poisson(mix: Sequence[Request], rate: float, count: int, seed: int = SEED) -> Iterator[Coming]:
    """So many requests at `rate` a second, of ten owners."""
    chance, at = random.Random(f"{seed} {rate}"), 0.0
    for request in chance.choices(mix, [one.weight for one in mix], k=count):
        at += chance.expovariate(rate)
        yield Coming(at, request, f"key-{chance.randrange(OWNERS)}")


def bursty(mix: Sequence[Request], rate: float, count: int, seed: int = SEED) -> Iterator[Coming]:
    """The same on average, in bursts and calms."""
    chance, at = random.Random(f"{seed} {rate}"), 0.0
    burst, until = False, chance.expovariate(1 / CALM_S)
    for request in chance.choices(mix, [one.weight for one in mix], k=count):
        while (later := at + chance.expovariate(rate * (BURST if burst else CALM))) > until:
            at, burst = until, not burst
            until = at + chance.expovariate(1 / (BURST_S if burst else CALM_S))
        at = later
        yield Coming(at, request, f"key-{chance.randrange(OWNERS)}")


def capacity(mix: Sequence[Request], pace: Pace, count: int = 400, seed: int = SEED) -> float:
    """Pictures a second of one GPU that always has enough to do, with exactly the shares of the mix."""
    whole = sum(one.weight for one in mix)
    asked = [one for one in mix for _ in range(round(count * one.weight / whole))]
    random.Random(seed).shuffle(asked)
    run = Fleet(Site(1, pace, delivery_s=0.0), mix).run(
        [Coming(0.0, one, f"key-{n % OWNERS}") for n, one in enumerate(asked)]
    )
    return len(asked) / max(job.ended for job in run.jobs)


def answer(question: Question, of_one: float) -> Answer:
    """Runs one cell. of_one: pictures a second of one GPU."""
    gc.disable()  # millions of small objects, none in a circle
    mix, rate = MIXES[question.mix], question.load * question.gpus * of_one
    arrivals = list((bursty if question.mix == "bursty" else poisson)(mix, rate, question.jobs))
    site = Site(question.gpus, h100(), spare_after_s=question.spare_after_s)
    start, end = arrivals[int(WARM * question.jobs)].at, arrivals[int(TAIL * question.jobs)].at
    run = Fleet(site, mix, SEED).run(arrivals, start)
    jobs = [job for job in run.jobs if start <= job.at <= end]
    alone = site.hop_s + site.delivery_s
    lost = [max(0.0, job.delivered - job.at - job.profile.solo_s - alone) for job in jobs]
    asked, seconds = run.asked, (run.asked.until - run.asked.since) * question.gpus
    shape = Shape(
        jobs_s=rate / question.gpus,
        claims_s=asked.claims / seconds,
        events_s=asked.progress_events / seconds,
        busy=asked.busy_s / seconds,
        open_busy=asked.open_busy_s / seconds,
        open_idle=asked.open_idle_s / seconds,
    )
    return Answer(
        question=question,
        rate=rate,
        lost=percentiles(lost),
        lost_error=error(lost),
        total=percentiles([job.delivered - job.at for job in jobs]),
        queued=percentiles([job.claimed - job.at for job in jobs]),
        shape=shape,
    )


def percentiles(found: Sequence[float]) -> tuple[float, float, float]:
    """p50, p95 and p99."""
    cuts = statistics.quantiles(found, n=100, method="inclusive")
    return cuts[49], cuts[94], cuts[98]


def error(found: Sequence[float]) -> float:
    """The standard error of p95, by that of eight stretches of time."""
    size = len(found) // GROUPS
    p95 = [percentiles(found[n * size : (n + 1) * size])[1] for n in range(GROUPS)]
    return statistics.stdev(p95) / GROUPS**0.5
