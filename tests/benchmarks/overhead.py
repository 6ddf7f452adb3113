"""What the engine's own work costs beside the models', with eight jobs, progress and previews on; and where it goes."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch

from model.pipeline import Pipeline
from tests.benchmarks.workload import Request
from worker.engine import Engine
from worker.metrics import WorkerMetrics
from worker.pictures import encode
from worker.previews import encode_preview
from worker.settings import WorkerSettings
from worker.task import Task

JOBS, PROGRESS_S = 8, 0.25
STAGES = ("text_encode", "noise", "denoise", "vae_decode")


@dataclass(frozen=True)
class Overhead:
    """Of one kind of request, eight at a time."""

    request: Request
    steps: int  # denoising batches
    step_ms: float  # mean
    own_share: float  # of the GPU thread's time, outside the pipelines
    idle_share: float | None  # of the wall time in which the GPU computed nothing; CUDA only
    previews: int
    trace: tuple[tuple[str, float], ...]  # where the own time goes: what, share of the GPU thread's time


class TracedEngine(Engine):
    """Notes how long its parts take, each without the parts and the pipelines within.

    Not by Python's profiler, which on Python 3.12 mixed up callers and missed the engine's methods.
    """

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.seconds: dict[str, float] = defaultdict(float)
        self._inner = [0.0]  # seconds of the parts within, of each part that runs

    def trace(self) -> dict[str, float]:
        """Seconds by part."""
        found = {name: seconds for name, seconds in self.seconds.items() if name != "_attempt"}
        return found | {"_attempt, without the pipelines": self.seconds["_attempt"] - self._busy_s}


def _timed(name: str) -> Callable[..., Any]:
    method = getattr(Engine, name)

    @wraps(method)
    def timed(self: TracedEngine, *arguments: Any, **named: Any) -> Any:
        if self._current is not None and name != "_attempt":
            return method(self, *arguments, **named)  # the GPU works meanwhile: no time is lost
        self._inner.append(0.0)
        started = time.perf_counter()
        try:
            return method(self, *arguments, **named)
        finally:
            took = time.perf_counter() - started
            self.seconds[name] += took - self._inner.pop()
            self._inner[-1] += took

    return timed


for _name in (
    "step",
    "_take",
    "_predict",
    "_drop_if_over",
    "_pick",
    "_run",
    "_attempt",
    "_account",
    "_send_all",
    "_send",
    "_show",
    "_end",
):
    setattr(TracedEngine, _name, _timed(_name))


class Bench:
    """An engine on a thread of its own, and what a worker does beside it: progress, previews, files."""

    def __init__(self, pipelines: Mapping[str, Pipeline], settings: WorkerSettings) -> None:
        self.metrics = WorkerMetrics()
        self._files = ThreadPoolExecutor(2)
        self.engine = TracedEngine(pipelines, settings=settings, metrics=self.metrics, ended=self._ended)

    def serve(self, request: Request) -> float:
        """Eight jobs from start to end; gives the seconds."""
        tasks = [Task(request.job(seed)) for seed in range(JOBS)]
        for task in tasks:
            task.watched = True
            self.engine.submit(task)
        self.engine.stop()
        gpu = threading.Thread(target=self.engine.run)
        started = time.monotonic()
        gpu.start()
        while gpu.is_alive():
            self._report(tasks)
            gpu.join(PROGRESS_S)
        seconds = time.monotonic() - started
        self._files.shutdown()
        for task in tasks:
            if task.outcome != "succeeded":
                raise RuntimeError(f"{request.name}: {task.outcome}, {task.failure}")
        return seconds

    def value(self, name: str, **labels: str) -> float:
        """A metric's value."""
        return self.metrics.registry.get_sample_value(name, labels) or 0.0

    def _report(self, tasks: Sequence[Task]) -> None:
        """As a worker's control thread does, but for Redis."""
        for task in tasks:
            _ = task.progress
            preview, task.preview = task.preview, None
            if preview:
                encode_preview(preview[1])

    def _ended(self, task: Task) -> None:
        self._files.submit(encode, task.renderings[0].pixels, task.job, 0)


def measure(pipelines: Mapping[str, Pipeline], settings: WorkerSettings, request: Request) -> Overhead:
    """Once to warm up, once for the shares, and on a GPU once more under its profiler."""
    Bench(pipelines, settings).serve(request)
    bench = Bench(pipelines, settings)
    bench.serve(request)
    own = bench.value("darkroom_engine_overhead_seconds_total")
    times = {s: bench.value("darkroom_stage_seconds_sum", model=request.model, stage=s) for s in STAGES}
    steps = int(bench.value("darkroom_stage_seconds_count", model=request.model, stage="denoise"))
    whole = own + sum(times.values())
    ranked = sorted(bench.engine.trace().items(), key=lambda item: -item[1])
    return Overhead(
        request,
        steps,
        1000 * times["denoise"] / steps,
        own / whole,
        idle_share(pipelines, settings, request),
        int(bench.value("darkroom_previews_total", model=request.model)),
        tuple((name, seconds / whole) for name, seconds in ranked if seconds / whole >= 0.0001),
    )


def idle_share(pipelines: Mapping[str, Pipeline], settings: WorkerSettings, request: Request) -> float | None:
    """The share of the time in which no kernel ran, by the profiler of CUDA; None elsewhere."""
    if pipelines[request.model].device.type != "cuda":
        return None
    bench = Bench(pipelines, settings)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profiler:
        seconds = bench.serve(request)
    kernels = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    busy, end = 0.0, 0.0
    for event in sorted(kernels, key=lambda event: event.time_range.start):
        busy += max(0.0, event.time_range.end - max(end, event.time_range.start))
        end = max(end, event.time_range.end)
    return 1 - busy / 1e6 / seconds


def table(found: Sequence[Overhead]) -> str:
    """As Markdown."""
    lines = [
        "| eight jobs of | steps | mean step | engine's own share | GPU idle | previews | where the own time goes |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    return "\n".join([*lines, *map(row, found)])


def row(one: Overhead) -> str:
    """One line of the table."""
    idle = "" if one.idle_share is None else f"{100 * one.idle_share:.2f} %"
    trace = ", ".join(f"{name} {100 * share:.2f} %" for name, share in one.trace)
    return (
        f"| {one.request.name} | {one.steps} | {one.step_ms:.1f} ms | {100 * one.own_share:.2f} % | {idle} "
        f"| {one.previews} | {trace} |"
    )
