"""The worker process: loads its models, says that it is ready, then serves until told to stop."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import structlog
from prometheus_client import start_http_server
from pydantic import ValidationError
from torch import Tensor

from model.checkpoint import CheckpointError
from worker.contract import telemetry
from worker.contract.errors import CannotStart, QueueUnavailable
from worker.contract.settings import complaints
from worker.contract.store import FolderStore, PictureStore
from worker.contract.telemetry import Traces
from worker.contract.transitions import LEASE_S
from worker.delivery import Delivery
from worker.engine import Engine, Task
from worker.intake import Claim, Intake
from worker.logs import configure
from worker.metrics import WorkerMetrics
from worker.models import Loader, Model
from worker.previews import encode_preview
from worker.safety import SafetyFilter, safety_filter
from worker.settings import WorkerSettings

if TYPE_CHECKING:
    from worker.tracing import JobTracing

log = structlog.get_logger()

ANNOUNCE_S = 10.0
RENEW_S = 1.0
REAP_S = 2.0
JOIN_S = 1.0
PROGRESS_S = 0.25
IDLE_S = 2.0
AWAY_S = 0.5

SLOW_FACTOR = 5
"""A piece of work that takes so many times longer than predicted, and longer than a lease, costs us our leases."""

HUNG_S, HUNG_FACTOR, HUNG_STATUS = 120.0, 20, 70


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
        self._turns = {
            self._announce: Every(ANNOUNCE_S),
            self._renew: Every(RENEW_S),
            self.intake.reap: Every(REAP_S),
            self._report_progress: Every(PROGRESS_S),
        }

    def stop(self) -> None:
        """Claim nothing more and end within the grace period; a second time: hand back everything now."""
        self._stops += 1
        self.intake.wake()

    def serve(self) -> None:
        """Serve until stopped. Redis may come and go meanwhile."""
        gpu = threading.Thread(target=self.engine.run, name="gpu", daemon=True)
        gpu.start()
        self._publish()
        log.info("ready", models=list(self.models), worker=self.settings.worker_name)
        while not self._stops:
            self._check(gpu)
            self._try(self._turn)
        self._leave(gpu)

    def _turn(self) -> None:
        """One turn of the control loop: keep what we hold, pass on who should stop, claim, wait."""
        for do, every in self._turns.items():
            if every.is_due():
                do()
        stop = self.intake.canceled()
        for task, claim in list(self._running.items()):
            if claim.key in stop:
                task.cancel()
        if not self._stops:
            self._claim()
        self.intake.wait(PROGRESS_S if self._running else IDLE_S)

    def _try(self, do: Callable[[], None]) -> bool:
        try:
            do()
            return True
        except QueueUnavailable as error:
            log.warning("redis is away; will try again", cause=str(error.__cause__))
            time.sleep(AWAY_S)
            return False

    def _check(self, gpu: threading.Thread) -> None:
        """A worker whose GPU thread is dead or hangs can do no more good: its supervisor starts another."""
        if not gpu.is_alive():
            raise RuntimeError("the GPU thread has died")
        current = self.engine.current()
        if current and time.monotonic() - current.started > max(HUNG_S, HUNG_FACTOR * current.predicted_s):
            log.error("the GPU hangs; this process ends", stage=current.stage, jobs=current.job_ids)
            os._exit(HUNG_STATUS)

    def _is_well(self) -> bool:
        """Whether what we do now makes progress. If not, others may have our jobs."""
        now, current = time.monotonic(), self.engine.current()
        if current and now - current.started > max(LEASE_S, SLOW_FACTOR * current.predicted_s):
            return False
        return not self.delivery.is_stuck(now)

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
            log.warning("no preview", job=claim.job.id, error=repr(error))
        else:
            self.intake.preview(claim, step, picture)

    def _claim(self) -> None:
        room = min(self.engine.room(), self.settings.max_jobs - len(self._running))
        if room < 1 or not self._is_well():
            return
        for claim in self.intake.claim([model for model in self.models if self.engine.room(model)], room):
            self.metrics.claimed(claim.job, claim.queued_s)
            log.info("claimed", job=claim.job.id, model=claim.job.model, queued_s=round(claim.queued_s, 3))
            task = Task(claim.job, timeline=self._tracing.follow(claim.job) if self._tracing else None)
            self._running[task] = claim
            self.engine.submit(task)

    def _publish(self) -> None:
        """Say that the models are ready; insist, since nothing works before that."""
        while not self._stops and not self._try(self._announce):
            pass
        while not self._stops and not self._try(self._renew):
            pass

    def _announce(self) -> None:
        """The cards again and again: a Redis that comes back may have forgotten them."""
        self.intake.publish(model.card for model in self.models.values())

    def _leave(self, gpu: threading.Thread) -> None:
        """Finish what can be finished in time, hand the rest back, and go."""
        end = time.monotonic() + self.settings.grace_s
        self._hand_back(self._too_long(self.settings.grace_s))
        while self._running and self._stops < 2 and time.monotonic() < end:
            self._check(gpu)
            self._try(self._turn)
        self._hand_back(list(self._running))
        self.engine.stop()
        while gpu.is_alive():
            gpu.join(JOIN_S)
            if gpu.is_alive():
                self._check(gpu)  # one that hangs ends the process: nothing waits for it
        self.delivery.close()
        try:
            self.intake.retire()
        except QueueUnavailable as error:
            log.warning("redis is away; this worker will be missed by its lease", cause=str(error.__cause__))
        self.intake.close()

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
        try:
            self.intake.hand_back(claims.values())
        except QueueUnavailable as error:
            log.warning("redis is away; the jobs go back when the lease lapses", cause=str(error.__cause__))
        self.engine.withdraw([claim.job.id for claim in claims.values()])
        for task, claim in claims.items():
            log.info("handed back", job=claim.job.id)
            self._running.pop(task, None)

    def _ended(self, task: Task) -> None:
        """Called on the GPU thread when a task is over: the rest happens off it."""
        if claim := self._running.get(task):  # else it was handed back
            self.delivery.send(claim, task)

    def _let_go(self, task: Task) -> None:
        self._running.pop(task, None)
        self.intake.wake()


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
        metrics = WorkerMetrics()
        if settings.metrics_port:
            start_http_server(settings.metrics_port, settings.metrics_host, metrics.registry)
        safety = safety_filter(settings)
        traces = telemetry.connect("darkroom-worker", log, instance=settings.worker_name)
        models = load_models(settings, metrics)
    except (ValidationError, CannotStart, CheckpointError, OSError) as error:
        why = complaints(error) if isinstance(error, ValidationError) else error
        sys.stderr.write(f"darkroom worker: {why}\n")
        return 2
    intake = Intake.connect(settings, settings.worker_name)
    store, tracing = FolderStore(settings.store_dir), job_tracing(traces)
    worker = Worker(settings, models, intake, store, metrics, safety, tracing)

    def on_signal(_signum: int, _frame: object) -> None:
        log.info("stopping: what fits the grace period is finished, the rest handed back")
        worker.stop()

    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, on_signal)
    try:
        worker.serve()
    finally:
        if traces:
            traces.close()
    return 0


def job_tracing(traces: Traces | None) -> JobTracing | None:
    """What makes the spans of jobs, where traces are sent."""
    if traces is None:
        return None
    from worker.tracing import JobTracing  # with it comes OpenTelemetry

    return JobTracing(traces.tracer)
