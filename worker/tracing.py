"""The spans of a job, made once it is over. Imported only where traces are sent: see worker.contract.telemetry."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

from opentelemetry.context import Context
from opentelemetry.trace import SpanKind, Status, StatusCode, Tracer
from opentelemetry.trace.propagation import set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from worker.contract.job import Job
from worker.intake import Claim
from worker.task import Task

MAX_EVENTS = 100
STAGES = ("text_encode", "denoise", "vae_decode")
W3C = TraceContextTextMapPropagator()


@dataclass
class Stage:
    """The batches of one stage that a task rode in. Times in Unix nanoseconds."""

    started: int
    ended: int = 0
    busy_s: float = 0.0
    batches: int = 0
    rows: int = 0  # of all batches, other jobs' too
    most_rows: int = 0
    steps: int = 0  # of all pictures of the task
    events: list[tuple[int, int, int]] = field(default_factory=list)  # when, steps done, rows of the batch


class Timeline:
    """When a task's stages ran. Written by the engine's thread; read once the task is over."""

    def __init__(self, job: Job) -> None:
        self.claimed = time.time_ns()
        self.stages: dict[str, Stage] = {}
        self._every = math.ceil(job.steps / MAX_EVENTS)

    def ran(self, stage: str, seconds: float, *, rows: int, pictures: int) -> None:
        """A batch of so many rows, so many of the task's pictures among them, has just ended."""
        now = time.time_ns()
        seen = self.stages.setdefault(stage, Stage(started=now - int(seconds * 1e9)))
        seen.ended = now
        seen.busy_s += seconds
        seen.batches += 1
        seen.rows += rows
        seen.most_rows = max(seen.most_rows, rows)
        before, seen.steps = seen.steps, seen.steps + pictures
        if stage == "denoise" and before // self._every < seen.steps // self._every:
            seen.events.append((now, seen.steps, rows))


class JobTracing:
    """Turns what was measured of a job into spans: `generation`, and in it `queue`, the stages of the work, `store`."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer

    def follow(self, job: Job) -> Timeline:
        """The timeline of a job that was just claimed, for its task."""
        return Timeline(job)

    def ended(self, claim: Claim, task: Task, outcome: str, storing: int) -> None:
        """Spans of a job that is over. Those handed back are not: they go on elsewhere.

        storing : Unix nanoseconds since when the pictures were stored and the job committed
        """
        timeline, job, now = task.timeline, claim.job, time.time_ns()
        if timeline is None:
            return
        created = min(int(job.created_at * 1e9), timeline.claimed)  # by the gateway's clock
        span = self._tracer.start_span(
            "generation",
            W3C.extract({"traceparent": job.trace}),
            kind=SpanKind.CONSUMER,
            attributes={
                "darkroom.generation": job.id,
                "darkroom.request_id": job.request_id,
                "darkroom.model": job.model,
                "darkroom.width": job.params.width,
                "darkroom.height": job.params.height,
                "darkroom.steps": job.params.steps,
                "darkroom.num_images": job.num_images,
                "darkroom.priority": job.priority,
                "darkroom.outcome": outcome,
            },
            start_time=created,
        )
        if task.failure:
            span.set_attribute("error.type", task.failure.code)
        if outcome == "failed":
            span.set_status(Status(StatusCode.ERROR))
        inside = set_span_in_context(span)
        self._span("queue", inside, created, timeline.claimed)
        for name in STAGES:
            if name in timeline.stages:
                self._stage(name, timeline.stages[name], inside)
        if task.outcome == "succeeded":
            self._span("store", inside, storing, now)
        span.end(now)

    def _stage(self, name: str, stage: Stage, parent: Context) -> None:
        span = self._tracer.start_span(name, parent, start_time=stage.started)
        span.set_attribute("darkroom.busy_s", round(stage.busy_s, 6))
        span.set_attribute("darkroom.batches", stage.batches)
        span.set_attribute("darkroom.rows_mean", round(stage.rows / stage.batches, 2))
        span.set_attribute("darkroom.rows_max", stage.most_rows)
        if name == "denoise":
            span.set_attribute("darkroom.steps", stage.steps)
        for when, steps, rows in stage.events:
            span.add_event("step", {"darkroom.step": steps, "darkroom.rows": rows}, timestamp=when)
        span.end(stage.ended)

    def _span(self, name: str, parent: Context, start: int, end: int) -> None:
        self._tracer.start_span(name, parent, start_time=start).end(end)
