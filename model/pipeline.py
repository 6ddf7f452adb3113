"""The pipeline that does a picture's work, batched."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from model.choices import choice_of
from model.device import on
from model.embeddings import Text
from model.fast_mmdit import Conditions, FastMMDiT
from model.fast_text import FastTextEncoders
from model.fast_vae import FastDecoder
from model.graphs import CudaRecorder, Graphs
from model.mmdit import MMDiT
from model.previews import PreviewMap, fit_to
from model.sampling import SHIFT, Shift, Step, noise
from model.text import T5_LENGTH, TextEncoders
from model.vae import VAE, channels_last
from model.work import Begin, Decode, Denoise, Encode, Latents, NonFiniteLatents, Rendering, Work

GRAPHED_PIXELS = 1024 * 1024
"""Of the largest picture whose decoding is kept as a graph, with the memory that it works in."""

T = TypeVar("T")


@dataclass
class Lookups:
    """How often a text was found in the cache, since the start."""

    hits: int = 0
    misses: int = 0


class Pipeline:
    """One loaded model: does batches of work of equal keys. For one thread."""

    def __init__(
        self,
        mmdit: MMDiT,
        vae: VAE,
        text: TextEncoders,
        *,
        shift: Shift = SHIFT,
        t5_length: int = T5_LENGTH,
        preview_map: PreviewMap | None = None,
        fast: bool | None = None,
    ) -> None:
        """fast: whether the nets go the fast way, which is the same but for rounding; absent: on CUDA they do."""
        self.mmdit, self.vae, self.text = mmdit, vae, text
        self.shift, self.t5_length = shift, t5_length
        self.lookups = Lookups()
        self.largest = (0, 0)  # width and height in pixels of the largest picture that was finished
        if self.device.type == "cpu":
            channels_last(self.vae)  # 1.5 times as fast there; slower on CUDA
        self._fast = _Fast(mmdit, vae, text) if (self.device.type == "cuda" if fast is None else fast) else None
        self._preview_map = preview_map  # None: fitted to the VAE when it is first needed

    @property
    def device(self) -> torch.device:
        """Where the MMDiT lives."""
        return self.mmdit.pos_embed.device

    @property
    def dtype(self) -> torch.dtype:
        """What the MMDiT computes in."""
        return self.mmdit.context_embedder.weight.dtype

    @property
    def way(self) -> str:
        """Which way its nets go: two ways round differently."""
        if self._fast is None:
            return "plain"
        return "fast" if self._fast.text.resident else "fast, texts plain"

    @torch.inference_mode()
    def prepare(self) -> None:
        """Compile what a picture of any size may need, where there is a compiler to wait for."""
        if self._fast and self.device.type == "cuda":
            with on(self.device):
                self._fast.decoder.prepare()

    @property
    def ahead(self) -> bool:
        """Whether `run` may return before its work is done. `settle` waits; more work may be asked for before."""
        return self.device.type == "cuda"

    def settle(self) -> None:
        """Wait for the device, so that errors and times belong to the work that made them."""
        if self.ahead:
            torch.cuda.synchronize(self.device)

    @torch.inference_mode()
    def run(self, batch: Sequence[Work], max_rows: int | None = None) -> list[Any]:
        """The results of works of one key, in order; a work that alone went wrong has its exception as result.

        max_rows : rows of one pass through the MMDiT or the encoders, where memory is short; absent: all at once
        """
        do: dict[type, Callable[[Any], list[Any]]] = {
            Encode: lambda batch: self._encode(batch, max_rows),
            Begin: self._begin,
            Denoise: lambda batch: self._denoise(batch, max_rows),
            Decode: self._decode,
        }
        with on(self.device), _fixed_kernels(batch[0].deterministic):
            return do[type(batch[0])](batch)

    @torch.inference_mode()
    def preview(self, latents: Latents) -> Tensor:
        """What a picture in the making will look like, small; shape = (h, w, 3), uint8, on the CPU, sides to 256."""
        with on(self.device):
            if self._preview_map is None:
                self._preview_map = fit_to(self.vae)
            return self._preview_map.rgb(latents.x if latents.previous is None else latents.previous)

    def _encode(self, batch: Sequence[Encode], max_rows: int | None) -> list[list[Text]]:
        alone = batch[0].deterministic
        wanted = dict.fromkeys(prompt for work in batch for prompt in work.prompts)
        keys = {prompt: (prompt, self.t5_length, alone) for prompt in wanted}
        texts = {prompt: text for prompt, key in keys.items() if (text := self.text.cache.get(key)) is not None}
        missing = [prompt for prompt in wanted if prompt not in texts]
        self.lookups.hits += len(texts)
        self.lookups.misses += len(missing)
        size = 1 if alone else max_rows or max(1, len(missing))
        encode = self._fast.text.encode if self._fast else self.text.encode
        for i in range(0, len(missing), size):
            together = missing[i : i + size]
            for prompt, text in zip(together, encode(together, self.t5_length), strict=True):
                texts[prompt] = text
                self.text.cache.put(keys[prompt], text)
        return [[texts[prompt] for prompt in work.prompts] for work in batch]

    def _begin(self, batch: Sequence[Begin]) -> list[Latents]:
        channels = self.mmdit.config.in_channels
        return [Latents(noise(w.seed, w.width, w.height, channels).to(self.device)) for w in batch]

    def _denoise(self, batch: Sequence[Denoise], max_rows: int | None) -> list[None]:
        rows = [(work, text) for work in batch for text in (work.text, work.negative) if text is not None]
        size = max_rows or len(rows)
        velocities = (v for i in range(0, len(rows), size) for v in self._velocity(rows[i : i + size]))
        advanced = []
        for work in batch:
            v = next(velocities)
            if work.negative is not None:
                v_negative = next(velocities)
                v = v_negative + work.guidance_scale * (v - v_negative)
            advanced.append(_advanced(work.latents, work.step, v))
        # Only now, when nothing can fail any more: a batch that ran out of memory is run again.
        for work, (x, denoised) in zip(batch, advanced, strict=True):
            work.latents.x, work.latents.previous = x, denoised
        return [None] * len(batch)

    def _velocity(self, rows: Sequence[tuple[Denoise, Text]]) -> Tensor:
        """The MMDiT's prediction for each row; shape = (rows, 16, h/8, w/8), fp32."""
        x = torch.stack([work.latents.x for work, _ in rows])
        if self._fast:
            return self._fast.velocity(x.to(self.dtype), rows).float()
        timestep = torch.tensor([1000 * work.step.sigma for work, _ in rows], dtype=torch.float32, device=self.device)
        context = torch.stack([text.context for _, text in rows])
        pooled = torch.stack([text.pooled for _, text in rows])
        return self.mmdit(x.to(self.dtype), timestep, context.to(self.dtype), pooled.to(self.dtype)).float()

    def _decode(self, batch: Sequence[Decode]) -> list[Tensor | NonFiniteLatents]:
        return [self._decode_one(work.latents.x) for work in batch]

    def _decode_one(self, x: Tensor) -> Tensor | NonFiniteLatents:
        if not torch.isfinite(x).all():
            return NonFiniteLatents("the latents became NaN or infinite; a lower guidance_scale may help")
        to_pixels = self._fast.to_pixels if self._fast else self.vae.to_pixels
        pixels = to_pixels(x[None])[0].cpu()
        height, width = pixels.shape[:2]
        self.largest = max(self.largest, (width, height), key=math.prod)
        return pixels


class _Fast:
    """The fast way through the nets, by CUDA graphs where there is CUDA. What models share has its graphs once."""

    def __init__(self, mmdit: MMDiT, vae: VAE, text: TextEncoders) -> None:
        device = mmdit.pos_embed.device

        def graphs(at: torch.device = device) -> Graphs | None:
            return Graphs(CudaRecorder(at)) if at.type == "cuda" else None

        self.fast = FastMMDiT(mmdit)
        self.conditions = Conditions(self.fast)
        self.graphs = graphs()
        self.decoder, self.decoder_graphs = _once_for(vae, lambda: (FastDecoder(vae), graphs()))
        self.text = _once_for(text, lambda: FastTextEncoders(text, graphs(text.device)))

    def to_pixels(self, latents: Tensor) -> Tensor:
        """As VAE.to_pixels."""
        if self.decoder_graphs is None or latents[:, 0].numel() > GRAPHED_PIXELS // 64:
            return self.decoder.decode(latents)
        key = (latents.shape, latents.dtype, torch.backends.cudnn.deterministic)
        return self.decoder_graphs.run(key, self.decoder.decode, latents)

    def velocity(self, x: Tensor, rows: Sequence[tuple[Denoise, Text]]) -> Tensor:
        """As the MMDiT gives it; shape = (rows, 16, h/8, w/8), in and out."""
        modulation = torch.stack([self.conditions.modulation(text, w.step.sigma, w.sigmas) for w, text in rows])
        context = torch.stack([self.conditions.context(text) for _, text in rows])
        choice = choice_of(self.fast, x)
        run = partial(self.fast, choice=choice)
        if self.graphs is None:
            return run(x, modulation, context)
        key = (x.shape, context.shape, choice, rows[0][0].deterministic)
        return self.graphs.run(key, run, x, modulation, context)


def _once_for(owner: object, make: Callable[[], T]) -> T:
    """What goes with a net that several models may share."""
    held: dict[str, Any] = vars(owner)
    if "_fast" not in held:
        held["_fast"] = make()
    made: T = held["_fast"]
    return made


@contextmanager
def _fixed_kernels(wanted: bool) -> Iterator[None]:
    """Convolutions by kernels that the shapes alone decide, and that add in a fixed order, if so wanted.

    Nothing else here needs it: forward passes of matrix products, attention and norms are repeatable on one kind of
    GPU, and no other kernel is chosen by timing. The switches are global; one thread owns the GPU.
    """
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    if wanted:
        cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before


def _advanced(latents: Latents, step: Step, velocity: Tensor) -> tuple[Tensor, Tensor]:
    """The latents after one solver step, and the prediction of the clean ones that it took, in fp32."""
    denoised = latents.x - step.sigma * velocity
    x = step.keep * latents.x + step.denoised * denoised
    if step.previous and latents.previous is not None:
        x = x + step.previous * latents.previous
    return x, denoised


def run(
    generator: Generator[Work, Any, Rendering], pipeline: Pipeline, did: Callable[[Work], None] | None = None
) -> Rendering:
    """Drive one picture alone; `did` hears of each work when it is done."""
    result = None
    while True:
        try:
            work = generator.send(result)
        except StopIteration as end:
            return end.value
        (result,) = pipeline.run([work])
        if did:
            did(work)
        if isinstance(result, Exception):
            result = generator.throw(result)  # raises here, unless the generator knows better
