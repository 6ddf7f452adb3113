"""What is shown of a generation."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field

from app import examples
from app.links import Links
from model.params import Sampler
from worker.contract.job import Job, JobView, Metadata, OutputFormat, Picture, Priority, Status, WebhookEvent

LAST_S = datetime(9999, 12, 31, tzinfo=UTC).timestamp()
"""The last day that can be told."""


class Params(BaseModel):
    """What the pictures are made with, every default resolved. Posted again, with the model, it makes them again."""

    prompt: str
    negative_prompt: str
    width: int = Field(description="Pixels.")
    height: int = Field(description="Pixels.")
    steps: int
    guidance_scale: float
    seed: int = Field(description="Of the first picture.")
    sampler: Sampler
    num_images: int
    output_format: OutputFormat
    output_quality: int
    metadata: Metadata
    deterministic: bool
    priority: Priority

    @classmethod
    def of(cls, job: Job) -> Self:
        """The params of a job."""
        p, output = job.params, job.output
        return cls(
            prompt=p.prompt,
            negative_prompt=p.negative_prompt,
            width=p.width,
            height=p.height,
            steps=p.steps,
            guidance_scale=p.guidance_scale,
            seed=p.seed,
            sampler=p.sampler,
            num_images=job.num_images,
            output_format=output.format,
            output_quality=output.quality,
            metadata=output.metadata,
            deterministic=job.deterministic,
            priority=job.priority,
        )


class Urls(BaseModel):
    """Where to go on."""

    self_: str = Field(alias="self", description="GET: this generation. DELETE: forgets it.")
    cancel: str = Field(description="POST: cancels it.")
    events: str = Field(description="GET: what happens to it, as server-sent events.")


class Image(BaseModel):
    """One finished picture."""

    url: str = Field(description="GET: its bytes, until `expires_at` of the generation.")
    seed: int = Field(description="Its own seed: alone, with `num_images` 1, it makes this picture.")
    width: int = Field(description="Pixels.")
    height: int = Field(description="Pixels.")
    format: OutputFormat
    bytes: int = Field(description="Size of the file.")
    filtered: bool | None = Field(
        description="True: blurred by the server's safety filter. Null: it has none, and nothing was checked."
    )

    @classmethod
    def of(cls, picture: Picture, url: str) -> Self:
        """The image of a stored picture."""
        return cls(
            url=url,
            seed=picture.seed,
            width=picture.width,
            height=picture.height,
            format=picture.format,
            bytes=picture.bytes,
            filtered=picture.filtered,
        )


DeliveryOutcome = Literal["delivered", "retry", "dead"]


class Delivery(BaseModel):
    """One try to call a webhook."""

    event: WebhookEvent
    at: datetime
    attempt: int = Field(description="1 is the first.")
    status: int | None = Field(default=None, description="HTTP status of its answer, if it gave one.")
    error: str | None = Field(default=None, description="Why there was none.")
    seconds: float
    outcome: DeliveryOutcome = Field(
        description="`delivered`; `retry`: it is sent again at `next_at`; `dead`: it was given up."
    )
    next_at: datetime | None = Field(default=None, description="When it is sent again, if it is.")

    @classmethod
    def of(cls, delivery: dict[str, Any]) -> Self:
        """The delivery of an entry of a job's log."""
        times = {name: moment(delivery[name]) for name in ("at", "next_at") if name in delivery}
        return cls.model_validate(delivery | times)


class WebhookState(BaseModel):
    """Who is told, and how that went."""

    url: str
    events: list[WebhookEvent]
    deliveries: list[Delivery] = Field(description="The latest tries, newest last, at most 20.")


class GenerationProgress(BaseModel):
    """How far a generation is, over all its pictures."""

    step: int
    steps: int


class GenerationError(BaseModel):
    """Why a generation failed."""

    code: str
    message: str


class Generation(BaseModel):
    """A generation at one moment."""

    model_config = ConfigDict(json_schema_extra={"examples": [examples.SUCCEEDED]})

    id: str
    status: Status = Field(description="`queued`, `running`, then one of `succeeded`, `failed`, `canceled` for good.")
    model: str
    revision: str = Field(description="Of the model's weights when the job was accepted.")
    created_at: datetime
    started_at: datetime | None
    ended_at: datetime | None
    deadline: datetime = Field(description="The job fails if it has not ended by then.")
    expires_at: datetime | None = Field(description="When the pictures are deleted; they answer 410 from then on.")
    queue_position: int | None = Field(description="Jobs of the same model that go first, 0 = next; only while queued.")
    progress: GenerationProgress | None
    cancel_requested: bool = Field(description="Cancelled while running: it ends at its next step.")
    params: Params
    seeds: list[int] = Field(description="The seed of each picture.")
    images: list[Image] = Field(description="The pictures, once succeeded.")
    fingerprint: str | None = Field(
        description="Stands for the device, software, weights and settings that made the pictures, once succeeded."
    )
    warnings: list[str] = Field(description="What was accepted but not followed to the letter.")
    timings: dict[str, float] = Field(
        description="Seconds: `queue` waited, `total` from accepted to ended, the rest by stage of the work."
    )
    error: GenerationError | None = Field(description="Why it failed, if it did.")
    webhook: WebhookState | None = Field(description="Who is told of it, if the request named somebody.")
    urls: Urls

    @classmethod
    def of(cls, view: JobView, links: Links) -> Self:
        """The generation that a view of a job shows."""
        job, result = view.job, view.result
        url = links.generation(job.id)
        pictures = result.pictures if result else ()
        failure = result.failure if result else None
        return cls(
            id=job.id,
            status=view.status,
            model=job.model,
            revision=job.revision,
            created_at=moment(job.created_at),
            started_at=None if view.started_at is None else moment(view.started_at),
            ended_at=None if view.ended_at is None else moment(view.ended_at),
            deadline=moment(job.deadline),
            expires_at=moment(result.expires_at) if result and result.expires_at else None,
            queue_position=view.position,
            progress=GenerationProgress(step=view.progress.step, steps=view.progress.steps) if view.progress else None,
            cancel_requested=view.cancel_requested,
            params=Params.of(job),
            seeds=job.seeds,
            images=[Image.of(picture, links.image(view, n)) for n, picture in enumerate(pictures)],
            fingerprint=result.fingerprint if result else None,
            warnings=list(view.warnings),
            timings=_timings(view),
            error=GenerationError(code=failure.code, message=failure.message) if failure else None,
            webhook=_webhook(view),
            urls=Urls(self=url, cancel=f"{url}/cancel", events=f"{url}/events"),
        )


class GenerationPage(BaseModel):
    """Some of the caller's generations."""

    generations: list[Generation] = Field(description="Newest first.")
    next: str | None = Field(description="The `cursor` of the next page; null: there is none.")


def moment(unix_s: float) -> datetime:
    """Unix seconds as a time in UTC; the last that there is for what is beyond it."""
    return datetime.fromtimestamp(min(unix_s, LAST_S), UTC)


def timestamp(unix_s: float) -> str:
    """The same in words, with microseconds."""
    return moment(unix_s).isoformat().replace("+00:00", "Z")


def _webhook(view: JobView) -> WebhookState | None:
    if view.job.webhook is None:
        return None
    deliveries = [Delivery.of(delivery) for delivery in view.deliveries]
    return WebhookState(url=view.job.webhook.url, events=list(view.job.webhook.events), deliveries=deliveries)


def _timings(view: JobView) -> dict[str, float]:
    created, timings = view.job.created_at, dict(view.result.timings) if view.result else {}
    if view.started_at is not None:
        timings["queue"] = max(0.0, view.started_at - created)
    if view.ended_at is not None:
        timings["total"] = max(0.0, view.ended_at - created)
    return {stage: round(seconds, 4) for stage, seconds in timings.items()}
