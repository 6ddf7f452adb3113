"""Three ways to serve under Poisson arrivals, and a short job beside a long one: a table, and a plot as PNG.

python -m tests.benchmarks.serving --out build/bench-serving
python -m tests.benchmarks.serving --models large,large-turbo,medium --random-weights --loads 0.5,0.95 --out gpu
python -m tests.benchmarks.serving --overhead

In this process, without HTTP and Redis: the engine and the pipelines alone. Pictures are not written to files.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog
import torch

from model.config import VARIANTS
from model.pipeline import Pipeline
from tests.benchmarks import models, overhead, plot
from tests.benchmarks.policies import POLICIES, Served, drive
from tests.benchmarks.workload import Arrival, Request, at_once, poisson
from worker.settings import ModelSource, WorkerSettings

FIRST_COME = "one at a time"
OVERTAKE_MOST = 2.5
"""Times its solo time that a job of a tenth of a long one's work may take beside it."""

LEAST_JOBS = 60


@dataclass(frozen=True)
class Cell:
    """One policy under one load."""

    load: float
    policy: str
    served: Sequence[Served]
    solo: Mapping[Request, float]

    def latency(self, percent: int, *, short: bool = False) -> float:
        """Seconds that so many percent of the requests took at most; NaN: there was none."""
        found = [one.latency for one in self.served if one.request.short or not short]
        if len(found) < 2:
            return found[0] if found else math.nan
        return statistics.quantiles(found, n=100, method="inclusive")[percent - 1]

    def within(self, factor: float) -> float:
        """The share that took at most so many times its solo time."""
        kept = [one.latency <= factor * self.solo[one.request] for one in self.served]
        return statistics.mean(kept)

    @property
    def rate(self) -> float:
        """Pictures a second."""
        return len(self.served) / max(one.ended for one in self.served)


@dataclass(frozen=True)
class Bench:
    """Models ready to be asked."""

    pipelines: Mapping[str, Pipeline]
    settings: WorkerSettings
    seed: int

    def solo_s(self, request: Request, times: int = 3) -> float:
        """Seconds of such a request alone, the median; one more warms up."""
        found = []
        for n in range(times + 1):
            (one,) = drive(self.pipelines, self.settings, POLICIES[FIRST_COME], [Arrival(0.0, request, 1000 + n)])
            found.append(one.latency)
        return statistics.median(found[1:])

    def capacity(self, mix: Sequence[Request], policy: str, count: int) -> float:
        """Pictures a second if there is always enough to do."""
        arrivals = at_once(mix, count, self.seed)
        served = drive(self.pipelines, self.settings, POLICIES[policy], arrivals)
        return len(served) / max(one.ended for one in served)

    def cell(self, mix: Sequence[Request], load: float, rate: float, count: int, policy: str) -> list[Served]:
        """One policy under one load."""
        return drive(self.pipelines, self.settings, POLICIES[policy], poisson(mix, rate, count, self.seed))

    def beside(self, long: Request, short: Request, after_s: float, policy: str) -> float:
        """Seconds that a short job takes that comes so long after a long one."""
        arrivals = [Arrival(0.0, long, 1), Arrival(after_s, short, 2)]
        (one,) = [
            one for one in drive(self.pipelines, self.settings, POLICIES[policy], arrivals) if one.request == short
        ]
        return one.latency


def overtaking(bench: Bench, requests: Sequence[tuple[Request, Request]], times: int) -> tuple[list[str], float]:
    """Lines of a table, and the worst of the engine's medians in solo times."""
    lines = [
        "| a short job | beside a long one | solo: short, long | short beside long, first come first served "
        "| with the engine | times its solo |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    worst = 0.0
    for long, short in requests:
        solo_long, solo_short = bench.solo_s(long, 1), bench.solo_s(short)
        moments = [solo_long * (0.1 + 0.5 * n / times) for n in range(times)]
        ours = [bench.beside(long, short, at, "engine") for at in moments]
        theirs = bench.beside(long, short, moments[0], FIRST_COME)
        factor = statistics.median(ours) / solo_short
        worst = max(worst, factor)
        lines.append(
            f"| {short.name} | {long.name} | {solo_short:.3f} s, {solo_long:.3f} s | {theirs:.3f} s "
            f"| {statistics.median(ours):.3f} s (at most {max(ours):.3f}, of {times}) | {factor:.2f} |"
        )
    return lines, worst


def grid(bench: Bench, mix: Sequence[Request], chosen: argparse.Namespace) -> Iterator[Cell]:
    """All policies under all loads, each when it is done."""
    loads = [float(load) for load in chosen.loads.split(",")]
    solo = {request: bench.solo_s(request) for request in mix}
    for request, seconds in solo.items():
        print(
            f"solo: {request.name}: {seconds:.3f} s, {100 * request.weight / total(mix):.0f} % of requests", flush=True
        )
    rates = {name: bench.capacity(mix, name, chosen.capacity_jobs) for name in POLICIES}
    for name, rate in rates.items():
        print(f"capacity, {name}: {rate:.2f} pictures a second, {chosen.capacity_jobs} at once", flush=True)
    seconds_a_job = sum(max(1 / load, rates["engine"] / rate) for load in loads for rate in rates.values())
    fitting = int(60 * chosen.minutes * rates["engine"] / seconds_a_job)
    count = chosen.jobs or max(LEAST_JOBS, min(1000, fitting))
    print(f"{count} requests a cell, about {count * seconds_a_job / rates['engine'] / 60:.1f} minutes", flush=True)
    for load in loads:
        for name in POLICIES:
            cell = Cell(load, name, bench.cell(mix, load, load * rates["engine"], count, name), solo)
            print(row(cell), flush=True)
            yield cell


def total(mix: Sequence[Request]) -> float:
    """Of all weights."""
    return sum(request.weight for request in mix)


HEAD = (
    "| load | policy | requests | pictures a second | p50 | p95 | p50, short | p95, short | within 2 x solo "
    "| within 5 x solo |\n| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
)


def row(cell: Cell) -> str:
    """One line of the table."""
    times = [cell.latency(50), cell.latency(95), cell.latency(50, short=True), cell.latency(95, short=True)]
    figures = " | ".join(f"{seconds:.2f} s" for seconds in times)
    return (
        f"| {cell.load:g} | {cell.policy} | {len(cell.served)} | {cell.rate:.2f} | {figures} "
        f"| {100 * cell.within(2):.0f} % | {100 * cell.within(5):.0f} % |"
    )


def draw(cells: Sequence[Cell], path: Path) -> None:
    """p95 of all and of short requests, and how many kept within twice their solo time."""
    loads = sorted({cell.load for cell in cells})

    def lines(value: object) -> dict[str, list[float]]:
        assert callable(value)
        return {name: [float(value(c)) for c in cells if c.policy == name] for name in POLICIES}

    label = "offered load, as a share of the engine's capacity"
    plot.save(
        [
            plot.Chart("p95 latency, all requests, seconds", label, loads, lines(lambda c: c.latency(95)), log=True),
            plot.Chart(
                "p95 latency, short requests, seconds",
                label,
                loads,
                lines(lambda c: c.latency(95, short=True)),
                log=True,
            ),
            plot.Chart("done within 2 x solo, %", label, loads, lines(lambda c: 100 * c.within(2)), top=100.0),
        ],
        path,
    )


def pairs(names: Sequence[str], sides: tuple[int, int], most_steps: int) -> list[tuple[Request, Request]]:
    """A long request, and a short one of a tenth of its steps: of its size, of a smaller one, of another model."""
    first = names[0]
    scale = VARIANTS[first].guidance_scale if first in VARIANTS else 3.0
    steps = (40 if most_steps >= 28 else 20) if first in VARIANTS else 100
    small, large = sides
    short = Request(first, large, steps // 10, scale, short=True)
    found = [
        (Request(first, large, steps, scale), short),
        (Request(first, large, steps, scale), Request(first, small, steps // 10, scale, short=True)),
    ]
    if "large-turbo" in names and first != "large-turbo":
        turbo = VARIANTS["large-turbo"]
        found.append(
            (
                Request(first, large, min(28, steps), scale),
                Request(turbo.name, large, turbo.steps, turbo.guidance_scale, short=True),
            )
        )
    return found


def options() -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(prog="make bench-serving", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, default=Path("build/bench-serving"), help="folder of table and plot")
    parser.add_argument("--models", default=models.TINY, help="`tiny`, variants (with --random-weights), or name=path")
    parser.add_argument("--random-weights", action="store_true", help="full size on a GPU; toy size elsewhere")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--sides", default="", help="two sides in pixels; default 512,1024 on a GPU, 64,128 elsewhere")
    parser.add_argument("--loads", default="0.5,0.8,0.95", help="shares of the engine's capacity")
    parser.add_argument("--jobs", type=int, default=0, help="requests a cell; default: what fits into --minutes")
    parser.add_argument("--minutes", type=float, default=4.0, help="for the grid alone")
    parser.add_argument("--most-steps", type=int, default=40, help="of a variant's request; fewer make a run shorter")
    parser.add_argument(
        "--capacity-jobs", type=int, default=40, help="requests at once that capacities are measured with"
    )
    parser.add_argument("--overtakes", type=int, default=5, help="times that a short job meets a long one; 0: none")
    parser.add_argument("--max-jobs", type=int, default=8, help="that the engine holds")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--overhead", action="store_true", help="only this: the engine's own time, with a trace")
    parser.add_argument("--overhead-steps", type=int, default=10)
    return parser.parse_args()


def main() -> int:
    """Measure, print, write; 1 if a short job had to wait too long for a long one."""
    chosen = options()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(30))
    settings = WorkerSettings.model_validate({"device": chosen.device, "max_jobs": chosen.max_jobs})
    entries = chosen.models.split(",")
    names = [entry.partition("=")[0] for entry in entries]
    started = time.monotonic()
    if chosen.random_weights:
        pipelines = models.random_pipelines(names, settings)
    elif entries == [models.TINY]:
        pipelines = models.tiny_pipelines(settings)
    else:
        pipelines = models.loaded([ModelSource.parse(entry) for entry in entries], settings)
    device = next(iter(pipelines.values())).device
    small, large = map(int, (chosen.sides or ("512,1024" if device.type == "cuda" else "64,128")).split(","))
    bench, mix = Bench(pipelines, settings, chosen.seed), models.mix_of(names, (small, large), chosen.most_steps)
    what = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    title = f"{what}, {os.cpu_count()} cores, torch {torch.__version__}; models {', '.join(names)}; seed {chosen.seed}"
    print(f"{title}; loaded in {time.monotonic() - started:.0f} s", flush=True)
    chosen.out.mkdir(parents=True, exist_ok=True)
    if chosen.overhead:
        scales = {request.model: request.guidance_scale for request in mix}
        requests = [
            Request(name, side, chosen.overhead_steps, scales[name]) for name in names for side in (small, large)
        ]
        found = []
        for request in requests:
            found.append(overhead.measure(pipelines, settings, request))
            print(overhead.row(found[-1]), flush=True)
        text = overhead.table(found)
        (chosen.out / "overhead.md").write_text(f"{title}\n\n{text}\n")
        return 0
    cells: list[Cell] = []
    for cell in grid(bench, mix, chosen):
        cells.append(cell)  # written down each time: a run that is cut short leaves what it has
        (chosen.out / "serving.md").write_text("\n".join([title, "", HEAD, *map(row, cells), ""]))
    draw(cells, chosen.out / "serving.png")
    worst = 0.0
    if chosen.overtakes:
        lines, worst = overtaking(bench, pairs(names, (small, large), chosen.most_steps), chosen.overtakes)
        print("\n".join(lines), flush=True)
        (chosen.out / "serving.md").write_text("\n".join([title, "", *lines, "", HEAD, *map(row, cells), ""]))
    print(f"{time.monotonic() - started:.0f} s in all; written to {chosen.out}", flush=True)
    return 0 if worst <= OVERTAKE_MOST else 1


if __name__ == "__main__":
    sys.exit(main())
