"""The native vocabulary of the HTTP surface: requests, answers and errors, and all the prose of its OpenAPI."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from app import examples
from model.params import MAX_SEED, Sampler
from worker.contract.cards import ModelCard
from worker.contract.job import Job, JobView, Metadata, OutputFormat, Picture, Priority, Status

DESCRIPTION = """
Pictures from prompts with Stable Diffusion 3.5.

`POST /v1/generations` accepts a job and answers at once with its id; `GET /v1/generations/{id}` tells how far it is
and, once it has succeeded, where its pictures are. With the header `Prefer: wait=30` the first call holds its answer
until the job has ended, 30 seconds at most. Every refusal has one shape:
`{"error": {"code", "message", "field", "request_id"}}`.
"""

TAGS = [
    {"name": "generations", "description": "Ask for pictures, follow them, fetch them."},
    {"name": "models", "description": "What can be asked of which model."},
    {"name": "health", "description": "For probes and Prometheus."},
]

MAX_WAIT_S = 60
MAX_PUBLIC_SEED = MAX_SEED - 4
"""Room for the seeds of the other pictures of the same job."""


class GenerationCreate(BaseModel):
    """What is asked for. A field that is left out, or null, gets its default; unknown fields are refused."""

    model_config = ConfigDict(
        strict=True, extra="forbid", frozen=True, json_schema_extra={"examples": examples.REQUESTS}
    )

    model: str = Field(min_length=1, max_length=128, description="Name of a model of `GET /v1/models`.")
    prompt: str = Field(
        min_length=1,
        description="What to show, in at most 10,000 characters. What the encoders cannot hold is cut and warned of.",
    )
    negative_prompt: str = Field(
        default="", description="What the picture shall not show. Has an effect only where guidance_scale is over 1."
    )
    width: int | None = Field(
        default=None, ge=1, description="Pixels, a multiple of 16; width x height within the model's limits."
    )
    height: int | None = Field(
        default=None, ge=1, description="Pixels, a multiple of 16; width x height within the model's limits."
    )
    steps: int | None = Field(default=None, ge=1, description="Denoising steps; at most the model's max_steps (100).")
    guidance_scale: float | None = Field(
        default=None,
        ge=0,
        allow_inf_nan=False,
        description="How closely to follow the prompt, at most the model's max_guidance_scale (20). Up to 1: unguided.",
    )
    seed: int | None = Field(
        default=None,
        ge=0,
        le=MAX_PUBLIC_SEED,
        description="Of the first picture; picture n has seed + n. Left out: random, and told in the answer.",
    )
    num_images: int = Field(
        default=1, ge=1, description="Pictures of this prompt; at most the model's max_num_images (4)."
    )
    sampler: Sampler | None = Field(default=None, description="How each step is taken.")
    output_format: OutputFormat = Field(default="png", description="File format of the pictures.")
    output_quality: int = Field(default=90, ge=1, le=100, description="Quality of JPEG and WebP.")
    metadata: Metadata = Field(
        default="full", description="`full`: the file's text says what made the picture. `none`: it says nothing."
    )
    deterministic: bool = Field(
        default=False,
        description="True: the same bytes whatever else runs, on every worker whose answer has the same `fingerprint`. "
        "Each picture then has its steps to itself, which makes small ones slower. False: the same up to rounding.",
    )
    priority: Priority = Field(default="normal", description="Jobs of a higher priority are started first.")
    deadline_s: int | None = Field(
        default=None,
        ge=1,
        le=3600,
        description="Seconds from now after which the job fails if it has not ended. Left out: the record's lifetime.",
    )

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {name: value for name, value in data.items() if value is not None or name not in cls.model_fields}


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

    self_: str = Field(alias="self", description="GET: this generation.")
    cancel: str = Field(description="POST: cancels it.")


class Image(BaseModel):
    """One finished picture."""

    url: str = Field(description="GET: its bytes, until `expires_at` of the generation.")
    seed: int = Field(description="Its own seed: alone, with `num_images` 1, it makes this picture.")
    width: int = Field(description="Pixels.")
    height: int = Field(description="Pixels.")
    format: OutputFormat
    bytes: int = Field(description="Size of the file.")

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
        )


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
    urls: Urls

    @classmethod
    def of(cls, view: JobView, base_url: str) -> Self:
        """The generation that a view of a job shows; urls begin with `base_url` (no slash at its end)."""
        job, result = view.job, view.result
        url = f"{base_url}/v1/generations/{job.id}"
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
            images=[Image.of(picture, f"{url}/images/{n}") for n, picture in enumerate(pictures)],
            fingerprint=result.fingerprint if result else None,
            warnings=_warnings(view),
            timings=_timings(view),
            error=GenerationError(code=failure.code, message=failure.message) if failure else None,
            urls=Urls(self=url, cancel=f"{url}/cancel"),
        )


class ModelDefaults(BaseModel):
    """What a request gets that does not say."""

    width: int
    height: int
    steps: int
    guidance_scale: float
    sampler: Sampler


class ModelLimits(BaseModel):
    """What a request may ask of a model."""

    min_pixels: int = Field(description="Of width x height.")
    max_pixels: int = Field(description="Of width x height.")
    min_side: int
    max_side: int
    side_multiple: int
    max_steps: int
    max_guidance_scale: float
    max_prompt_chars: int
    max_num_images: int


class Model(BaseModel):
    """A model: what it is, what it takes, and whether a worker holds it now."""

    model_config = ConfigDict(json_schema_extra={"examples": [examples.MODEL]})

    name: str
    description: str
    variant: str
    revision: str = Field(description="Changes when the weights do.")
    parameters: int = Field(description="Of the MMDiT.")
    defaults: ModelDefaults
    limits: ModelLimits
    negative_prompt: bool = Field(description="False: a negative prompt has no effect.")
    loaded: bool = Field(description="A worker holds it now. If not, jobs are accepted and wait for one.")
    workers: int = Field(description="Live workers that hold it.")

    @classmethod
    def of(cls, card: ModelCard, workers: int) -> Self:
        """The model that a card describes, held by so many workers."""
        return cls(
            name=card.name,
            description=card.description,
            variant=card.variant,
            revision=card.revision,
            parameters=card.parameters,
            defaults=ModelDefaults.model_validate(card.defaults, from_attributes=True),
            limits=ModelLimits.model_validate(card.limits, from_attributes=True),
            negative_prompt=card.negative_prompt,
            loaded=workers > 0,
            workers=workers,
        )


class ModelList(BaseModel):
    """All models that a worker has ever offered, by name."""

    models: list[Model]


class Alive(BaseModel):
    """The process answers."""

    status: str = Field(examples=["ok"])


class Readiness(BaseModel):
    """Whether this gateway can do its work. That no worker is there does not make it unready: jobs wait."""

    model_config = ConfigDict(json_schema_extra={"examples": [examples.READY]})

    status: str = Field(description="`ready` or `not_ready`.")
    draining: bool = Field(description="Shutting down.")
    redis: str = Field(description="`ok`, or what is wrong.")
    store: str = Field(description="`ok`, or what is wrong.")
    workers: dict[str, int] = Field(description="Live workers by model; empty when there are none, or Redis is away.")


class Error(BaseModel):
    """Why a request was refused."""

    code: str = Field(description="Stable, for programs.")
    message: str = Field(description="One sentence for people: the field, its value, and what is allowed.")
    field: str | None = Field(description="The field at fault, if it is one.")
    request_id: str = Field(description="The answer's `X-Request-ID`; our log knows the request by it.")


class ErrorBody(BaseModel):
    """The one shape of every refusal."""

    error: Error


def refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The OpenAPI responses of a route that may refuse with these statuses."""
    responses: dict[int | str, dict[str, Any]] = {}
    for status in statuses:
        description, code, message, field = examples.REFUSALS[status]
        example = {"error": {"code": code, "message": message, "field": field, "request_id": "req_5f1c0a9e4b7d2836"}}
        content = {"application/json": {"example": example}}
        responses[status] = {"model": ErrorBody, "description": description, "content": content}
    return responses


ANY_REFUSAL: dict[int | str, dict[str, Any]] = {
    "default": {"model": ErrorBody, "description": "Any other refusal, in the same shape."}
}


def moment(unix_s: float) -> datetime:
    """Unix seconds as a time in UTC."""
    return datetime.fromtimestamp(unix_s, UTC)


def _warnings(view: JobView) -> list[str]:
    params = view.job.params
    unguided = params.negative_prompt and not params.guided
    ours = [f"negative_prompt has no effect: guidance_scale is {params.guidance_scale:g}"] if unguided else []
    return ours + [warning for warning in (view.result.warnings if view.result else ()) if warning not in ours]


def _timings(view: JobView) -> dict[str, float]:
    created, timings = view.job.created_at, dict(view.result.timings) if view.result else {}
    if view.started_at is not None:
        timings["queue"] = max(0.0, view.started_at - created)
    if view.ended_at is not None:
        timings["total"] = max(0.0, view.ended_at - created)
    return {stage: round(seconds, 4) for stage, seconds in timings.items()}
