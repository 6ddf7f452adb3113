"""How long calls take: a GPU's by its events, requests' by the clock; contestants in turn, A B A B."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

Call = Callable[[], object]
Seconds = Callable[[Call], float]

WARM_UPS = 3
FEWEST, MOST = 5, 20
"""Rounds of all contestants."""


@dataclass(frozen=True)
class Spread:
    """What was measured of one contestant; a single figure has no spread."""

    median: float
    low: float  # p10
    high: float  # p90
    count: int = 1

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        """Of some measurements."""
        if len(samples) == 1:
            return cls(samples[0], samples[0], samples[0])
        tenths = statistics.quantiles(samples, n=10, method="inclusive")
        return cls(statistics.median(samples), tenths[0], tenths[-1], len(samples))


def synchronize(device: torch.device) -> None:
    """Wait until all is done that was asked of the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def by_the_clock(device: torch.device) -> Seconds:
    """Wall time of one call to its end."""

    def seconds(call: Call) -> float:
        synchronize(device)
        started = time.perf_counter()
        call()
        synchronize(device)
        return time.perf_counter() - started

    return seconds


def in_a_row(device: torch.device, calls: int) -> Seconds:
    """Time of one of so many calls in a row, as in a run of steps: Python may run ahead of the GPU."""

    def all_of(call: Call) -> Call:
        return lambda: [call() for _ in range(calls)]

    if device.type != "cuda":
        whole = by_the_clock(device)
        return lambda call: whole(all_of(call)) / calls

    def seconds(call: Call) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        synchronize(device)
        start.record()
        all_of(call)()
        end.record()
        synchronize(device)
        return start.elapsed_time(end) / 1000 / calls

    return seconds


def interleaved(
    calls: Mapping[str, Call], seconds: Seconds, budget_s: float, warm: Mapping[str, Call] | None = None
) -> dict[str, Spread]:
    """Each contestant's time, after warm-ups: rounds of all in turn, until the budget is spent."""
    for call in (warm or calls).values():
        for _ in range(WARM_UPS):
            call()
    samples: dict[str, list[float]] = {name: [] for name in calls}
    started = time.perf_counter()
    for n in range(MOST):
        spent = time.perf_counter() - started
        if n >= FEWEST and spent * (n + 1) / n > budget_s:
            break
        for name, call in calls.items():
            samples[name].append(seconds(call))
    return {name: Spread.of(found) for name, found in samples.items()}


def kernels(call: Call, device: torch.device, count: int = 15) -> str:
    """Where one call's time goes: the kernels of a GPU, or the operators of a CPU, that take most."""
    cuda = device.type == "cuda"
    kind = torch.profiler.ProfilerActivity.CUDA if cuda else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[kind]) as profiler:
        call()
        synchronize(device)
    found = profiler.key_averages()
    ranked = sorted(((e.self_device_time_total if cuda else e.self_cpu_time_total), e.count, e.key) for e in found)
    whole = sum(time for time, _, _ in ranked) or 1.0
    lines = [
        f"  {t / 1000:9.3f} ms {100 * t / whole:5.1f} % {n:6} x {name[:90]}" for t, n, name in ranked[: -count - 1 : -1]
    ]
    return "\n".join([f"  {whole / 1000:9.3f} ms in all of", *lines])
