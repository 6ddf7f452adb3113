"""1 to 1,000 GPUs on paper: waits by load, what Redis is asked, and where the first wall is. Tables, and plots as PNG.

python -m tests.simulation [--out build/simulation] [--quick]
python -m tests.simulation --measure
python -m tests.simulation --live
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import TextIO

from tests.benchmarks import plot
from tests.benchmarks.workload import Request
from tests.simulation import measure, tables, validation
from tests.simulation.pace import h100
from tests.simulation.redis_load import CHANGES, cores
from tests.simulation.study import MIXES, Answer, Question, answer, capacity
from worker.main import SPARE_AFTER_S

LOADS = (0.1, 0.3, 0.5, 0.7, 0.9, 0.95)
JOBS = {1: 2500, 8: 2500, 64: 3000, 256: 4000, 1000: 16_000}
"""By GPUs: so many that a large fleet, too, is watched for half a minute."""

PROCESSES = 2


def questions(quick: bool) -> list[Question]:
    """All cells, the largest first."""
    if quick:
        spares = (0.0, SPARE_AFTER_S)
        return [Question("mixed", *cell[:2], 300, cell[2]) for cell in product((1, 8), (0.5, 0.9), spares)]

    def ask(mix: str, gpus: Sequence[int], loads: Sequence[float], spare: float = SPARE_AFTER_S) -> list[Question]:
        return [Question(mix, n, load, JOBS[n], spare) for n, load in product(gpus, loads)]

    found = ask("mixed", (1, 8, 64, 256), LOADS) + ask("mixed", (1000,), (0.1, 0.5, 0.9))
    found += ask("mixed", (1, 8, 64, 256), (0.5, 0.9), 0.0) + ask("mixed", (1000,), (0.5,), 0.0)
    found += ask("medium", (1, 8, 64), (0.5, 0.7, 0.9)) + ask("bursty", (1, 8, 64), (0.5, 0.7))
    return sorted(found, key=lambda one: -one.jobs * one.load)


def run(cells: Sequence[Question], of_one: dict[str, float]) -> list[Answer]:
    """Every cell, in a few processes; a line of each that is done."""
    found = []
    with ProcessPoolExecutor(PROCESSES, mp_context=get_context("spawn")) as pool:
        for done in as_completed([pool.submit(answer, cell, of_one[cell.mix]) for cell in cells]):
            found.append(done.result())
            sys.stderr.write(f"{len(found)} of {len(cells)}: {tables.wait_row(found[-1])}\n")
    return found


def draw(answers: Sequence[Answer], path: Path) -> None:
    """p95 by load; the same if busy workers claimed as soon as idle ones; Redis' cores by GPUs."""
    mixed = [one for one in answers if one.question.mix == "mixed"]
    least = 0.01

    def lines(spare: float) -> tuple[list[float], dict[str, list[float]]]:
        these = sorted((one for one in mixed if one.question.spare_after_s == spare), key=lambda one: one.question.load)
        loads = sorted({one.question.load for one in these})
        fleets = sorted({one.question.gpus for one in these})
        lost = {
            f"{gpus} GPU": [max(least, one.lost[1]) for one in these if one.question.gpus == gpus] for gpus in fleets
        }
        return loads, {name: values for name, values in lost.items() if len(values) == len(loads)}

    label = "load, as a share of what the GPUs can do"
    loads, now = lines(SPARE_AFTER_S)
    few_loads, then = lines(0.0)
    shape = tables.typical(answers).shape
    sizes, drawn = [1.0, 2.0, 3.0], {"as it is": 1, "no scans": 2, "one is told": 4, "progress 1 s": 5}
    asked = {name: [max(least, cores(shape, 10**size, CHANGES[n])) for size in sizes] for name, n in drawn.items()}
    plot.save(
        [
            plot.Chart("p95 of seconds lost beside others, mixed", label, loads, now, log=True),
            plot.Chart("the same, if busy workers asked at once", label, few_loads, then, log=True),
            plot.Chart("cores of Redis, load 0.5", "GPUs, powers of ten", sizes, asked, log=True),
        ],
        path,
    )


class Report:
    """What is printed is written, too."""

    def __init__(self, sink: TextIO) -> None:
        self._sink = sink

    def say(self, text: str = "") -> None:
        print(text, flush=True)
        self._sink.write(f"{text}\n")


def speeds() -> list[str]:
    """Pictures a second of one GPU, by model and size."""
    kinds = [
        Request(model, side, steps, 1.0 if model == "large-turbo" else 4.5)
        for model, steps in (("large", 28), ("large-turbo", 4), ("medium", 40))
        for side in (512, 1024)
    ]
    pace = h100()
    rows = []
    for kind in kinds:
        rate = capacity([kind], pace, 200)
        rows.append(tables.speed_row(kind, pace, rate))
    return [tables.SPEED_HEAD, *rows]


def study(chosen: argparse.Namespace) -> None:
    """All cells, tables and the plot."""
    chosen.out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with (chosen.out / "simulation.md").open("w") as sink:
        say = Report(sink).say
        _sections(chosen, say)
        say(f"\n{time.monotonic() - started:.0f} s in all")


def _sections(chosen: argparse.Namespace, say: Callable[[str], None]) -> None:
    say("### One worker, on paper and measured\n")
    say("\n".join([validation.HEAD, *(pair.row() for pair in validation.against_results())]))
    low, high = validation.another_draw(0.5, 5 if chosen.quick else 30)
    say(f"\np95 at load 0.5 of thirty other draws of those sixty requests: {low:.2f} to {high:.2f} s.")
    say("\n### Pictures a second of one GPU\n")
    say("\n".join(speeds()))
    of_one = {name: capacity(mix, h100(), 100 if chosen.quick else 400) for name, mix in MIXES.items()}
    told = ", ".join(f"{name} {rate:.3f}" for name, rate in of_one.items() if name != "bursty")
    say(f"\nPictures a second of one GPU with enough to do: {told}.")
    answers = run(questions(chosen.quick), of_one)
    say("\n### Waits\n")
    say("\n".join([tables.WAIT_HEAD, *map(tables.wait_row, tables.ordered(answers))]))
    say("\n### Redis\n")
    say("\n".join(tables.redis_lines(answers)))
    draw(answers, chosen.out / "simulation.png")


def main() -> None:
    """Of the command line."""
    parser = argparse.ArgumentParser(prog="make simulate", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, default=Path("build/simulation"), help="folder of tables and plot")
    parser.add_argument("--quick", action="store_true", help="few cells with few jobs: tries the script itself")
    parser.add_argument("--measure", action="store_true", help="only this: what requests cost a real server")
    parser.add_argument("--live", action="store_true", help="only this: one worker on this machine, and on paper")
    chosen = parser.parse_args()
    if chosen.measure:
        measure.main()
    elif chosen.live:
        print("\n".join([validation.HEAD, *(pair.row() for pair in validation.live())]))
    else:
        study(chosen)


if __name__ == "__main__":
    main()
