"""A picture as a generator of GPU work: what there is to do, and what of it can be done together."""

from __future__ import annotations

from collections.abc import Generator, Hashable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from model.embeddings import Text
from model.params import SIDE_MULTIPLE, GenerationParams
from model.sampling import SHIFT, Shift, Step, schedule
from model.text import CLIP_LENGTH, T5_LENGTH

TEXT_TOKENS = CLIP_LENGTH + T5_LENGTH
"""Of one text with the published lengths: near enough for a budget."""


class NonFiniteLatents(ArithmeticError):
    """The latents of a picture hold NaN or infinity."""


@dataclass(eq=False)
class Latents:
    """A picture in the making: a handle for its generator; only the pipeline touches the tensors."""

    x: Tensor  # shape = (16, h/8, w/8), fp32
    previous: Tensor | None = None  # the last guided prediction of the clean latents, for second-order solvers

    @property
    def shape(self) -> tuple[int, ...]:
        """(h/8, w/8)."""
        return tuple(self.x.shape[-2:])


@dataclass(frozen=True, eq=False)
class Encode:
    """Encode texts; gives one Text each."""

    stage: ClassVar[str] = "text_encode"
    shape: ClassVar[tuple[int, ...]] = ()
    prompts: tuple[str, ...]
    deterministic: bool = False

    @property
    def key(self) -> Hashable:
        """Work of equal keys can share a batch; a deterministic picture's shares none."""
        return self.stage, id(self) if self.deterministic else None

    @property
    def rows(self) -> int:
        """Rows of the batch that this takes."""
        return len(self.prompts)

    @property
    def tokens(self) -> int:
        """Tokens of all its rows."""
        return self.rows * TEXT_TOKENS


@dataclass(frozen=True, eq=False)
class Begin:
    """Draw a picture's noise; gives its Latents."""

    stage: ClassVar[str] = "noise"
    rows: ClassVar[int] = 1
    tokens: ClassVar[int] = 0  # drawn on the CPU
    deterministic: ClassVar[bool] = False  # each picture has a generator of its own in any case
    seed: int
    width: int
    height: int

    @property
    def shape(self) -> tuple[int, ...]:
        """(h/8, w/8)."""
        return self.height // 8, self.width // 8

    @property
    def key(self) -> Hashable:
        """Work of equal keys can share a batch."""
        return self.stage


@dataclass(frozen=True, eq=False)
class Denoise:
    """Take one solver step in place; gives None."""

    stage: ClassVar[str] = "denoise"
    latents: Latents
    step: Step
    text: Text
    negative: Text | None  # None: unguided
    guidance_scale: float
    deterministic: bool = False
    sigmas: tuple[float, ...] = ()  # the noise levels of the whole run, so that what they need is made together

    @property
    def shape(self) -> tuple[int, ...]:
        """(h/8, w/8)."""
        return self.latents.shape

    @property
    def key(self) -> Hashable:
        """Work of equal keys can share a batch: sigma, solver, guidance and seed may differ from row to row.

        A deterministic picture's shares none: rounding depends on how many rows there are.
        """
        alone = id(self.latents) if self.deterministic else None
        return self.stage, self.latents.x.shape, self.text.context.shape, alone

    @property
    def rows(self) -> int:
        """Rows of the batch that this takes."""
        return 1 if self.negative is None else 2

    @property
    def tokens(self) -> int:
        """Joint tokens of all its rows."""
        height, width = self.shape
        return self.rows * (image_tokens(8 * width, 8 * height) + self.text.context.shape[0])


@dataclass(frozen=True, eq=False)
class Decode:
    """Latents to 8-bit RGB; gives a tensor of shape = (h, w, 3), uint8, on the CPU."""

    stage: ClassVar[str] = "vae_decode"
    rows: ClassVar[int] = 1
    latents: Latents
    deterministic: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """(h/8, w/8)."""
        return self.latents.shape

    @property
    def key(self) -> Hashable:
        """Work of equal keys can share a batch; decoding is memory-bound and runs one by one."""
        return self.stage, id(self.latents)

    @property
    def tokens(self) -> int:
        """As many as the picture has in a denoising step."""
        height, width = self.shape
        return image_tokens(8 * width, 8 * height)


Work = Encode | Begin | Denoise | Decode


@dataclass(frozen=True, eq=False)
class Rendering:
    """A finished picture, before it is a file."""

    pixels: Tensor  # shape = (h, w, 3), uint8, on the CPU
    warnings: tuple[str, ...] = ()


def image_tokens(width: int, height: int) -> int:
    """What a picture of so many pixels is to the MMDiT."""
    return (width // SIDE_MULTIPLE) * (height // SIDE_MULTIPLE)


def generate(
    params: GenerationParams, shift: Shift = SHIFT, *, deterministic: bool = False
) -> Generator[Work, Any, Rendering]:
    """One picture, as the work it needs: send each work's result, get the next work.

    deterministic : each work runs in a batch of its own, so that what runs beside it cannot change a bit
    """
    prompts = (params.prompt, params.negative_prompt) if params.guided else (params.prompt,)
    text, *rest = yield Encode(prompts, deterministic)
    negative = rest[0] if rest else None
    latents = yield Begin(params.seed, params.width, params.height)
    steps = schedule(params.sampler, params.steps, shift, image_tokens(params.width, params.height))
    sigmas = tuple(step.sigma for step in steps)
    for step in steps:
        yield Denoise(latents, step, text, negative, params.guidance_scale, deterministic, sigmas)
    pixels = yield Decode(latents, deterministic)
    return Rendering(pixels, (*text.warnings, *(f"negative: {w}" for w in (negative.warnings if negative else ()))))
