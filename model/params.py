"""What one picture is asked to be. Standard library only: the one door through which the contract sees the model."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, Self, get_args

Sampler = Literal["euler", "dpmpp_2m"]
SAMPLERS: tuple[Sampler, ...] = get_args(Sampler)

SIDE_MULTIPLE = 16
"""Pixels: the VAE halves three times, the MMDiT patches by two."""

MAX_SEED = 2**53 - 1
"""The largest integer that JSON readers keep exactly."""


class InvalidParams(ValueError):
    """A parameter that the model cannot follow; names the field, the value and what is allowed."""

    def __init__(self, field: str, value: object, allowed: str) -> None:
        super().__init__(f"{field} is {value!r}; allowed: {allowed}")
        self.field, self.value, self.allowed = field, value, allowed


@dataclass(frozen=True, kw_only=True)
class GenerationParams:
    """The options of one picture, all resolved: same params, same model, same picture (up to rounding)."""

    prompt: str
    width: int  # pixels, a multiple of 16
    height: int  # pixels, a multiple of 16
    steps: int  # denoising steps, at least 1
    guidance_scale: float  # classifier-free guidance; at most 1 means one unguided row a step
    seed: int  # of this picture's own noise
    negative_prompt: str = ""
    sampler: Sampler = "euler"

    def __post_init__(self) -> None:
        for field in ("width", "height"):
            side = getattr(self, field)
            if side < SIDE_MULTIPLE or side % SIDE_MULTIPLE:
                raise InvalidParams(field, side, f"a positive multiple of {SIDE_MULTIPLE}")
        if self.steps < 1:
            raise InvalidParams("steps", self.steps, "at least 1")
        if not (math.isfinite(self.guidance_scale) and self.guidance_scale >= 0):
            raise InvalidParams("guidance_scale", self.guidance_scale, "a finite number, at least 0")
        if not 0 <= self.seed <= MAX_SEED:
            raise InvalidParams("seed", self.seed, f"0 to {MAX_SEED}")
        if self.sampler not in SAMPLERS:
            raise InvalidParams("sampler", self.sampler, ", ".join(SAMPLERS))

    @property
    def guided(self) -> bool:
        """Whether each step runs a second row for the negative prompt."""
        return self.guidance_scale > 1

    @property
    def rows(self) -> int:
        """Rows of the network for each picture: with guidance also one without the prompt."""
        return 2 if self.guided else 1

    def nth(self, n: int) -> Self:
        """The params of picture `n` of several: seed + n."""
        return replace(self, seed=self.seed + n)
