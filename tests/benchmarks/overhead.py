"""What the engine's own work costs beside the models', with eight jobs, progress and previews on; and where it goes."""

from __future__ import annotations

import cProfile
import pstats
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from model.pipeline import Pipeline
from tests.benchmarks.workload import Request
from worker.engine import Engine, Task
from worker.metrics import WorkerMetrics
from worker.pictures import encode
from worker.previews import encode_preview
from worker.settings import WorkerSettings

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


class Bench:
    """An engine on a thread of its own, and what a worker does beside it: progress, previews, files."""

    def __init__(self, pipelines: Mapping[str, Pipeline], settings: WorkerSettings) -> None:
        self.metrics = WorkerMetrics()
        self._files = ThreadPoolExecutor(2)
        self.engine = Engine(pipelines, settings=settings, metrics=self.metrics, ended=self._ended)
        self.profile: cProfile.Profile | None = None

    def serve(self, request: Request, profiled: bool = False) -> float:
        """Eight jobs from start to end; gives the seconds."""
        tasks = [Task(request.job(seed)) for seed in range(JOBS)]
        for task in tasks:
            task.watched = True
            self.engine.submit(task)
        self.engine.stop()
        self.profile = cProfile.Profile() if profiled else None
        gpu = threading.Thread(target=self._run)
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

    def _run(self) -> None:
        if self.profile:
            self.profile.runcall(self.engine.run)
        else:
            self.engine.run()

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
    """Three times: to warm up, for the shares, and under a profiler for the trace."""
    Bench(pipelines, settings).serve(request)
    bench = Bench(pipelines, settings)
    bench.serve(request)
    own = bench.value("darkroom_engine_overhead_seconds_total")
    times = {s: bench.value("darkroom_stage_seconds_sum", model=request.model, stage=s) for s in STAGES}
    steps = int(bench.value("darkroom_stage_seconds_count", model=request.model, stage="denoise"))
    traced = Bench(pipelines, settings)
    traced.serve(request, profiled=True)
    return Overhead(
        request,
        steps,
        1000 * times["denoise"] / steps,
        own / (own + sum(times.values())),
        idle_share(pipelines, settings, request),
        int(bench.value("darkroom_previews_total", model=request.model)),
        where(traced),
    )


def where(bench: Bench) -> tuple[tuple[str, float], ...]:
    """What Engine.step called, by its share of the thread's time under the profiler, without the pipelines."""
    assert bench.profile is not None
    bench.profile.create_stats()
    stats = pstats.Stats(bench.profile).stats  # type: ignore[attr-defined]
    total = sum(entry[2] for entry in stats.values())
    (step,) = [key for key in stats if key[2] == "step" and key[0].endswith("engine.py")]
    found = {"step itself": stats[step][2]}
    for (_, _, name), entry in stats.items():
        for caller, times in entry[4].items():
            if caller == step:
                found[name] = found.get(name, 0.0) + times[3]
    inside = sum(entry[3] for key, entry in stats.items() if key[2] == "run" and key[0].endswith("model/pipeline.py"))
    if "_run" in found:
        found["_run, without the pipelines"] = max(0.0, found.pop("_run") - inside)
    ranked = sorted(found.items(), key=lambda item: -item[1])
    return tuple((name, seconds / total) for name, seconds in ranked if seconds / total >= 0.0005)


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
    for one in found:
        idle = "" if one.idle_share is None else f"{100 * one.idle_share:.2f} %"
        trace = ", ".join(f"{name} {100 * share:.2f} %" for name, share in one.trace[:7])
        lines.append(
            f"| {one.request.name} | {one.steps} | {one.step_ms:.1f} ms | {100 * one.own_share:.2f} % | {idle} "
            f"| {one.previews} | {trace} |"
        )
    return "\n".join(lines)
