"""The GPU loop: pending → pick → run → send. Knows jobs as generators of work; knows no Redis."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Generator, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import structlog
import torch

from model.params import InvalidParams
from model.pipeline import Denoise, NonFiniteLatents, Pipeline, Rendering, Work, generate
from worker.contract.errors import StoreUnavailable
from worker.contract.job import Failure, Job, Progress
from worker.metrics import WorkerMetrics
from worker.scheduler import pick

log = structlog.get_logger()

Outcome = Literal["succeeded", "failed", "canceled"]


@dataclass(eq=False)
class Child:
    """One picture of a task: its generator, the work it waits for, and in the end its rendering."""

    task: Task
    generator: Generator[Work, Any, Rendering]
    work: Work | None = None
    rendering: Rendering | None = None

    @property
    def key(self) -> Hashable:
        """Equal keys can share a batch."""
        return self.task.job.model, self.work.key if self.work else None

    @property
    def rows(self) -> int:
        """Rows of the batch that the work takes."""
        return self.work.rows if isinstance(self.work, Denoise) else 1


@dataclass(eq=False)
class Task:
    """One job in the engine. Other threads read `progress` and may call `cancel`; all else is the engine's."""

    job: Job
    children: list[Child] = field(default_factory=list)
    steps_done: int = 0
    seconds: dict[str, float] = field(default_factory=dict)  # wall time of the batches it rode in, by stage
    outcome: Outcome | None = None
    failure: Failure | None = None
    cancel_requested: bool = False

    @property
    def progress(self) -> Progress:
        """Denoising steps done, over all pictures."""
        return Progress(step=self.steps_done, steps=self.job.steps)

    @property
    def renderings(self) -> list[Rendering]:
        """The finished pictures, in order."""
        return [child.rendering for child in self.children if child.rendering]

    def cancel(self) -> None:
        """Ask the engine to drop this task before its next step."""
        self.cancel_requested = True


class Engine:
    """Runs the tasks it is given, batched across tasks, and calls `ended` with each when it is over."""

    def __init__(
        self,
        pipelines: Mapping[str, Pipeline],
        *,
        max_rows: int,
        metrics: WorkerMetrics,
        ended: Callable[[Task], None],
        now: Callable[[], float] = time.time,
    ) -> None:
        self.pipelines, self.max_rows, self.metrics = pipelines, max_rows, metrics
        self._ended, self._now = ended, now
        self._inbox: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._tasks: list[Task] = []
        # In the order in which their work came up, so that nobody waits for a whole job.
        self._waiting: list[Child] = []

    def submit(self, task: Task) -> None:
        """Hand a task to the engine; from any thread."""
        self._inbox.put(task)

    def stop(self) -> None:
        """Make `run` return once all tasks are over; from any thread."""
        self._inbox.put(None)

    def run(self) -> None:
        """Serve until stopped: the body of the GPU thread."""
        stopping = False
        while not (stopping and not self._tasks):
            stopping = self._admit(block=not self._tasks) or stopping
            self.step()

    def step(self) -> None:
        """One turn: drop what is over, run one batch, send its results."""
        for task in list(self._tasks):
            self._drop_if_over(task)
        batch = pick(self._waiting, self.max_rows)
        if batch:
            self._waiting = [child for child in self._waiting if child not in batch]
            for child, result in zip(batch, self._run(batch), strict=True):
                self._send(child, result)

    def _admit(self, block: bool) -> bool:
        """Take new tasks in; true when asked to stop."""
        while block or not self._inbox.empty():
            task = self._inbox.get()
            if task is None:
                return True
            self._begin(task)
            block = False
        return False

    def _begin(self, task: Task) -> None:
        self._tasks.append(task)
        try:
            shift = self.pipelines[task.job.model].shift
            task.children = [Child(task, generate(task.job.params.nth(n), shift)) for n in range(task.job.num_images)]
        except (InvalidParams, KeyError) as error:
            self._end(task, "failed", Failure(code="invalid_job", message=str(error)))
            return
        for child in task.children:
            child.work = next(child.generator)
        self._waiting += task.children

    def _drop_if_over(self, task: Task) -> None:
        if self._now() > task.job.deadline:  # first: Redis, too, asks a late job to stop
            message = f"the deadline passed after {task.steps_done} of {task.job.steps} steps"
            self._end(task, "failed", Failure(code="deadline_exceeded", message=message))
        elif task.cancel_requested:
            self._end(task, "canceled")

    def _run(self, batch: Sequence[Child]) -> list[Any]:
        """Results of a batch; a batch that fails is run one by one, so that one bad row harms no other."""
        works = [child.work for child in batch if child.work]
        pipeline = self.pipelines[batch[0].task.job.model]
        started = time.perf_counter()
        try:
            results = pipeline.run(works)
            _settle(pipeline)
        except Exception as error:
            if len(batch) > 1:
                return [result for child in batch for result in self._run([child])]
            return [error]
        self._account(batch, time.perf_counter() - started)
        return results

    def _account(self, batch: Sequence[Child], seconds: float) -> None:
        stage = batch[0].work.stage if batch[0].work else ""
        for task in {id(child.task): child.task for child in batch}.values():
            task.seconds[stage] = task.seconds.get(stage, 0.0) + seconds
        self.metrics.batch(batch[0].task.job, stage, rows=sum(child.rows for child in batch), seconds=seconds)

    def _send(self, child: Child, result: Any) -> None:
        """Give a child its result; it asks for more, is finished, or takes its task down with it."""
        task = child.task
        if task.outcome:
            return  # a sibling failed in this very batch
        if isinstance(child.work, Denoise) and not isinstance(result, Exception):
            task.steps_done += 1
        try:
            failed = isinstance(result, Exception)
            child.work = child.generator.throw(result) if failed else child.generator.send(result)
            self._waiting.append(child)
        except StopIteration as end:
            child.work, child.rendering = None, end.value
            if len(task.renderings) == len(task.children):
                self._end(task, "succeeded")
        except Exception as error:
            self._end(task, "failed", explain(task.job, error))

    def _end(self, task: Task, outcome: Outcome, failure: Failure | None = None) -> None:
        task.outcome, task.failure = outcome, failure
        for child in task.children:
            child.generator.close()
            child.work = None  # the handles go, and with them the latents
        self._tasks.remove(task)
        self._waiting = [child for child in self._waiting if child.task is not task]
        self._ended(task)


def explain(job: Job, error: Exception) -> Failure:
    """What the job's owner is told of an error; the log gets the rest."""
    if isinstance(error, NonFiniteLatents):
        return Failure(code="non_finite", message=str(error))
    if isinstance(error, StoreUnavailable):
        return Failure(code=error.code, message=str(error))
    if isinstance(error, torch.OutOfMemoryError):
        params = job.params
        message = f"{params.width}x{params.height} does not fit this worker's GPU memory; try a smaller picture"
        return Failure(code="out_of_memory", message=message)
    log.error("job failed", job=job.id, exc_info=error)
    return Failure(
        code="internal_error", message=f"the worker failed on this job; its log has the details under {job.id}"
    )


def _settle(pipeline: Pipeline) -> None:
    """Wait for the GPU, so that errors and times belong to the batch that made them."""
    if pipeline.device.type == "cuda":
        torch.cuda.synchronize(pipeline.device)
