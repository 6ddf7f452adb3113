"""Signed distances of the shapes, of shape = that of x and y: negative inside, in units of the radius, y up."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Distance = Callable[[Tensor, Tensor], Tensor]


def disc(x: Tensor, y: Tensor, centre: tuple[float, float] = (0.0, 0.0), radius: float = 1.0) -> Tensor:
    """A disc."""
    return torch.hypot(x - centre[0], y - centre[1]) - radius


def segment(x: Tensor, y: Tensor, start: tuple[float, float], end: tuple[float, float]) -> Tensor:
    """The unsigned distance to a line from `start` to `end`."""
    dx, dy = end[0] - start[0], end[1] - start[1]
    along = (((x - start[0]) * dx + (y - start[1]) * dy) / (dx * dx + dy * dy)).clamp(0.0, 1.0)
    return torch.hypot(x - start[0] - along * dx, y - start[1] - along * dy)


def fold(x: Tensor, y: Tensor, sectors: int) -> tuple[Tensor, Tensor]:
    """The point turned into the sector around the upward axis, mirrored: (along the axis, across it and >= 0)."""
    width = 2 * math.pi / sectors
    angle = torch.atan2(x, y)
    angle = (angle - width * torch.round(angle / width)).abs()
    reach = torch.hypot(x, y)
    return reach * torch.cos(angle), reach * torch.sin(angle)


def circle(x: Tensor, y: Tensor) -> Tensor:
    """A circle, a little smaller than its radius so that it weighs no more than the others."""
    return disc(x, y, radius=0.92)


def square(x: Tensor, y: Tensor) -> Tensor:
    """A square with slightly rounded corners."""
    half, corner = 0.80, 0.10
    qx, qy = x.abs() - half + corner, y.abs() - half + corner
    return torch.hypot(qx.clamp(min=0.0), qy.clamp(min=0.0)) + torch.maximum(qx, qy).clamp(max=0.0) - corner


def triangle(x: Tensor, y: Tensor) -> Tensor:
    """An equilateral triangle standing on its side, corners rounded."""
    tip, corner = 0.98, 0.07
    along, across = fold(x, -(y + 0.20), 3)
    apothem = tip / 2
    out = torch.hypot(along - apothem, (across - apothem * math.sqrt(3)).clamp(min=0.0))
    return torch.where(along > apothem, out, along - apothem) - corner


def star(x: Tensor, y: Tensor) -> Tensor:
    """A star of five points."""
    tip, valley, corner = 0.98, 0.46, 0.045
    along, across = fold(x, y + 0.06, 5)
    dent = valley * math.cos(math.pi / 5), valley * math.sin(math.pi / 5)
    outside = (along - tip) * dent[1] + across * (tip - dent[0]) > 0
    edge = segment(along, across, (tip, 0.0), dent)
    return torch.where(outside, edge, -edge) - corner


def heart(x: Tensor, y: Tensor) -> Tensor:
    """A heart: a square on its tip with half a disc on each upper side."""
    grown, low, radius = 0.60, 0.88, 0.60 / math.sqrt(2)
    x, y = x.abs() / 1.02, (y + low) / 1.02
    lobe = disc(x, y, (grown * 0.5 * 1.0, grown * 1.5), radius)
    fx, fy = (x + y - grown) / math.sqrt(2), (y - x - grown) / math.sqrt(2)
    half = grown / math.sqrt(2)
    bx, by = fx.abs() - half, fy.abs() - half
    box = torch.hypot(bx.clamp(min=0.0), by.clamp(min=0.0)) + torch.maximum(bx, by).clamp(max=0.0)
    return torch.minimum(lobe, box) * 1.02


def moon(x: Tensor, y: Tensor) -> Tensor:
    """A crescent, open to the right."""
    return torch.maximum(disc(x, y, (0.08, 0.0), 0.95), -disc(x, y, (0.52, 0.14), 0.78))


def sun(x: Tensor, y: Tensor) -> Tensor:
    """A disc with twelve rays."""
    along, across = fold(x, y, 12)
    ray = segment(along, across, (0.76, 0.0), (0.93, 0.0)) - 0.065
    return torch.minimum(disc(x, y, radius=0.56), ray)


def cloud(x: Tensor, y: Tensor) -> Tensor:
    """Three puffs on a flat base."""
    base = segment(x, y, (-0.62, -0.30), (0.62, -0.30)) - 0.32
    puffs = torch.minimum(disc(x, y, (-0.30, 0.02), 0.40), disc(x, y, (0.24, 0.14), 0.48))
    return torch.minimum(base, puffs)


def flower(x: Tensor, y: Tensor) -> Tensor:
    """Six round petals."""
    along, across = fold(x, y, 6)
    return torch.minimum(disc(along, across, (0.60, 0.0), 0.345), disc(x, y, radius=0.45))


def flower_centre(x: Tensor, y: Tensor) -> Tensor:
    """The round middle of a flower."""
    return disc(x, y, radius=0.27)


DISTANCES: dict[str, Distance] = {
    "circle": circle, "square": square, "triangle": triangle, "star": star, "heart": heart, "moon": moon, "sun": sun,
    "cloud": cloud, "flower": flower,
}  # fmt: skip
