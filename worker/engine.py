"""The GPU loop: pending → pick → run → send. Knows jobs as generators of work; knows no Redis."""

from __future__ import annotations

import math
import queue
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import structlog
import torch

from model.params import InvalidParams
from model.pipeline import Pipeline
from model.work import Decode, Denoise, Encode, Latents, Work, generate
from worker.budget import TOKENS, Budget
from worker.contract.job import DEADLINE_EXCEEDED, Failure, Outcome
from worker.failures import explain, is_out_of_memory
from worker.forecast import Forecast, Kind
from worker.logs import about
from worker.metrics import WorkerMetrics
from worker.scheduler import pick
from worker.settings import WorkerSettings
from worker.speed import Speed
from worker.task import Child, Current, Task, Withdraw

log = structlog.get_logger()

PREVIEW_S = 0.5
PREDICT_S = 1.0
"""How often tasks that wait are looked at anew; those that run are after each step."""


@dataclass(frozen=True)
class Ran:
    """A batch as it was when it ran: its children go on to other work."""

    children: tuple[Child, ...]
    kind: Kind
    work: Work  # of the first
    each: tuple[int, ...]  # rows of each child
    tokens: int

    @classmethod
    def of(cls, batch: Sequence[Child]) -> Ran:
        """What is about to run."""
        rows, tokens = tuple(child.rows for child in batch), sum(child.tokens for child in batch)
        return cls(tuple(batch), batch[0].kind, batch[0].work, rows, tokens)

    @property
    def rows(self) -> int:
        """Of all."""
        return sum(self.each)


class Engine:
    """Runs the tasks it is given, batched across tasks, and calls `ended` with each when it is over.

    `run` is the GPU thread's; `submit`, `withdraw`, `stop`, `current` and `room` are for any thread. `paces`: what is
    known of each model beforehand, seconds a token by stage.
    """

    def __init__(
        self,
        pipelines: Mapping[str, Pipeline],
        *,
        settings: WorkerSettings,
        metrics: WorkerMetrics,
        ended: Callable[[Task], None],
        paces: Mapping[str, Mapping[str, float]] | None = None,
        now: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.pipelines, self.metrics, self.forecast = pipelines, metrics, Forecast(paces, clock)
        self.speed = Speed()
        tokens = {name: settings.token_budget or TOKENS[p.device.type] for name, p in pipelines.items()}
        self.budget, self._max_jobs = Budget(settings.max_batch_rows, tokens), settings.max_jobs
        self._ended, self._now, self._clock = ended, now, clock
        self._inbox: queue.SimpleQueue[Task | Withdraw | None] = queue.SimpleQueue()
        self._held: dict[Task, int] = {}  # tokens of a step, by task that is submitted and not over
        self._tasks: list[Task] = []
        self._waiting: list[Child] = []
        self._next: list[Child] = []  # of those, what runs next unless something changes first
        self._current: Current | None = None
        self._stopping = False
        self._predicted_at = float("-inf")
        self._busy_s = 0.0  # in pipelines
        metrics.watch(self.pending_rows, {name: pipeline.lookups for name, pipeline in pipelines.items()})

    def submit(self, task: Task) -> None:
        """Hand a task to the engine."""
        if pipeline := self.pipelines.get(task.job.model):
            task.t5_length = pipeline.t5_length
        self._held[task] = task.job.num_images * task.tokens
        self._inbox.put(task)

    def withdraw(self, job_ids: Collection[str]) -> None:
        """Drop what was submitted of these jobs, before the next step and without a word to `ended`."""
        self._inbox.put(Withdraw(frozenset(job_ids)))

    def stop(self) -> None:
        """Make `run` return once all tasks are over."""
        self._inbox.put(None)

    def current(self) -> Current | None:
        """What the GPU thread is doing; None between pieces of work."""
        return self._current

    def room(self, model: str | None = None) -> int:
        """How many more jobs are worth claiming now, of one model or of all; at most `max_jobs` are held.

        See `Budget.wanted`. With several models, claim for those that have room themselves.
        """
        held, names = self._held.copy(), [model] if model else list(self.pipelines)
        rooms = [self.budget.wanted(name, [n for task, n in held.items() if task.job.model == name]) for name in names]
        return max(0, min(self._max_jobs - len(held), sum(max(0, room) for room in rooms)))

    def pending_rows(self) -> dict[str, int]:
        """Rows that wait for the GPU, by model."""
        rows = dict.fromkeys(self.pipelines, 0)
        for child in self._waiting:
            rows[child.task.job.model] += child.rows
        return rows

    def run(self) -> None:
        """Serve until stopped: the body of the GPU thread. Raises only what leaves the GPU unusable."""
        while not (self._stopping and not self._tasks):
            if not self._tasks:
                self._take(self._inbox.get())
            self.step()

    def step(self) -> None:
        """One turn: take in what came, drop what is over, run one batch, send and show its results."""
        started, busy_before = self._clock(), self._busy_s
        while not self._inbox.empty():
            self._take(self._inbox.get())
            self._next = []
        if started - self._predicted_at >= PREDICT_S:
            self._predicted_at = started
            self._predict(self._tasks)
            self._next = []
        for task in list(self._tasks):
            self._drop_if_over(task)
        batch = self._next or self._pick(self._clock())
        if batch:
            self._next = []
            self._waiting = [child for child in self._waiting if child not in batch]
            self._run(batch)
            self.metrics.overhead(self._clock() - started - (self._busy_s - busy_before))

    def _pick(self, now: float) -> list[Child]:
        """The most urgent batch of what waits."""
        return pick(self._waiting, now, lambda child: self.budget.room(child.kind))

    def _take(self, message: Task | Withdraw | None) -> None:
        match message:
            case Task():
                self._begin(message)
            case Withdraw():
                for task in [task for task in self._tasks if task.job.id in message.job_ids]:
                    self._drop(task)
            case None:
                self._stopping = True

    def _begin(self, task: Task) -> None:
        self._tasks.append(task)
        job, now = task.job, self._clock()
        if job.model not in self.pipelines:
            message = f"this worker holds no model {job.model!r}; it holds {', '.join(self.pipelines)}"
            self._end(task, "failed", Failure(code="invalid_job", message=message))
            return
        try:
            shift = self.pipelines[job.model].shift
            generators = [
                generate(job.params.nth(n), shift, deterministic=job.deterministic) for n in range(job.num_images)
            ]
        except InvalidParams as error:
            self._end(task, "failed", Failure(code="invalid_job", message=str(error)))
            return
        task.children = [Child(task, generator, next(generator), now) for generator in generators]
        self._waiting += task.children
        self._predict([task])

    def _predict(self, tasks: Iterable[Task]) -> None:
        """What is left of tasks: for the scheduler, and for their deadlines."""
        for task in tasks:
            task.left_s = task.expected_s(self.forecast)
            task.least_s = task.surely_s(self.forecast, self.budget.room(task.kind(Denoise.stage)))
            for child in task.children:
                child.own_s = self.forecast.expected(child.kind, child.rows, child.tokens)

    def _drop_if_over(self, task: Task) -> None:
        """End a task whose time is up, or will be before it can be done."""
        done, now = f"after {task.steps_done} of {task.job.steps} steps", self._now()
        left = task.job.deadline - now
        if left < 0:  # first: Redis, too, asks a late job to stop
            self._end(task, "failed", Failure(code=DEADLINE_EXCEEDED, message=f"the deadline passed {done}"))
        elif task.cancel_requested:
            self._end(task, "canceled")
        elif (needed := task.least_s) > left:
            message = f"the deadline cannot be met: {left:.1f} s are left, at least {needed:.1f} s are needed, {done}"
            self._end(task, "failed", Failure(code=DEADLINE_EXCEEDED, message=message))

    def _run(self, batch: list[Child]) -> None:
        """Run a batch and send its results. If it fails it is halved, so that a bad row harms no other and a large
        batch fits.
        """
        problem = self._attempt(batch)
        if problem is None:
            return
        if isinstance(problem, torch.OutOfMemoryError) and self._shrink(batch) and len(batch) == 1:
            self._run(batch)
        elif len(batch) == 1:
            self._send_all(batch, [problem], self._clock())
        else:
            middle = (len(batch) + 1) // 2
            self._run(batch[:middle])
            self._run(batch[middle:])

    def _attempt(self, batch: list[Child]) -> Exception | None:
        """Run a batch and send its results, or return what went wrong with it.

        A GPU still works when `run` has returned: meanwhile the results are sent, the next batch is picked and previews
        are asked for. Pictures alone are waited for, and sent when it is known what they took.
        """
        ran = Ran.of(batch)
        kind, pipeline = ran.kind, self.pipelines[batch[0].task.job.model]
        ids = tuple(dict.fromkeys(child.task.job.id for child in batch))
        started = self._clock()
        self._current = Current(started, self.forecast.allowance(kind, ran.rows, ran.tokens), kind.stage, ids)
        misses = pipeline.lookups.misses
        try:
            try:
                fits = None if ran.work.deterministic else self.budget.fits(kind)
                works = [child.work for child in batch]
                results = pipeline.run(works, fits) if fits and fits < ran.rows else pipeline.run(works)
            except Exception as error:
                if is_out_of_memory(error):
                    return torch.OutOfMemoryError(str(error))
                if isinstance(error, torch.AcceleratorError):
                    raise  # nothing runs on this GPU any more: the process ends, and others run its jobs
                log.warning("a batch failed", stage=kind.stage, rows=ran.rows, jobs=ids, exc_info=error)
                return error.with_traceback(None)  # whose frames hold tensors
            if early := not isinstance(ran.work, Decode):
                end = returned = self._clock()
                if pipeline.ahead:
                    end = started + self.forecast.expected(kind, ran.rows, ran.tokens)
                self._send_all(batch, results, end)
                self._next = self._pick(end)
                self._show({child.task for child in batch if not child.task.outcome})
                if not pipeline.ahead:
                    started += self._clock() - returned  # nothing ran meanwhile
            pipeline.settle()
        finally:
            self._current = None
            self._busy_s += self._clock() - started
        self._account(ran, self._clock() - started, pipeline.lookups.misses == misses)
        if not early:
            self._send_all(batch, results, self._clock())
        return None

    def _shrink(self, batch: list[Child]) -> bool:
        """Remember that a batch did not fit; true if it could run in smaller passes even so."""
        first, rows = batch[0], sum(child.rows for child in batch)
        if self.pipelines[first.task.job.model].device.type == "cuda":
            torch.cuda.empty_cache()
        at_once = min(rows, self.budget.fits(first.kind) or rows)
        self.budget.failed(first.kind, at_once)
        self.metrics.halved(first.task.job, first.work.stage)
        log.warning("out of memory", stage=first.work.stage, rows=at_once, shape=first.work.shape)
        return isinstance(first.work, Encode | Denoise) and not first.work.deterministic and at_once > 1

    def _account(self, ran: Ran, seconds: float, all_cached: bool) -> None:
        """Note what a batch took. all_cached: no text had to be encoded."""
        kind, job = ran.kind, ran.children[0].task.job
        for task in {child.task for child in ran.children}:
            task.seconds[kind.stage] = task.seconds.get(kind.stage, 0.0) + seconds
            if task.timeline:
                pictures = sum(child.task is task for child in ran.children)
                task.timeline.ran(kind.stage, seconds, rows=ran.rows, pictures=pictures)
        for child, rows in zip(ran.children, ran.each, strict=True):
            child.task.gpu_s += seconds * rows / ran.rows
        megapixels = math.prod(kind.shape) * 64 / 1e6  # 8 x 8 pixels a latent
        self.speed.note(kind.model, ran.rows * megapixels if isinstance(ran.work, Denoise) else 0.0, seconds)
        self.metrics.batch(job, kind.stage, rows=ran.rows, tokens=ran.tokens, seconds=seconds)
        self.budget.ran(kind, ran.rows)
        if isinstance(ran.work, Encode) and all_cached:
            return  # no measure of the encoders
        self.forecast.observe(kind, ran.rows, ran.tokens, seconds)

    def _send_all(self, batch: list[Child], results: Sequence[Any], now: float) -> None:
        """Give each child its result, and look at what is left of their tasks. now: when their next work comes up."""
        for child, result in zip(batch, results, strict=True):
            self._send(child, result, now)
        self._predict({child.task for child in batch if not child.task.outcome})

    def _send(self, child: Child, result: Any, now: float) -> None:
        """Give a child its result; it asks for more, is finished, or takes its task down with it."""
        task = child.task
        if task.outcome:
            return  # a sibling failed in this very batch
        failed = isinstance(result, Exception)
        if isinstance(child.work, Denoise) and not failed:
            task.steps_done += 1
        try:
            child.work = child.generator.throw(result) if failed else child.generator.send(result)
            child.since = now
            self._waiting.append(child)
        except StopIteration as end:
            child.rendering = end.value
            renderings = [child.rendering for child in task.children if child.rendering]
            if len(renderings) == len(task.children):
                task.renderings = renderings
                self._end(task, "succeeded")
        except Exception as error:
            self._end(task, "failed", explain(task.job, error, self.pipelines[task.job.model].largest))
            error.with_traceback(None)  # whose frames hold tensors

    def _show(self, tasks: Iterable[Task]) -> None:
        """Make the previews that somebody waits for: of the first picture, twice a second at most."""
        now = self._clock()
        for task in tasks:
            if not task.watched or not task.children or now - task.previewed_at < PREVIEW_S:
                continue
            work = task.children[0].work
            if task.steps_done and isinstance(work, Denoise | Decode):
                task.previewed_at = now
                self._preview(task, work.latents)

    def _preview(self, task: Task, latents: Latents) -> None:
        try:
            task.preview = task.steps_done, self.pipelines[task.job.model].preview(latents)
            self.metrics.previewed(task.job)
        except torch.AcceleratorError:
            raise
        except Exception as error:  # the picture itself may still come out
            log.warning("no preview", **about(task.job), error=repr(error))

    def _end(self, task: Task, outcome: Outcome, failure: Failure | None = None) -> None:
        task.outcome, task.failure = outcome, failure
        self._drop(task)
        self._ended(task)

    def _drop(self, task: Task) -> None:
        """Forget a task, and free what it holds."""
        self._waiting = [child for child in self._waiting if child.task is not task]
        self._next = []
        self._tasks.remove(task)
        self._held.pop(task, None)
        task.let_go()
