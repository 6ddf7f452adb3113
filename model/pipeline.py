"""A picture as a generator of GPU work, and the pipeline that does the work, batched."""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from model.mmdit import MMDiT
from model.params import GenerationParams
from model.sampling import SHIFT, Step, noise, schedule
from model.text import T5_LENGTH, Text, TextEncoders
from model.vae import VAE


class NonFiniteLatents(ArithmeticError):
    """The latents of a picture hold NaN or infinity."""


@dataclass(eq=False)
class Latents:
    """A picture in the making: a handle for its generator; only the pipeline touches the tensors."""

    x: Tensor  # shape = (16, h/8, w/8), fp32
    previous: Tensor | None = None  # the last guided prediction of the clean latents, for second-order solvers


@dataclass(frozen=True, eq=False)
class Encode:
    """Encode texts; gives one Text each."""

    stage: ClassVar[str] = "text_encode"
    prompts: tuple[str, ...]

    @property
    def key(self) -> Hashable:
        """Work of equal keys can share a batch."""
        return "encode"


@dataclass(frozen=True, eq=False)
class Begin:
    """Draw a picture's noise; gives its Latents."""

    stage: ClassVar[str] = "noise"
    seed: int
    width: int
    height: int

    @property
    def key(self) -> Hashable:
        """Work of equal keys can share a batch."""
        return "begin"


@dataclass(frozen=True, eq=False)
class Denoise:
    """Take one solver step in place; gives None."""

    stage: ClassVar[str] = "denoise"
    latents: Latents
    step: Step
    text: Text
    negative: Text | None  # None: unguided
    guidance_scale: float

    @property
    def key(self) -> Hashable:
        """Work of equal keys can share a batch: sigma, solver, guidance and seed may differ from row to row."""
        return "denoise", self.latents.x.shape, self.text.context.shape

    @property
    def rows(self) -> int:
        """Rows of the batch that this takes."""
        return 1 if self.negative is None else 2


@dataclass(frozen=True, eq=False)
class Decode:
    """Latents to 8-bit RGB; gives a tensor of shape = (h, w, 3), uint8, on the CPU."""

    stage: ClassVar[str] = "vae_decode"
    latents: Latents

    @property
    def key(self) -> Hashable:
        """Work of equal keys can share a batch; decoding is memory-bound and runs one by one."""
        return "decode", id(self.latents)


Work = Encode | Begin | Denoise | Decode


@dataclass(frozen=True, eq=False)
class Rendering:
    """A finished picture, before it is a file."""

    pixels: Tensor  # shape = (h, w, 3), uint8, on the CPU
    warnings: tuple[str, ...] = ()


def generate(params: GenerationParams, shift: float = SHIFT) -> Generator[Work, Any, Rendering]:
    """One picture, as the work it needs: send each work's result, get the next work."""
    prompts = (params.prompt, params.negative_prompt) if params.guided else (params.prompt,)
    text, *rest = yield Encode(prompts)
    negative = rest[0] if rest else None
    latents = yield Begin(params.seed, params.width, params.height)
    for step in schedule(params.sampler, params.steps, shift):
        yield Denoise(latents, step, text, negative, params.guidance_scale)
    pixels = yield Decode(latents)
    return Rendering(pixels, (*text.warnings, *(f"negative: {w}" for w in (negative.warnings if negative else ()))))


class Pipeline:
    """One loaded model: does batches of work of equal keys."""

    def __init__(
        self, mmdit: MMDiT, vae: VAE, text: TextEncoders, *, shift: float = SHIFT, t5_length: int = T5_LENGTH
    ) -> None:
        self.mmdit, self.vae, self.text = mmdit, vae, text
        self.shift, self.t5_length = shift, t5_length
        if self.device.type == "cpu":
            _channels_last(self.vae)  # 1.5 times as fast there; slower on CUDA

    @property
    def device(self) -> torch.device:
        """Where the MMDiT lives."""
        return self.mmdit.pos_embed.device

    @property
    def dtype(self) -> torch.dtype:
        """What the MMDiT computes in."""
        return self.mmdit.context_embedder.weight.dtype

    @torch.inference_mode()
    def run(self, batch: Sequence[Work]) -> list[Any]:
        """The results of works of one key, in order; a work that alone went wrong has its exception as result."""
        do: dict[type, Callable[[Any], list[Any]]] = {
            Encode: self._encode,
            Begin: self._begin,
            Denoise: self._denoise,
            Decode: self._decode,
        }
        return do[type(batch[0])](batch)

    def _encode(self, batch: Sequence[Encode]) -> list[list[Text]]:
        unique = list(dict.fromkeys(prompt for work in batch for prompt in work.prompts))
        texts = dict(zip(unique, self.text.encode(unique, self.t5_length), strict=True))
        return [[texts[prompt] for prompt in work.prompts] for work in batch]

    def _begin(self, batch: Sequence[Begin]) -> list[Latents]:
        channels = self.mmdit.config.in_channels
        return [Latents(noise(w.seed, w.width, w.height, channels).to(self.device)) for w in batch]

    def _denoise(self, batch: Sequence[Denoise]) -> list[None]:
        rows = [(work, text) for work in batch for text in (work.text, work.negative) if text is not None]
        velocities = iter(self._velocity(rows))
        for work in batch:
            v = next(velocities)
            if work.negative is not None:
                v_negative = next(velocities)
                v = v_negative + work.guidance_scale * (v - v_negative)
            _advance(work.latents, work.step, v)
        return [None] * len(batch)

    def _velocity(self, rows: Sequence[tuple[Denoise, Text]]) -> Tensor:
        """The MMDiT's prediction for each row; shape = (rows, 16, h/8, w/8), fp32."""
        x = torch.stack([work.latents.x for work, _ in rows])
        timestep = torch.tensor([1000 * work.step.sigma for work, _ in rows], dtype=torch.float32, device=self.device)
        context = torch.stack([text.context for _, text in rows])
        pooled = torch.stack([text.pooled for _, text in rows])
        return self.mmdit(x.to(self.dtype), timestep, context.to(self.dtype), pooled.to(self.dtype)).float()

    def _decode(self, batch: Sequence[Decode]) -> list[Tensor | NonFiniteLatents]:
        return [self._decode_one(work.latents.x) for work in batch]

    def _decode_one(self, x: Tensor) -> Tensor | NonFiniteLatents:
        if not torch.isfinite(x).all():
            return NonFiniteLatents("the latents became NaN or infinite; a lower guidance_scale may help")
        return self.vae.to_pixels(x[None])[0].cpu()


def _channels_last(module: torch.nn.Module) -> None:
    """Lay out the weights of every convolution with the channels last."""
    for parameter in module.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)


def _advance(latents: Latents, step: Step, velocity: Tensor) -> None:
    """One solver step in place, in fp32."""
    denoised = latents.x - step.sigma * velocity
    x = step.keep * latents.x + step.denoised * denoised
    if step.previous and latents.previous is not None:
        x = x + step.previous * latents.previous
    latents.x, latents.previous = x, denoised


def run(generator: Generator[Work, Any, Rendering], pipeline: Pipeline) -> Rendering:
    """Drive one picture alone."""
    result = None
    while True:
        try:
            work = generator.send(result)
        except StopIteration as end:
            return end.value
        (result,) = pipeline.run([work])
        if isinstance(result, Exception):
            result = generator.throw(result)  # raises here, unless the generator knows better
