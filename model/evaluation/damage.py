"""Spoils drawings: a little, so that the checker forgives what a good model does, and badly, so that it sees blobs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model.training.drawing import MAX_THINGS

WAVES = 6  # sines a field


@dataclass(frozen=True)
class Poses:
    """Where the things of pictures lie, on the device: x and y from -1 to 1, radii in half shorter sides.

    shape = (batch, MAX_THINGS); the radius of a thing that is not there is 0.
    """

    x: Tensor
    y: Tensor
    radius: Tensor

    def rows(self, rows: Tensor) -> Poses:
        """Of some of the pictures."""
        return Poses(self.x[rows], self.y[rows], self.radius[rows])


@dataclass(frozen=True)
class Field:
    """How a warp's field looks, each a tensor of shape = (batch, MAX_THINGS) on the device.

    low, high : bounds of the waves' frequencies, in radians a radius
    block : side of the blocks that move as one, in radii; 0 for a smooth field
    """

    low: Tensor
    high: Tensor
    block: Tensor


def local(poses: Poses, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Pixels' places as each thing sees them, in its radii, y down. shape = (batch, MAX_THINGS, height, width)."""
    device, short = poses.x.device, min(height, width)
    column = (2 * torch.arange(width, device=device) + 1 - width) / short
    row = (2 * torch.arange(height, device=device)[:, None] + 1 - height) / short
    radius = poses.radius.clamp(min=1e-3)[:, :, None, None]
    across = (column - poses.x[:, :, None, None] * (width / short)) / radius
    down = (row - poses.y[:, :, None, None] * (height / short)) / radius
    return torch.broadcast_tensors(across, down)  # type: ignore[return-value]


def waves(across: Tensor, down: Tensor, field: Field) -> Tensor:
    """A random field of mean 0 and about unit spread. shape = that of `across`, (batch, MAX_THINGS, height, width)."""
    block = field.block[:, :, None, None]
    blocky, safe = block > 0, block.clamp(min=1e-3)
    across, down = (torch.where(blocky, (torch.floor(place / safe) + 0.5) * safe, place) for place in (across, down))
    total = torch.zeros_like(across)
    for _ in range(WAVES):
        frequency = torch.lerp(field.low, field.high, torch.rand_like(field.low))
        angle, phase = (2 * math.pi * torch.rand_like(frequency) for _ in range(2))
        wave = [part[:, :, None, None] for part in (frequency * angle.cos(), frequency * angle.sin(), phase)]
        total += torch.sin(wave[0] * across + wave[1] * down + wave[2])
    return total * math.sqrt(2 / WAVES)


def warp(pixels: Tensor, poses: Poses, amount: Tensor, field: Field) -> Tensor:
    """Pictures with the surroundings of each thing displaced by `amount` of its radius (root mean square).

    pixels : shape = (batch, 3, height, width); amount : shape = (batch, MAX_THINGS)
    """
    height, width = pixels.shape[-2:]
    across, down = local(poses, height, width)
    reach = (2.2 - 1.25 * torch.hypot(across, down)).clamp(0.0, 1.0) * (amount * poses.radius)[:, :, None, None]
    short = min(height, width)
    # grid_sample counts in halves of each side, the field in halves of the shorter one
    right, below = ((reach * waves(across, down, field)).sum(1) * (short / side) for side in (width, height))
    grid = F.affine_grid(torch.eye(2, 3, device=pixels.device).expand(len(pixels), 2, 3), list(pixels.shape), False)
    return F.grid_sample(pixels, grid + torch.stack([right, below], -1), "bilinear", "border", align_corners=False)


def blend(pixels: Tensor, others: Tensor, poses: Poses, wanted: Tensor) -> Tensor:
    """Pictures with wanted things patched up from others' pixels, about half and half.

    pixels, others : shape = (batch, 3, height, width); wanted : shape = (batch, MAX_THINGS), 0 or 1
    """
    across, down = local(poses, *pixels.shape[-2:])
    side = torch.ones_like(poses.radius)
    patches = waves(across, down, Field(1.8 * side, 4.5 * side, 0 * side))
    inside = (2.2 - 1.25 * torch.hypot(across, down)).clamp(0.0, 1.0) * wanted[:, :, None, None]
    share = ((0.5 + 6 * patches).clamp(0.0, 1.0) * inside).amax(1, keepdim=True)
    return torch.lerp(pixels, others, share)


def soften(pixels: Tensor, scale: float) -> Tensor:
    """Pictures that went through a smaller size, `scale` of theirs."""
    size = [max(8, round(side * scale)) for side in pixels.shape[-2:]]
    small = F.interpolate(pixels, size, mode="bilinear", antialias=True, align_corners=False)
    return F.interpolate(small, list(pixels.shape[-2:]), mode="bicubic", align_corners=False).clamp(-1, 1)


def tint(pixels: Tensor, spread: float) -> Tensor:
    """Pictures a little brighter, darker or off in colour, each by its own amount."""
    gain = 1 + spread * (2 * torch.rand(len(pixels), 1, 1, 1, device=pixels.device) - 1)
    shift = spread * (2 * torch.rand(len(pixels), 3, 1, 1, device=pixels.device) - 1)
    return (pixels * gain + shift).clamp(-1, 1)


def grain(pixels: Tensor, most: float) -> Tensor:
    """Pictures with noise, each of its own strength up to `most`."""
    strength = most * torch.rand(len(pixels), 1, 1, 1, device=pixels.device)
    return (pixels + strength * torch.randn_like(pixels)).clamp(-1, 1)


def no_field(batch: int, device: torch.device) -> Field:
    """Slow and smooth waves for all things."""
    side = torch.ones(batch, MAX_THINGS, device=device)
    return Field(0.8 * side, 2.5 * side, 0 * side)
