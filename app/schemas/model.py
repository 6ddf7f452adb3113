"""What is shown of a model."""

from __future__ import annotations

from typing import Self

from pydantic import BaseModel, ConfigDict, Field

from app import examples
from model.params import Sampler
from worker.contract.cards import ModelCard


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
    trained_pixels: int | None = Field(
        description="Of the largest pictures that it was trained on; larger ones are accepted with a warning."
    )
    aliases: list[str] = Field(description="Names of other models that it answers for while nothing has them.")
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
            trained_pixels=card.trained_pixels,
            aliases=list(card.aliases),
            loaded=workers > 0,
            workers=workers,
        )


class ModelList(BaseModel):
    """All models that a worker has ever offered, by name."""

    models: list[Model]
