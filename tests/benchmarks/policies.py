"""Three ways to serve, over the same engine and pipelines: which of the waiting jobs the engine gets, and when.

The engine batches whatever it holds, step by step. Given one job at a time it is a server without batches; given equal
jobs, and no other before all of them are done, it batches requests; given whatever it has room for, it is ours.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from model.pipeline import Pipeline
from tests.benchmarks.workload import Arrival, Request
from worker.engine import Engine
from worker.metrics import WorkerMetrics
from worker.settings import WorkerSettings
from worker.task import Task

Admit = Callable[[Sequence[Task], int, Engine], list[Task]]
"""Of the tasks that wait, first come first: those that the engine gets now. The number: how many it holds."""


@dataclass(frozen=True)
class Served:
    """A request that was done."""

    request: Request
    arrived: float  # seconds from the start
    ended: float

    @property
    def latency(self) -> float:
        return self.ended - self.arrived


def one_at_a_time(waiting: Sequence[Task], holding: int, engine: Engine) -> list[Task]:
    """First come, first served, each alone."""
    return [] if holding else list(waiting[:1])


def request_batching(waiting: Sequence[Task], holding: int, engine: Engine) -> list[Task]:
    """The first and all that are equal to it, as many as one batch takes; then nothing else until they are done."""
    if holding or not waiting:
        return []
    first = waiting[0]
    equal = [task for task in waiting if shape(task) == shape(first)]
    room = engine.budget.room(first.kind("denoise"))
    first.t5_length = engine.pipelines[first.job.model].t5_length  # as the engine does when it is given one
    return equal[: max(1, min(room.rows // first.rows, room.tokens // first.tokens))]


def continuous(waiting: Sequence[Task], holding: int, engine: Engine) -> list[Task]:
    """As a worker claims: one of each model in turn that has room, as many as the engine has room for."""
    by_model: dict[str, deque[Task]] = {}
    for task in waiting:
        if task.job.model in by_model or engine.room(task.job.model):
            by_model.setdefault(task.job.model, deque()).append(task)
    queues, chosen, room = deque(by_model.values()), [], engine.room()
    while queues and len(chosen) < room:
        queue = queues.popleft()
        chosen.append(queue.popleft())
        if queue:
            queues.append(queue)
    return chosen


POLICIES: dict[str, Admit] = {
    "one at a time": one_at_a_time,
    "request batching": request_batching,
    "engine": continuous,
}


def shape(task: Task) -> tuple[object, ...]:
    """What a batch of requests must have in common: all but prompt and seed."""
    params = task.job.params
    return task.job.model, params.width, params.height, params.steps, params.guidance_scale, params.sampler


def drive(
    pipelines: Mapping[str, Pipeline], settings: WorkerSettings, admit: Admit, arrivals: Sequence[Arrival]
) -> list[Served]:
    """Serve the arrivals in real time, on this thread; raises if a job did not succeed."""
    ended: list[tuple[Task, float]] = []
    engine = Engine(
        pipelines,
        settings=settings,
        metrics=WorkerMetrics(),
        ended=lambda task: ended.append((task, time.monotonic())),
    )
    coming, waiting, served = deque(arrivals), [], []
    known: dict[Task, Arrival] = {}
    start = time.monotonic()
    while len(served) < len(arrivals):
        while coming and coming[0].at <= time.monotonic() - start:
            arrival = coming.popleft()
            task = Task(arrival.request.job(arrival.seed))
            known[task] = arrival
            waiting.append(task)
        holding = len(known) - len(waiting)
        for task in admit(waiting, holding, engine):
            waiting.remove(task)
            engine.submit(task)
        if len(known) > len(waiting):
            engine.step()
        elif coming:
            time.sleep(max(0.0, coming[0].at - (time.monotonic() - start)))
        for task, at in ended:
            arrival = known.pop(task)
            if task.outcome != "succeeded":
                raise RuntimeError(f"{arrival.request.name}: {task.outcome}, {task.failure}")
            served.append(Served(arrival.request, arrival.at, at - start))
        ended.clear()
    return served
