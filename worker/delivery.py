"""What becomes of a task that is over: its pictures stored, its job committed, off the GPU thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from itertools import chain, repeat
from typing import TYPE_CHECKING

import structlog
from torch import Tensor

from worker.contract.errors import QueueUnavailable, StoreUnavailable
from worker.contract.job import Job, Outcome, Picture, Result
from worker.contract.store import PictureStore, picture_key
from worker.failures import explain
from worker.intake import Claim, Intake
from worker.logs import about
from worker.metrics import WorkerMetrics
from worker.pictures import encode
from worker.safety import SafetyFilter
from worker.task import Task

if TYPE_CHECKING:
    from worker.tracing import JobTracing

log = structlog.get_logger()

RETRY_S = (0.2, 0.5, 1.0, 2.0, 4.0)
"""Pauses between tries; the last again and again."""

CLOSE_S = 4.0
"""How long a worker that leaves waits for its last pictures: less than a lease, which nobody renews meanwhile."""

BLURRED = "picture {} was blurred: this server's safety filter takes it for unsafe"


class Delivery:
    """Stores and commits in a small pool of threads, and calls `done` with each task that is off our hands.

    Redis and the store may be away. A finished job is held meanwhile, its lease renewed, and its last step tried until
    it succeeds: `waited_s` tells how long a picture has been at it, so that the worker claims no more, and after a
    while hands back what is `unstored` and lets go of it by `drop`. Its picture goes on knocking: when it gets in, the
    store is back; the commit is refused then, and the picture deleted again.
    """

    def __init__(
        self,
        intake: Intake,
        store: PictureStore,
        metrics: WorkerMetrics,
        *,
        picture_lifetime_s: float,
        fingerprints: Mapping[str, str],  # by model
        done: Callable[[Task], None],
        safety: SafetyFilter | None = None,
        tracing: JobTracing | None = None,
    ) -> None:
        self._intake, self._store, self._metrics, self._done = intake, store, metrics, done
        self._picture_lifetime_s, self._fingerprints = picture_lifetime_s, fingerprints
        self._safety, self._tracing = safety, tracing
        self._pool = ThreadPoolExecutor(max_workers=2, thread_name_prefix="pictures")
        self._notices = ThreadPoolExecutor(max_workers=1, thread_name_prefix="notices")  # nothing to store: no waiting
        self._sent: set[Future[None]] = set()  # what is not over
        self._unstored: dict[str, Claim] = {}  # by its key
        self._storing: dict[str, float] = {}  # since when a picture of a claim is on its way, by the claim's key
        self._closing = threading.Event()

    def send(self, claim: Claim, task: Task) -> None:
        """Take over a task that is over; from any thread."""
        if task.outcome == "succeeded":
            self._unstored[claim.key] = claim
        pool = self._pool if task.outcome == "succeeded" else self._notices
        sent = pool.submit(self._deliver, claim, task)
        self._sent.add(sent)
        sent.add_done_callback(self._sent.discard)

    def waited_s(self, now: float) -> float:
        """How long the picture that is at it longest has been on its way to the store. `now`: monotonic seconds."""
        return max((now - since for since in list(self._storing.values())), default=0.0)

    def unstored(self) -> list[Claim]:
        """The claims whose pictures are not all stored yet."""
        return list(self._unstored.values())

    def drop(self, claims: Iterable[Claim]) -> None:
        """Lets go of claims that were handed back; what is not begun of them is not."""
        for claim in claims:
            self._unstored.pop(claim.key, None)

    def close(self, within_s: float = CLOSE_S) -> bool:
        """Whether all that was sent is delivered in that time, or was tried once more: Redis or the store may be away.

        A store that takes a connection and says nothing is left to itself; what waits behind that is not begun.
        """
        self._closing.set()
        late = wait(list(self._sent), within_s).not_done
        for pool in (self._pool, self._notices):
            pool.shutdown(wait=not late, cancel_futures=True)
        return not late

    def _deliver(self, claim: Claim, task: Task) -> None:
        outcome, since = "lost", time.time_ns()
        try:
            outcome = self._commit(claim, task)
        except StoreUnavailable:
            log.warning("the picture store is away; a finished job is left to others", **about(task.job))
        except QueueUnavailable:  # no reason to fail it: its pictures are stored, and it may even be committed
            log.warning("redis is away; a finished job is left to others", **about(task.job))
        except Exception as error:
            log.exception("could not commit", **about(task.job))
            outcome = self._fail(claim, task, error)
        finally:
            self._done(task)
            run_s = max(0.0, time.time() - claim.claimed_at)  # Redis' clock may be ahead of ours
            self._metrics.ended(task.job, outcome, run_s)
            log.info("ended", **about(task.job), outcome=outcome, run_s=round(run_s, 3))
            if self._tracing:
                self._tracing.ended(claim, task, outcome, since)

    def _commit(self, claim: Claim, task: Task) -> str:
        """Try until store and Redis answer; what the commit did not accept is deleted again.

        StoreUnavailable, QueueUnavailable: they did not when we were closed.
        """
        if task.outcome == "succeeded" and claim.key not in self._unstored:
            return "lost"
        outcome, result = self._result(claim, task)
        while True:
            for pause in RETRY_S:
                is_last = self._closing.is_set()
                try:
                    if self._intake.commit(claim, outcome, result):
                        return outcome
                    self._forget(claim)
                    return "canceled" if task.cancel_requested else "lost"
                except QueueUnavailable as error:
                    if is_last:
                        raise
                    cause = str(error.__cause__)
                    self._closing.wait(pause)
            log.warning("redis is away; still holding a finished job", **about(claim.job), cause=cause)

    def _fail(self, claim: Claim, task: Task, error: Exception) -> str:
        """End a job whose result cannot be committed: held for ever, it would keep others from this worker."""
        try:
            committed = self._intake.commit(claim, "failed", Result(failure=explain(task.job, error)))
        except Exception:
            log.exception("could not even fail it", **about(task.job))
            self._intake.let_go(claim)  # held, it would be renewed for ever; so it goes back
            return "lost"
        return "failed" if committed else "lost"

    def _result(self, claim: Claim, task: Task) -> tuple[Outcome, Result]:
        if task.outcome != "succeeded":
            return task.outcome or "failed", Result(
                failure=task.failure,
                timings=_rounded(task.seconds),
                fingerprint=self._fingerprints.get(task.job.model),
                gpu_seconds=round(task.gpu_s, 4),
            )
        try:
            pictures = tuple(self._put_picture(claim, task, n) for n in range(task.job.num_images))
        except StoreUnavailable:
            raise
        except Exception as error:
            self._forget(claim)
            return "failed", Result(
                failure=explain(task.job, error),
                fingerprint=self._fingerprints[task.job.model],
                gpu_seconds=round(task.gpu_s, 4),
            )
        finally:
            self._storing.pop(claim.key, None)
            self._unstored.pop(claim.key, None)
        warnings = tuple(dict.fromkeys(w for rendering in task.renderings for w in rendering.warnings))
        warnings += tuple(BLURRED.format(n) for n, picture in enumerate(pictures) if picture.filtered)
        return "succeeded", Result(
            pictures=pictures,
            warnings=warnings,
            timings=_rounded(task.seconds),
            expires_at=time.time() + (task.job.picture_lifetime_s or self._picture_lifetime_s),
            fingerprint=self._fingerprints[task.job.model],
            gpu_seconds=round(task.gpu_s, 4),
        )

    def _put_picture(self, claim: Claim, task: Task, n: int) -> Picture:
        """Check, encode and store picture `n` under this execution's own key, so that running twice harms nobody."""
        job = task.job
        pixels, filtered = self._checked(job, task.renderings[n].pixels)
        started = time.perf_counter()
        data = encode(pixels, job, n, filtered=filtered)
        encoded = time.perf_counter()
        key = picture_key(job.id, claim.execution, n, job.output.format)
        self._storing[claim.key] = time.monotonic()
        self._put(job, key, data)
        self._metrics.stage(job, "encode_image", encoded - started)
        self._metrics.stage(job, "upload", time.perf_counter() - encoded)
        return replace(_picture(job, n, key, len(data)), filtered=filtered)

    def _checked(self, job: Job, pixels: Tensor) -> tuple[Tensor, bool | None]:
        """The pixels that may be shown, and what the safety filter did to them: see Picture.filtered."""
        if self._safety is None:
            return pixels, None
        started = time.perf_counter()
        pixels, filtered = self._safety.check(pixels)
        self._metrics.stage(job, "safety_check", time.perf_counter() - started)
        self._metrics.checked(job, "blurred" if filtered else "passed")
        return pixels, filtered

    def _put(self, job: Job, key: str, data: bytes) -> None:
        """Try until the store takes it. StoreUnavailable: it did not when we were closed."""
        for pause in chain(RETRY_S, repeat(RETRY_S[-1])):
            try:
                return self._store.put(key, data)
            except StoreUnavailable as error:
                self._metrics.store_retried()
                log.warning(
                    "the picture store is away; holding a finished job", **about(job), cause=str(error.__cause__)
                )
                if self._closing.wait(pause):
                    raise

    def _forget(self, claim: Claim) -> None:
        try:
            self._store.delete_prefix(f"{claim.job.id}/{claim.execution}/")
        except StoreUnavailable as error:
            log.warning("left pictures behind for the sweeper", **about(claim.job), cause=str(error.__cause__))


def _picture(job: Job, n: int, key: str, size: int) -> Picture:
    params = job.params.nth(n)
    return Picture(
        key=key, seed=params.seed, width=params.width, height=params.height, format=job.output.format, bytes=size
    )


def _rounded(seconds: dict[str, float]) -> dict[str, float]:
    return {stage: round(value, 4) for stage, value in seconds.items()}
