"""The loss on held-out pictures at fixed noise levels, by which runs of other settings can be compared."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from model.training.feed import Batch, Captioned
from model.training.loop import Average, Leg
from model.training.net import FlowNet
from model.training.reservoir import Encoder
from model.training.sources import HELD_OUT_SEEDS, Frame, Source

SIGMAS = (0.3, 0.5, 0.7, 0.85, 0.95)
FIRST_SEED = HELD_OUT_SEEDS + 5000


@dataclass(frozen=True)
class _Fixed:
    latents: Tensor
    noise: Tensor
    tokens: tuple[Tensor, ...]


class Validation:
    """`pictures` held-out ones, encoded once for each frame."""

    def __init__(self, source: Source, encoder: Encoder, leg: Leg, pictures: int) -> None:
        self.source, self.encoder, self.leg, self.pictures = source, encoder, leg, pictures
        self.fixed: dict[Frame, _Fixed] = {}

    def losses(self, net: FlowNet, average: Average, frame: Frame) -> dict[str, float]:
        """The flow matching loss of the averaged weights by sigma, and their mean."""
        if frame not in self.fixed:
            self.fixed[frame] = self._fix(net, frame)
        fixed = self.fixed[frame]
        average.swap()
        with torch.no_grad(), torch.compiler.set_stance("force_eager"), self.leg.autocast():
            context, pooled = net.tower(*fixed.tokens)
            sigmas = [torch.full((len(fixed.latents),), sigma, device=self.leg.device) for sigma in SIGMAS]
            losses = [net.loss(fixed.latents, fixed.noise, sigma, context, pooled) for sigma in sigmas]
        average.swap()
        values = torch.stack(losses).tolist()
        return {
            **{f"at_{sigma}": v for sigma, v in zip(SIGMAS, values, strict=True)},
            "mean": sum(values) / len(values),
        }

    def _fix(self, net: FlowNet, frame: Frame) -> _Fixed:
        reading = Captioned(self.source, net.reader())
        rows, *columns = reading(range(FIRST_SEED, FIRST_SEED + self.pictures), frame)
        tokens = tuple(torch.from_numpy(column) for column in columns)
        with torch.compiler.set_stance("force_eager"):
            latents = self.encoder(Batch(torch.from_numpy(rows), tokens), frame)
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0)).to(latents.device)
        return _Fixed(latents, noise, tuple(ids.to(latents.device).long() for ids in tokens))
