"""The model that is evaluated: its files, what its card recommends, and the pipeline that runs it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from model.card import CARD, card_at
from model.checkpoint import load_components
from model.config import VARIANTS
from model.params import SAMPLERS, GenerationParams, Sampler
from model.pipeline import Pipeline
from model.text import T5_LENGTH
from model.weights import CheckpointError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}
"""By the name of a precision: of all that is not fp8."""


@dataclass(frozen=True)
class Card:
    """What a model recommends for itself."""

    steps: int
    guidance_scale: float
    sampler: Sampler = "euler"
    width: int = 1024
    height: int = 1024
    negative_prompt: bool = True

    def params(self, prompt: str, seed: int) -> GenerationParams:
        """A picture by the model's own defaults."""
        return GenerationParams(
            prompt=prompt, seed=seed, width=self.width, height=self.height, steps=self.steps,
            guidance_scale=self.guidance_scale, sampler=self.sampler,
        )  # fmt: skip

    @property
    def guided(self) -> bool:
        """Whether guidance and negative prompts do anything."""
        return self.negative_prompt and self.guidance_scale > 1


@dataclass(frozen=True, eq=False)
class Subject:
    """A loaded model."""

    name: str
    revision: str
    card: Card
    pipeline: Pipeline

    @property
    def longest(self) -> int:
        """The longest side that its position table reaches, pixels."""
        config = self.pipeline.mmdit.config
        return config.pos_embed_grid * config.patch * 8


def load_subject(path: Path, device: torch.device, dtype: str) -> Subject:
    """A model as the worker loads it. Errors: CheckpointError says what is wrong with its files."""
    parts = load_components(path, device, DTYPES[dtype], fp8=dtype == "fp8")
    told = card_at(path)
    length = told.get("t5_length", T5_LENGTH)
    pipeline = Pipeline(parts.mmdit, parts.vae, parts.text, shift=parts.shift, t5_length=length)
    return Subject(path.resolve().stem, parts.revision, _card(path, told, parts.variant), pipeline)


def _card(path: Path, told: dict[str, Any], variant: str) -> Card:
    known = VARIANTS.get(variant)
    defaults: dict[str, Any] = {}
    if known:
        defaults = {"steps": known.steps, "guidance_scale": known.guidance_scale, "sampler": known.sampler}
    try:
        guided = told.get("negative_prompt", known.guided if known else True)
        card = Card(**(defaults | told.get("defaults", {})), negative_prompt=guided)
        card.params("", 0)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path / CARD} gives no usable defaults (steps, guidance_scale): {error}") from error
    if card.sampler not in SAMPLERS:
        raise CheckpointError(f"{path / CARD}: sampler is {card.sampler!r}, expected {' or '.join(SAMPLERS)}")
    return card
