"""The tables as printed."""

from __future__ import annotations

from collections.abc import Sequence

from tests.benchmarks.workload import Request
from tests.simulation.pace import Pace, rows_of
from tests.simulation.redis_load import CHANGES, cores, demand, gateway_cores, gateways, wall
from tests.simulation.study import Answer

SPEED_HEAD = "| | alone | pictures a second | a day | PNG a day |\n| --- | --- | --- | --- | --- |"
PNG_MB = {512: 0.45, 1024: 1.6}
"""Megabytes of a photograph-like PNG: assumed; JPEG takes about a fifth."""

WAIT_HEAD = (
    "| mix | spares wait | GPUs | load | requests a minute | lost p50 | p95 | p99 | total p50 | p95 | p99 "
    "| in the queue p95 |\n| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
)


def speed_row(kind: Request, pace: Pace, rate: float) -> str:
    """One model and size."""
    solo = pace.solo_s(kind.model, kind.side, kind.steps, rows_of(kind.model))
    gigabytes = rate * 86_400 * PNG_MB[kind.side] / 1000
    return f"| {kind.name} | {solo:.2f} s | {rate:.3f} | {rate * 86_400:,.0f} | {gigabytes:.0f} GB |"


def ordered(answers: Sequence[Answer]) -> list[Answer]:
    """As they are read: by mix, spares, fleet and load."""
    mixes = ["medium", "mixed", "bursty"]

    def place(one: Answer) -> tuple[float, ...]:
        q = one.question
        return mixes.index(q.mix), -q.spare_after_s, q.gpus, q.load

    return sorted(answers, key=place)


def wait_row(one: Answer) -> str:
    """One cell."""
    q, lost = one.question, [f"{seconds:.2f}" for seconds in one.lost]
    lost[1] += f" ± {one.lost_error:.2f}"
    times = [*lost, *(f"{seconds:.2f}" for seconds in one.total), f"{one.queued[1]:.2f}"]
    spare = f"{1000 * q.spare_after_s:.0f} ms" if q.spare_after_s else "no"
    return f"| {q.mix} | {spare} | {q.gpus:,} | {q.load:g} | {60 * one.rate:,.0f} | {' | '.join(times)} |"


def typical(answers: Sequence[Answer]) -> Answer:
    """The cell by which Redis' load is reckoned: mixed, half load, the fleet of 64 or the largest there is."""
    found = [
        one
        for one in answers
        if one.question.mix == "mixed" and one.question.load == 0.5 and one.question.spare_after_s
    ]
    return min(found, key=lambda one: abs(one.question.gpus - 64))


def redis_lines(answers: Sequence[Answer]) -> list[str]:
    """What a fleet asks, and where the wall is."""
    shape, sizes = typical(answers).shape, (64, 256, 1000)
    uses = {gpus: {one.name: one for one in demand(shape, gpus)} for gpus in sizes}
    lines = [
        "Mixed requests at load 0.5: requests a second, and shares of one core of Redis.",
        "",
        "| | " + " | ".join(f"{gpus:,} GPUs: a second | cores" for gpus in sizes) + " |",
        "| --- " * (1 + 2 * len(sizes)) + "|",
    ]
    for name in uses[sizes[-1]]:
        cells = " | ".join(f"{uses[n][name].each_second:,.0f} | {uses[n][name].cores:.3f}" for n in sizes)
        lines.append(f"| {name} | {cells} |")
    totals = " | ".join(f" | {cores(shape, n):.2f}" for n in sizes)
    lines += [f"| in all | {totals} |", ""]
    halls = " | ".join(str(gateways(shape.jobs_s * n)) for n in sizes)
    heard = " | ".join(f"{100 * gateway_cores(shape, n):.1f} %" for n in sizes)
    lines += [
        "| | " + " | ".join(f"{gpus:,} GPUs" for gpus in sizes) + " |",
        "| --- " * (1 + len(sizes)) + "|",
        f"| gateways, half busy | {halls} |",
        f"| of each gateway's core, to hear of all jobs' events | {heard} |",
        "",
        "One core of Redis is full at so many GPUs, mixed requests:",
        "",
        "| | " + " | ".join(f"load {load:g}" for load in _loads(answers)) + " |",
        "| --- " * (1 + len(_loads(answers))) + "|",
    ]
    for habits in CHANGES:
        walls = [wall(lambda n, s=one.shape, h=habits: cores(s, n, h)) for one in _by_load(answers)]  # type: ignore[misc]
        lines.append(f"| {habits.name} | {' | '.join(f'{n:,.0f}' for n in walls)} |")
    return lines


def _by_load(answers: Sequence[Answer]) -> list[Answer]:
    fleet = typical(answers).question.gpus
    found = [
        one
        for one in ordered(answers)
        if one.question.mix == "mixed" and one.question.gpus == fleet and one.question.spare_after_s
    ]
    return [one for one in found if one.question.load in (0.1, 0.5, 0.9)]


def _loads(answers: Sequence[Answer]) -> list[float]:
    return [one.question.load for one in _by_load(answers)]
