"""The worker process: loads its models, says that it is ready, then serves until told to stop."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import structlog
import torch
from pydantic import ValidationError
from torch import Tensor

from model.weights import CheckpointError
from worker.contract import telemetry
from worker.contract.errors import CannotStart, QueueUnavailable
from worker.contract.settings import complaints
from worker.contract.store import PictureStore, open_store
from worker.contract.telemetry import Traces
from worker.contract.transitions import LEASE_S
from worker.delivery import Delivery
from worker.engine import Engine
from worker.intake import Claim, Intake
from worker.logs import about, configure
from worker.metrics import WorkerMetrics, count_for_supervisor
from worker.models import Loader, Model
from worker.previews import encode_preview
from worker.safety import SafetyFilter, safety_filter
from worker.settings import WorkerSettings
from worker.status import CANNOT_START, HUNG, ProcessStatus, State, Turns
from worker.task import Task

if TYPE_CHECKING:
    from worker.tracing import JobTracing

log = structlog.get_logger()

ANNOUNCE_S = 10.0
RENEW_S = 1.0
REAP_S = 2.0
REPORT_S = 0.5
PROGRESS_S = 0.25
PASS_ON_S = 1.0
IDLE_S = 2.0
AWAY_S = 0.5

SPARE_AFTER_S = 0.05
"""How long a worker that has jobs leaves a new one alone: one that has none claims it in a few milliseconds."""

STORE_SLOW_S = 5.0
"""While a picture waits longer than this for the store, nothing more is claimed."""

SLOW_FACTOR = 5
"""A piece of work that takes so many times longer than predicted, and longer than a lease, costs us our leases."""

HUNG_S, HUNG_FACTOR = 120.0, 20
LAST_BATCH_S = 3.0
"""How long a worker that leaves waits for the batch that is still on the GPU: its jobs are no longer ours."""


@dataclass
class Every:
    """Something to be done at intervals of `seconds`."""

    seconds: float
    last: float = 0.0

    def is_due(self) -> bool:
        """Whether it is time; then it counts as done."""
        now = time.monotonic()
        if now - self.last < self.seconds:
            return False
        self.last = now
        return True


class Worker:
    """Three kinds of thread: this one talks to Redis, one owns the GPU, a few store pictures and commit."""

    def __init__(
        self,
        settings: WorkerSettings,
        models: dict[str, Model],
        intake: Intake,
        store: PictureStore,
        metrics: WorkerMetrics,
        safety: SafetyFilter | None = None,
        tracing: JobTracing | None = None,
    ) -> None:
        self.settings, self.models, self.intake, self.metrics = settings, models, intake, metrics
        self._safety, self._tracing = safety, tracing
        self.engine = Engine(
            {name: model.pipeline for name, model in models.items()},
            settings=settings,
            metrics=metrics,
            ended=self._ended,
            paces={name: model.pace for name, model in models.items()},
        )
        self.delivery = Delivery(
            intake,
            store,
            metrics,
            picture_lifetime_s=settings.picture_lifetime_s,
            fingerprints={name: model.fingerprint for name, model in models.items()},
            done=self._let_go,
            safety=safety,
            tracing=tracing,
        )
        self._running: dict[Task, Claim] = {}  # until committed or handed back
        self._stops = 0  # how often we were told to stop
        self._turns = Turns()
        self._published = False  # Redis knows of us
        self._gpu = next(iter(models.values())).pipeline.device
        self._reported = Every(REPORT_S)
        self._duties = {
            self._announce: Every(ANNOUNCE_S),
            self._renew: Every(RENEW_S),
            self.intake.reap: Every(REAP_S),
            self._report_progress: Every(PROGRESS_S),
            self._pass_on: Every(PASS_ON_S),
        }

    def stop(self) -> None:
        """Claim nothing more and end within the grace period; a second time: hand back everything now."""
        self._stops += 1
        self.intake.wake()

    def serve(self) -> bool:
        """Serve until stopped. Redis may come and go meanwhile. False: threads are still at work, so end at once."""
        gpu = threading.Thread(target=self.engine.run, name="gpu", daemon=True)
        gpu.start()
        self._publish()
        log.info("ready", models=list(self.models), worker=self.settings.worker_name)
        while not self._stops:
            self._check(gpu)
            self._try(self._turn)
        return self._leave(gpu)

    def _turn(self) -> None:
        """One turn of the control loop: keep what we hold, pass on who should stop, claim, wait."""
        for do, every in self._duties.items():
            if every.is_due():
                do()
        stop = self.intake.canceled()
        for task, claim in list(self._running.items()):
            if claim.key in stop:
                task.cancel()
        if not self._stops:
            self._claim()
        self.intake.wait(PROGRESS_S if self._running else IDLE_S, self._spare_after_s())

    def _try(self, do: Callable[[], None]) -> bool:
        """Do it, having reported if that is due; False, after a pause, where Redis is away."""
        if self._reported.is_due():
            self._report()
        try:
            do()
            return True
        except QueueUnavailable as error:
            log.warning("redis is away; will try again", cause=str(error.__cause__))
            time.sleep(AWAY_S)
            return False

    def _report(self) -> None:
        """Say that this loop turns, what it is at and what Prometheus is to know."""
        self.metrics.refresh()
        if self._gpu.type == "cuda" and self._is_well():  # the allocator might keep us waiting for a GPU that hangs
            self.metrics.gpu_memory(self._gpu.index or 0, gpu_memory(self._gpu))
        if file := self.settings.worker_status:
            state: State = "draining" if self._stops else "ready" if self._published else "connecting"
            try:
                ProcessStatus(state, len(self._running), time.monotonic()).write(file)
            except OSError:  # a full disk ends no job: but what was said last would grow old, and we be killed for it
                with suppress(OSError):
                    file.unlink(missing_ok=True)

    def _check(self, gpu: threading.Thread) -> None:
        """A worker whose GPU thread is dead or hangs can do no more good: its supervisor starts another."""
        if not gpu.is_alive():
            raise RuntimeError("the GPU thread has died")
        self._turns.note()
        current = self.engine.current()
        since = max(current.started, self._turns.since) if current else 0.0
        if current and time.monotonic() - since > max(HUNG_S, HUNG_FACTOR * current.predicted_s):
            log.error("the GPU hangs; this process ends", stage=current.stage, jobs=current.job_ids)
            os._exit(HUNG)

    def _is_well(self) -> bool:
        """Whether what we do now makes progress. If not, others may have our jobs."""
        current = self.engine.current()
        return not current or time.monotonic() - current.started <= max(LEASE_S, SLOW_FACTOR * current.predicted_s)

    def _renew(self) -> None:
        if self._is_well():
            self.intake.renew(self.models, self.engine.speed.measured())
        else:
            log.warning("no progress; the leases are left to lapse")

    def _report_progress(self) -> None:
        """Say how far jobs are, learn which are watched, and show those."""
        running = {claim: task for task, claim in list(self._running.items()) if task.outcome is None}
        if not running:
            return
        watched = self.intake.progress({claim: task.progress for claim, task in running.items()})
        for claim, task in running.items():
            task.watched = claim.key in watched
            preview, task.preview = task.preview, None
            if preview and task.watched:
                self._preview(claim, *preview)

    def _preview(self, claim: Claim, step: int, rgb: Tensor) -> None:
        """Show what a picture looks like so far."""
        try:
            picture = encode_preview(rgb, self._safety)
        except Exception as error:  # the picture itself may still come out
            log.warning("no preview", **about(claim.job), error=repr(error))
        else:
            self.intake.preview(claim, step, picture)

    def _claim(self) -> None:
        room = min(self.engine.room(), self.settings.max_jobs - len(self._running))
        if room < 1 or not self._is_well() or self._waits_for_store():
            return
        models = [model for model in self.models if self.engine.room(model)]
        for claim in self.intake.claim(models, room, self._spare_after_s()):
            self.metrics.claimed(claim.job, claim.queued_s)
            log.info("claimed", **about(claim.job), model=claim.job.model, queued_s=round(claim.queued_s, 3))
            task = Task(claim.job, timeline=self._tracing.follow(claim.job) if self._tracing else None)
            self._running[task] = claim
            self.engine.submit(task)

    def _spare_after_s(self) -> float:
        is_busy = any(task.outcome is None for task in list(self._running))
        return SPARE_AFTER_S if is_busy else 0.0

    def _waits_for_store(self) -> bool:
        return self.delivery.waited_s(time.monotonic()) > min(STORE_SLOW_S, self.settings.store_patience_s)

    def _pass_on(self) -> None:
        """Hand back finished jobs whose pictures the store does not take: another worker may have a way to it.

        They run again from the start. This worker claims nothing before its store takes a picture, so that a store
        that is away from everybody makes nobody run them in vain.
        """
        if self.delivery.waited_s(time.monotonic()) > self.settings.store_patience_s:
            self._hand_back_unstored()

    def _hand_back_unstored(self) -> None:
        claims = self.delivery.unstored()
        try:
            self.intake.hand_back(claims)
        finally:  # where Redis is away they go back by a later renewal
            self.delivery.drop(claims)
            for task in [task for task, claim in list(self._running.items()) if claim in claims]:
                log.warning("the picture store is away; a finished job goes back to its queue", **about(task.job))
                self._drop(task)

    def _publish(self) -> None:
        """Say that the models are ready; insist, since nothing works before that."""
        while not self._stops and not self._try(self._announce):
            pass
        while not self._stops and not self._try(self._renew):
            pass
        self._published = True
        self._report()

    def _announce(self) -> None:
        """The cards again and again: a Redis that comes back may have forgotten them."""
        self.intake.publish(model.card for model in self.models.values())

    def _leave(self, gpu: threading.Thread) -> bool:
        """Finish what can be finished in time, hand the rest back, and go; whether all threads are done as well."""
        log.info("stopping: what fits the grace period is finished, the rest handed back")
        self._report()
        end = time.monotonic() + self.settings.grace_s
        self._hand_back(self._too_long(self.settings.grace_s))
        while self._running and self._stops < 2 and time.monotonic() < end:
            self._check(gpu)
            self._try(self._turn)
        self._hand_back(list(self._running))
        self.engine.stop()
        gpu.join(LAST_BATCH_S)
        if self._waits_for_store():
            self._try(self._hand_back_unstored)
        self._try(self._renew)  # for as long as the last pictures may take
        delivered = self.delivery.close()
        try:
            self.intake.retire()
        except QueueUnavailable as error:
            log.warning("redis is away; this worker will be missed by its lease", cause=str(error.__cause__))
        self.intake.close()
        return delivered and not gpu.is_alive()

    def _too_long(self, seconds: float) -> list[Task]:
        """The tasks that will not all be done in that time: the longest."""
        tasks = sorted((task for task in list(self._running) if task.outcome is None), key=lambda task: task.left_s)
        ends = accumulate(task.left_s for task in tasks)
        return [task for task, end in zip(tasks, ends, strict=True) if end > seconds]

    def _hand_back(self, tasks: Sequence[Task]) -> None:
        """Put unfinished jobs back at the front of their queues, and drop them here."""
        claims = {task: self._running[task] for task in tasks if task.outcome is None and task in self._running}
        if not claims:
            return
        became = "handed back"
        try:
            self.intake.hand_back(claims.values())
        except QueueUnavailable as error:
            became = "let go"
            log.warning(
                "redis is away; the jobs go back when it answers us, or when the lease lapses",
                cause=str(error.__cause__),
            )
        self.engine.withdraw([claim.job.id for claim in claims.values()])
        for task, claim in claims.items():
            log.info(became, **about(claim.job))
            self._drop(task)

    def _ended(self, task: Task) -> None:
        """Called on the GPU thread when a task is over: the rest happens off it."""
        if claim := self._running.get(task):  # else it was handed back
            self.delivery.send(claim, task)

    def _let_go(self, task: Task) -> None:
        self._drop(task)
        self.intake.wake()

    def _drop(self, task: Task) -> None:
        if self._running.pop(task, None):  # else it was handed back before
            self.metrics.let_go()


def load_models(settings: WorkerSettings, metrics: WorkerMetrics) -> dict[str, Model]:
    """Load every model asked for; the first that cannot be loaded ends the worker."""
    models, loader = {}, Loader(settings)
    for source in settings.models:
        log.info("loading", model=source.name, path=str(source.path))
        model = models[source.name] = loader.load(source)
        metrics.loaded(source.name, model.load_s)
        log.info("loaded", model=source.name, seconds=round(model.load_s, 2), device=str(model.pipeline.device))
    return models


def serve() -> int:
    """Load what the environment asks for and serve it until told to stop; the exit status says how it ended."""
    configure()
    try:
        settings = WorkerSettings()
        if settings.worker_status:
            count_for_supervisor()
        metrics = WorkerMetrics()
        safety = safety_filter(settings)
        store = open_store(settings)
        traces = telemetry.connect("darkroom-worker", log, instance=settings.worker_name)
        models = load_models(settings, metrics)
    except (ValidationError, CannotStart, CheckpointError, OSError) as error:
        why = complaints(error) if isinstance(error, ValidationError) else error
        sys.stderr.write(f"darkroom worker: {why}\n")
        return CANNOT_START
    intake = Intake.connect(settings, settings.worker_name)
    worker = Worker(settings, models, intake, store, metrics, safety, job_tracing(traces))

    def on_signal(_signum: int, _frame: object) -> None:
        worker.stop()  # and says nothing: the line that it interrupts may hold the log's lock

    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, on_signal)
    try:
        status, is_done = serve_to_the_end(worker)
    finally:
        if traces:
            traces.close()
    if not is_done:
        os._exit(status)  # the usual end would wait for it
    return status


def serve_to_the_end(worker: Worker) -> tuple[int, bool]:
    """Serve; the exit status, and whether no thread does anything any more."""
    try:
        is_done = worker.serve()
    except Exception:
        log.exception("this process cannot go on")
        return 1, worker.delivery.close()
    if not is_done:
        log.warning("left before the GPU or the picture store was done: nobody waits for what it does")
    return 0, is_done


def gpu_memory(device: torch.device) -> dict[str, int]:
    """Bytes of a GPU that our tensors take, that are kept for such, and that there are."""
    return {
        "allocated": torch.cuda.memory_allocated(device),
        "reserved": torch.cuda.memory_reserved(device),
        "total": torch.cuda.get_device_properties(device).total_memory,
    }


def job_tracing(traces: Traces | None) -> JobTracing | None:
    """What makes the spans of jobs, where traces are sent."""
    if traces is None:
        return None
    from worker.tracing import JobTracing  # with it comes OpenTelemetry

    return JobTracing(traces.tracer)
