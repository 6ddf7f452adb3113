"""What may be asked for."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from app import examples
from model.params import MAX_SEED, Sampler
from worker.contract.job import Metadata, OutputFormat, Priority, WebhookEvent

MAX_PUBLIC_SEED = MAX_SEED - 4
"""Room for the seeds of the other pictures of the same job."""


class WebhookCreate(BaseModel):
    """Who is told of a generation."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    url: str = Field(
        min_length=1,
        max_length=2048,
        description="Where the generation is posted, signed (Standard Webhooks): a public https address.",
    )
    events: list[WebhookEvent] = Field(
        default=["completed"],
        min_length=1,
        max_length=3,
        description="When: `started`, `progress` (some of its steps), `completed` (whatever way it ended).",
    )


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
    aspect_ratio: str | None = Field(
        default=None,
        pattern=r"^[1-9][0-9]{0,3}:[1-9][0-9]{0,3}$",
        description="Width to height, such as `16:9`, instead of both: the nearest legal size of `megapixels`.",
        examples=["1:1", "16:9", "2:3"],
    )
    megapixels: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="Width x height in units of 1,048,576 pixels, 0.25 to 2, with or without `aspect_ratio`. "
        "Left out: the model's default.",
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
    expires_in_s: int | None = Field(
        default=None,
        ge=60,
        description="Seconds that the pictures are kept once made. Left out: as long as this server keeps any.",
    )
    webhook: WebhookCreate | None = Field(default=None, description="Who is told how it goes.")

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {name: value for name, value in data.items() if value is not None or name not in cls.model_fields}
