"""Latents to a small picture by one linear map: what a picture in the making will look like, for next to nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from model.vae import VAE

LONGER_SIDE = 256
"""Pixels of a preview, at most."""

PATCH, GRID = 16, 12
"""The chart that a map is fitted on: GRID x GRID patches of one colour each, PATCH pixels a side."""

_PUBLISHED = """
    -.0645  .0177  .1052    .0028  .0312  .0650    .1848  .0762  .0360    .0944  .0360  .0889
     .0897  .0506 -.0364   -.0020  .1203  .0284    .0855  .0118  .0283   -.0539  .0658  .1047
    -.0057  .0116  .0700   -.0412  .0281 -.0039    .1106  .1171  .1220   -.0248  .0682 -.0481
     .0815  .0846  .1207   -.0120 -.0055 -.0867   -.0749 -.0634 -.0456   -.1418 -.1457 -.1259
"""


@dataclass(frozen=True, eq=False)
class PreviewMap:
    """rgb = latents @ matrix + bias, in [0, 1]; the latents are clean ones as the MMDiT sees them."""

    matrix: Tensor  # shape = (channels, 3), fp32
    bias: Tensor  # shape = (3,), fp32

    def to(self, device: torch.device) -> PreviewMap:
        """The map on a device."""
        return PreviewMap(self.matrix.to(device), self.bias.to(device))

    def rgb(self, latents: Tensor) -> Tensor:
        """The preview of latents: shape = (channels, h, w) -> (h, w, 3), uint8, on the CPU; neither side over 256."""
        shrink = math.ceil(max(latents.shape[-2:]) / LONGER_SIDE)
        if shrink > 1:
            latents = F.avg_pool2d(latents[None], shrink, ceil_mode=True)[0]
        matrix, bias = self._eight_bit
        rgb = torch.addmm(bias, latents.flatten(1).T.float(), matrix).nan_to_num_(0.0).clamp_(0, 255)
        return rgb.to(torch.uint8).cpu().unflatten(0, latents.shape[1:])

    @cached_property
    def _eight_bit(self) -> tuple[Tensor, Tensor]:
        """The map to 0 … 255, half a step up since conversion cuts: few kernels, while the next step waits."""
        return 255 * self.matrix, 255 * self.bias + 0.5


def published() -> PreviewMap:
    """The map that Stability AI's reference code for SD3.5 has for the published VAE (sd3_impls.py, MIT licence)."""
    numbers = torch.tensor([float(number) for number in _PUBLISHED.split()])
    return PreviewMap(numbers.reshape(16, 3) / 2, torch.full((3,), 0.5))


@torch.inference_mode()
def fit_to(vae: VAE) -> PreviewMap:
    """The map of any other VAE, by least squares over a chart of colours that it encodes."""
    weight = vae.encoder.conv_in.weight
    chart = _chart().to(weight.device)
    latents = vae.to_model(vae.encode((2 * chart[None] - 1).to(weight.dtype))[0]).float()[0]
    target = F.avg_pool2d(chart, chart.shape[-1] // latents.shape[-1])
    columns = F.pad(latents.flatten(1).T, (0, 1), value=1.0)  # (h * w, channels + 1): the bias is one channel more
    found = torch.linalg.lstsq(columns.double().cpu(), target.flatten(1).T.double().cpu()).solution
    return PreviewMap(found[:-1].float(), found[-1].float()).to(weight.device)


def _chart() -> Tensor:
    """Patches of colours from all over the cube, every other one a corner of it; shape = (3, h, w), in [0, 1]."""
    colours = torch.rand(3, GRID * GRID, generator=torch.Generator().manual_seed(0))
    colours[:, ::2] = colours[:, ::2].round()  # white paper is commoner than a random colour
    return colours.reshape(3, GRID, GRID).repeat_interleave(PATCH, 1).repeat_interleave(PATCH, 2)
