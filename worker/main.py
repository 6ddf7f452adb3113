"""The worker process: loads its models, says that it is ready, then serves until told to stop."""

from __future__ import annotations

import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import structlog
from prometheus_client import start_http_server
from pydantic import ValidationError

from model.checkpoint import CheckpointError
from worker.contract.errors import QueueUnavailable, StoreUnavailable
from worker.contract.job import Job, Picture, Result
from worker.contract.settings import complaints
from worker.contract.store import FolderStore, PictureStore, picture_key
from worker.engine import Engine, Outcome, Task, explain
from worker.intake import Claim, Intake
from worker.metrics import WorkerMetrics
from worker.models import Model, load
from worker.pictures import encode
from worker.settings import WorkerSettings

log = structlog.get_logger()

HEARTBEAT_S = 2.0
PROGRESS_S = 0.25
IDLE_S = 2.0
RETRY_S = (0.2, 0.5, 1.0, 2.0, 4.0)


@dataclass(frozen=True, eq=False)
class Held:
    """A job that this worker holds."""

    claim: Claim
    task: Task


class Worker:
    """Three kinds of thread: this one talks to Redis, one owns the GPU, two encode and store pictures."""

    def __init__(
        self,
        settings: WorkerSettings,
        models: dict[str, Model],
        intake: Intake,
        store: PictureStore,
        metrics: WorkerMetrics,
    ) -> None:
        self.settings, self.models, self.intake, self.store, self.metrics = settings, models, intake, store, metrics
        self.stopping = threading.Event()
        self.engine = Engine(
            {name: model.pipeline for name, model in models.items()},
            max_rows=settings.max_batch_rows,
            metrics=metrics,
            ended=self._ended,
        )
        self._held: dict[str, Held] = {}  # by job id, until committed
        self._pool = ThreadPoolExecutor(max_workers=2, thread_name_prefix="pictures")
        self._last_heartbeat = self._last_progress = 0.0

    def stop(self) -> None:
        """Claim nothing more; `serve` returns when what is held has ended."""
        self.stopping.set()
        self.intake.wake()

    def serve(self) -> None:
        """Serve until stopped. Redis may come and go meanwhile."""
        gpu = threading.Thread(target=self.engine.run, name="gpu", daemon=True)
        gpu.start()
        self._publish()
        log.info("ready", models=list(self.models), worker=self.settings.worker_name)
        while not self.stopping.is_set() or self._held:
            if not gpu.is_alive():
                raise RuntimeError("the GPU thread has died")
            try:
                self._turn()
            except QueueUnavailable as error:
                log.warning("redis is away; will try again", cause=str(error.__cause__))
                time.sleep(RETRY_S[2])
        self.engine.stop()
        gpu.join()
        self._pool.shutdown()
        self._retire()

    def _turn(self) -> None:
        """One turn of the control loop: be seen, pass on cancels and progress, claim, wait."""
        now = time.monotonic()
        if now - self._last_heartbeat >= HEARTBEAT_S:
            self._announce()
            self._last_heartbeat = now
        for job_id in self.intake.canceled():
            if held := self._held.get(job_id):
                held.task.cancel()
        if now - self._last_progress >= PROGRESS_S:
            self._report_progress()
            self._last_progress = now
        self._claim()
        self.intake.wait(PROGRESS_S if self._held else IDLE_S)

    def _report_progress(self) -> None:
        running = [held for held in list(self._held.values()) if held.task.outcome is None]
        if running:
            self.intake.progress({held.claim: held.task.progress for held in running})

    def _claim(self) -> None:
        room = self.settings.max_jobs - len(self._held)
        if self.stopping.is_set() or room < 1:
            return
        for claim in self.intake.claim(list(self.models), room):
            self.metrics.claimed(claim.job, claim.queued_s)
            log.info("claimed", job=claim.job.id, model=claim.job.model, queued_s=round(claim.queued_s, 3))
            held = self._held[claim.job.id] = Held(claim, Task(claim.job))
            self.engine.submit(held.task)

    def _publish(self) -> None:
        """Say that the models are ready; insist, since nothing works before that."""
        while not self.stopping.is_set():
            try:
                self._announce()
                return
            except QueueUnavailable as error:
                log.warning("redis is away; cannot say that the models are ready yet", cause=str(error.__cause__))
                self.stopping.wait(RETRY_S[2])

    def _announce(self) -> None:
        """Be seen. The cards again each time: a Redis that comes back may have forgotten them."""
        self.intake.publish(model.card for model in self.models.values())
        self.intake.heartbeat(self.models)

    def _retire(self) -> None:
        try:
            self.intake.retire()
        except QueueUnavailable as error:
            log.warning("redis is away; this worker will be missed by its heartbeat", cause=str(error.__cause__))
        self.intake.close()

    def _ended(self, task: Task) -> None:
        """Called on the GPU thread when a task is over: the rest happens off it."""
        self._pool.submit(self._finish, task)

    def _finish(self, task: Task) -> None:
        """Store the pictures of a task, commit it, and let go of it."""
        held = self._held[task.job.id]
        outcome: str = "lost"
        try:
            outcome = self._commit(held)
        except Exception:
            log.exception("could not commit", job=task.job.id)
        finally:
            del self._held[task.job.id]
            self.intake.wake()
            run_s = time.time() - held.claim.claimed_at
            self.metrics.ended(task.job, outcome, run_s)
            log.info("ended", job=task.job.id, outcome=outcome, run_s=round(run_s, 3))

    def _commit(self, held: Held) -> str:
        """Try until Redis answers; what the commit did not accept is deleted again."""
        claim, task = held.claim, held.task
        outcome, result = self._result(claim, task)
        while True:
            for pause in RETRY_S:
                try:
                    if self.intake.commit(claim, outcome, result):
                        return outcome
                    self._forget(claim)
                    return "canceled" if task.cancel_requested else "lost"
                except QueueUnavailable as error:
                    cause = str(error.__cause__)
                    time.sleep(pause)
            log.warning("redis is away; still holding a finished job", job=claim.job.id, cause=cause)

    def _result(self, claim: Claim, task: Task) -> tuple[Outcome, Result]:
        if task.outcome != "succeeded":
            return task.outcome or "failed", Result(failure=task.failure, timings=_rounded(task.seconds))
        try:
            pictures = tuple(self._store(claim, task, n) for n in range(task.job.num_images))
        except Exception as error:
            self._forget(claim)
            return "failed", Result(failure=explain(task.job, error))
        warnings = tuple(dict.fromkeys(w for rendering in task.renderings for w in rendering.warnings))
        return "succeeded", Result(
            pictures=pictures,
            warnings=warnings,
            timings=_rounded(task.seconds),
            expires_at=time.time() + self.settings.picture_lifetime_s,
        )

    def _store(self, claim: Claim, task: Task, n: int) -> Picture:
        """Encode and store picture `n` under this execution's own key, so that running twice harms nobody."""
        job = task.job
        started = time.perf_counter()
        data = encode(task.renderings[n].pixels, job, n)
        encoded = time.perf_counter()
        key = picture_key(job.id, claim.execution, n, job.output.format)
        self._put(key, data)
        self.metrics.stage(job, "encode_image", encoded - started)
        self.metrics.stage(job, "upload", time.perf_counter() - encoded)
        return _picture(job, n, key, len(data))

    def _put(self, key: str, data: bytes) -> None:
        for pause in RETRY_S:
            try:
                return self.store.put(key, data)
            except StoreUnavailable as error:
                log.warning("the picture store is away; will try again", cause=str(error.__cause__))
                time.sleep(pause)
        self.store.put(key, data)

    def _forget(self, claim: Claim) -> None:
        try:
            self.store.delete_prefix(f"{claim.job.id}/{claim.execution}/")
        except StoreUnavailable as error:
            log.warning("left pictures behind for the sweeper", job=claim.job.id, cause=str(error.__cause__))


def _picture(job: Job, n: int, key: str, size: int) -> Picture:
    params = job.params.nth(n)
    return Picture(
        key=key, seed=params.seed, width=params.width, height=params.height, format=job.output.format, bytes=size
    )


def _rounded(seconds: dict[str, float]) -> dict[str, float]:
    return {stage: round(value, 4) for stage, value in seconds.items()}


def load_models(settings: WorkerSettings, metrics: WorkerMetrics) -> dict[str, Model]:
    """Load every model asked for; the first that cannot be loaded ends the worker."""
    models = {}
    for source in settings.models:
        log.info("loading", model=source.name, path=str(source.path))
        model = models[source.name] = load(source, settings)
        metrics.loaded(source.name, model.load_s)
        log.info("loaded", model=source.name, seconds=round(model.load_s, 2), device=str(model.pipeline.device))
    return models


def serve() -> int:
    """Load what the environment asks for and serve it until told to stop; the exit status says how it ended."""
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
    )
    try:
        settings = WorkerSettings()
        metrics = WorkerMetrics()
        if settings.metrics_port:
            start_http_server(settings.metrics_port, settings.metrics_host, metrics.registry)
        models = load_models(settings, metrics)
    except (ValidationError, CheckpointError, OSError) as error:
        why = complaints(error) if isinstance(error, ValidationError) else error
        sys.stderr.write(f"darkroom worker: {why}\n")
        return 2
    intake = Intake.connect(settings, settings.worker_name)
    worker = Worker(settings, models, intake, FolderStore(settings.store_dir), metrics)

    def on_signal(signum: int, _frame: object) -> None:
        signal.signal(signum, signal.SIG_DFL)  # a second one ends the process at once
        log.info("stopping: finishing what is held")
        worker.stop()

    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, on_signal)
    worker.serve()
    return 0
