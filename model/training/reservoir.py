"""Encoded pictures on the device, drawn from at random: each is trained on a few times, with other noise each time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from model.training.feed import Batch, Feed
from model.training.loop import Leg
from model.training.plan import Size
from model.training.sources import Frame, Source
from model.vae import VAE

Tokens = tuple[Tensor, ...]
"""Of each encoder, shape = (batch, length)."""


class Encoder:
    """Pictures as latents."""

    def __init__(self, source: Source, vae: VAE, leg: Leg) -> None:
        self.source, self.vae, self.leg = source, vae, leg

    @torch.no_grad()
    def __call__(self, batch: Batch, frame: Frame) -> Tensor:
        """Latents as the MMDiT sees them, float32; shape = (batch, 16, h/8, w/8)."""
        return self.encode(self.paint(batch, frame))

    def paint(self, batch: Batch, frame: Frame) -> Tensor:
        """The pictures, shape = (batch, 3, h, w)."""
        return self.source.pixels(batch.rows, frame, self.leg.device).contiguous(memory_format=torch.channels_last)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Their latents."""
        with self.leg.autocast():
            moments = self.vae.encoder(pixels)
        return self.vae.to_model(moments.chunk(2, dim=1)[0].float()).contiguous()


@dataclass
class _Ring:
    """The pictures of one size; new ones take the place of the oldest."""

    latents: Tensor  # shape = (capacity, 16, h/8, w/8), 16 bit
    tokens: Tokens  # shape = (capacity, length)
    filled: int = 0
    next: int = 0
    owed: float = 0.0  # new pictures that the draws so far are worth

    def add(self, latents: Tensor, tokens: Tokens) -> None:
        capacity, count = len(self.latents), len(latents)
        start = self.next if self.next + count <= capacity else 0
        self.latents[start : start + count] = latents
        for kept, ids in zip(self.tokens, tokens, strict=True):
            kept[start : start + count] = ids.to(kept.device, non_blocking=True)
        self.filled = max(self.filled, start + count)
        self.next = start + count


class Reservoir:
    """Latents and captions' tokens on the device, for each size.

    reuse : how often a picture is drawn in the mean
    limit : bytes of device memory for all sizes together
    sizes : how many there are to share it
    """

    BATCHES = 32  # of each size at most: enough that the pictures of a batch do not meet again soon
    EARLY = 8  # batches that are all new when a size begins

    def __init__(self, encoder: Encoder, feed: Feed, reuse: float, limit: int, sizes: int) -> None:
        if reuse < 1:
            raise ValueError(f"reuse is {reuse}, expected 1 or more")
        self.encoder, self.feed, self.reuse, self.limit = encoder, feed, reuse, limit // max(1, sizes)
        self.rings: dict[Size, _Ring] = {}

    def take(self, size: Size) -> tuple[Tensor, Tokens]:
        """A batch at random: latents, float32, shape = (batch, 16, h/8, w/8), and tokens, int64."""
        ring = self.rings.get(size)
        fresh = ring is None or ring.filled < min(len(ring.latents), self.EARLY * size.batch)
        if ring:
            ring.owed += size.batch / self.reuse
        if fresh or (ring and ring.owed >= size.batch):
            ring = self._replenish(size)
        assert ring is not None
        # Of a ring with one batch this is a permutation: every picture once.
        chosen = torch.randperm(ring.filled, device=ring.latents.device)[: size.batch]
        return ring.latents[chosen].float(), tuple(ids[chosen].long() for ids in ring.tokens)

    def _replenish(self, size: Size) -> _Ring:
        batch = self.feed.take(size.batch, size.frame)
        latents = self.encoder(batch, size.frame)
        if size not in self.rings:
            self.rings[size] = self._new_ring(size, latents, batch)
        ring = self.rings[size]
        ring.owed = max(0.0, ring.owed - size.batch)
        ring.add(latents, batch.tokens)
        return ring

    def _new_ring(self, size: Size, latents: Tensor, batch: Batch) -> _Ring:
        each = 2 * latents[0].numel() + sum(4 * ids[0].numel() for ids in batch.tokens)
        batches = min(self.BATCHES, max(1, self.limit // (each * size.batch)))
        capacity = size.batch * (1 if self.reuse == 1 else batches)
        tokens = tuple(ids.new_empty((capacity, *ids.shape[1:]), device=latents.device) for ids in batch.tokens)
        return _Ring(latents.new_empty((capacity, *latents.shape[1:]), dtype=torch.float16), tokens)
