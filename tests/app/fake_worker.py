"""A worker without a model: claims real jobs from a real Redis and stores a few bytes as each picture."""

from __future__ import annotations

import threading
import time
from types import TracebackType
from typing import Self

from model.params import GenerationParams
from worker.contract.cards import Defaults, Limits, ModelCard
from worker.contract.job import Failure, Job, Picture, Progress, Result
from worker.contract.settings import ContractSettings
from worker.contract.store import open_store, picture_key
from worker.intake import Claim, Intake

LARGE = ModelCard(
    name="sd3.5-large",
    description="Stable Diffusion 3.5 Large",
    variant="large",
    revision="r1",
    parameters=8_056_627_520,
    defaults=Defaults(steps=28, guidance_scale=4.5),
)
TURBO = ModelCard(
    name="sd3.5-large-turbo",
    description="Stable Diffusion 3.5 Large Turbo",
    variant="large-turbo",
    revision="r1",
    parameters=8_056_627_520,
    defaults=Defaults(steps=4, guidance_scale=1.0),
    negative_prompt=False,
)
TINY = ModelCard(
    name="tiny",
    description="Random weights",
    variant="tiny",
    revision="r1",
    parameters=1000,
    defaults=Defaults(width=64, height=64, steps=2, guidance_scale=3.0, sampler="dpmpp_2m"),
    limits=Limits(min_pixels=4096, max_pixels=65_536, max_side=256, max_steps=10, max_num_images=2),
)
CARDS = (LARGE, TURBO, TINY)
NAMES = [card.name for card in CARDS]
RENEW_S = 0.5


class FakeWorker:
    """Serves all of CARDS in a thread. A context manager."""

    def __init__(self, settings: ContractSettings, failure: Failure | None = None) -> None:
        self._settings, self._failure = settings, failure
        self._intake = Intake.connect(settings, "fake")
        self._store = open_store(settings)
        self._closed = threading.Event()
        self.go_on = threading.Event()  # cleared: jobs stay running, at step 1
        self.go_on.set()
        self.running: list[Claim] = []
        self.age_s = 0.0  # pictures are so old when they are made
        self._thread = threading.Thread(target=self._serve, name="fake-worker")

    def __enter__(self) -> Self:
        self._intake.publish(CARDS)
        self._intake.renew(NAMES)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        self._intake.close()

    def stop(self) -> None:
        """Leaves: claims nothing more."""
        self._closed.set()
        self._thread.join()
        self._intake.retire()

    def _serve(self) -> None:
        intake, renewed_at = self._intake, 0.0
        while not self._closed.is_set():
            if time.monotonic() - renewed_at > RENEW_S:
                intake.renew(NAMES)
                renewed_at = time.monotonic()
            claimed = intake.claim(NAMES, 8)
            intake.progress({claim: Progress(step=1, steps=_steps(claim.job)) for claim in claimed})
            self.running += claimed
            stopped = intake.canceled()
            for claim in list(self.running):
                if claim.key in stopped:
                    intake.commit(claim, "canceled", Result())
                elif self.go_on.is_set():
                    self._finish(claim)
                else:
                    continue
                self.running.remove(claim)
            self._closed.wait(0.02)

    def _finish(self, claim: Claim) -> None:
        if self._failure:
            self._intake.commit(claim, "failed", Result(failure=self._failure))
            return
        pictures = tuple(self._store_picture(claim, n) for n in range(claim.job.num_images))
        expires_at = claim.claimed_at - self.age_s + (claim.job.picture_lifetime_s or self._settings.picture_lifetime_s)
        steps = _steps(claim.job)
        self._intake.progress({claim: Progress(step=steps, steps=steps)})
        result = Result(
            pictures=pictures,
            warnings=self.warnings(pictures),
            timings={"denoise": 0.25},
            expires_at=expires_at,
            fingerprint="fp_fake",
            gpu_seconds=0.25,
        )
        self._intake.commit(claim, "succeeded", result)

    def paint(self, job: Job, params: GenerationParams) -> bytes:
        """The file of a picture."""
        return picture_bytes(job, params)

    def warnings(self, pictures: tuple[Picture, ...]) -> tuple[str, ...]:
        """What its owner is told of a job that succeeded."""
        return ("prompt was cut",)

    def _store_picture(self, claim: Claim, n: int) -> Picture:
        job, params = claim.job, claim.job.params.nth(n)
        data = self.paint(job, params)
        key = picture_key(job.id, claim.execution, n, job.output.format)
        self._store.put(key, data)
        return Picture(
            key=key,
            seed=params.seed,
            width=params.width,
            height=params.height,
            format=job.output.format,
            bytes=len(data),
        )


def picture_bytes(job: Job, params: GenerationParams) -> bytes:
    """What stands for a picture."""
    return f"{job.output.format} of {params.prompt} by {params.seed}".encode()


def _steps(job: Job) -> int:
    return job.params.steps * job.num_images
