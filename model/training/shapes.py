"""Signed distances of the shapes, of shape = that of x and y: negative inside, in units of the radius, y up.

A thing of several parts is a list of them, painted in order. Each part has a role in the thing's colours: `main` is the
colour that the caption says; palette.accent derives the others from it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce

import torch
from torch import Tensor

Point = tuple[float, float]
Distance = Callable[[Tensor, Tensor], Tensor]
Part = tuple[str, Distance]


def disc(x: Tensor, y: Tensor, centre: Point = (0.0, 0.0), radius: float = 1.0) -> Tensor:
    """A disc."""
    return torch.hypot(x - centre[0], y - centre[1]) - radius


def segment(x: Tensor, y: Tensor, start: Point, end: Point) -> Tensor:
    """The unsigned distance to a line from `start` to `end`."""
    dx, dy = end[0] - start[0], end[1] - start[1]
    along = (((x - start[0]) * dx + (y - start[1]) * dy) / (dx * dx + dy * dy)).clamp(0.0, 1.0)
    return torch.hypot(x - start[0] - along * dx, y - start[1] - along * dy)


def melted(first: Tensor, second: Tensor, width: float = 0.14) -> Tensor:
    """Two shapes as one, their seam rounded within `width`, so that inside there is no trace of it."""
    share = (0.5 + (second - first) / (2 * width)).clamp(0.0, 1.0)
    return torch.lerp(second, first, share) - width * share * (1 - share)


def box(x: Tensor, y: Tensor, centre: Point, half: Point, corner: float = 0.05) -> Tensor:
    """An upright rectangle with rounded corners, `half` its width and height."""
    qx, qy = (x - centre[0]).abs() - half[0] + corner, (y - centre[1]).abs() - half[1] + corner
    return torch.hypot(qx.clamp(min=0.0), qy.clamp(min=0.0)) + torch.maximum(qx, qy).clamp(max=0.0) - corner


def convex(x: Tensor, y: Tensor, corners: tuple[Point, ...], corner: float = 0.05) -> Tensor:
    """A convex polygon, its corners clockwise, grown by a rounding of `corner`."""
    sides = list(zip(corners, corners[1:] + corners[:1], strict=True))
    inside = reduce(torch.maximum, (_half_plane(x, y, *side) for side in sides))
    outside = reduce(torch.minimum, (segment(x, y, *side) for side in sides))
    return torch.where(inside < 0, inside, outside) - corner


def _half_plane(x: Tensor, y: Tensor, start: Point, end: Point) -> Tensor:
    """The distance to what lies right of a line, seen from `start` to `end`."""
    dx, dy = end[0] - start[0], end[1] - start[1]
    length = math.hypot(dx, dy)
    return (y - start[1]) * (dx / length) - (x - start[0]) * (dy / length)


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
    return box(x, y, (0.0, 0.0), (0.80, 0.80), 0.08)


def triangle(x: Tensor, y: Tensor) -> Tensor:
    """An equilateral triangle standing on its side, corners rounded."""
    tip, corner = 1.02, 0.06
    along, across = fold(x, -(y + 0.22), 3)
    apothem = tip / 2
    out = torch.hypot(along - apothem, (across - apothem * math.sqrt(3)).clamp(min=0.0))
    return torch.where(along > apothem, out, along - apothem) - corner


def star(x: Tensor, y: Tensor) -> Tensor:
    """A star of five sturdy points."""
    tip, valley, corner = 0.98, 0.49, 0.05
    along, across = fold(x, y + 0.06, 5)
    dent = valley * math.cos(math.pi / 5), valley * math.sin(math.pi / 5)
    outside = (along - tip) * dent[1] + across * (tip - dent[0]) > 0
    edge = segment(along, across, (tip, 0.0), dent)
    return torch.where(outside, edge, -edge) - corner


def heart(x: Tensor, y: Tensor) -> Tensor:
    """A heart: a square on its tip with half a disc on each upper side."""
    side, low, scale = 0.60, 0.80, 1.13
    x, y = x.abs() / scale, y / scale + low
    half = side / math.sqrt(2)
    lobe = disc(x, y, (side * 0.5, side * 1.5), half)
    tilted = box((x + y) / math.sqrt(2), (y - x) / math.sqrt(2), (half, half), (half, half), 0.0)
    return torch.minimum(lobe, tilted) * scale


def moon(x: Tensor, y: Tensor) -> Tensor:
    """A crescent, open to the right and a little upwards: a disc less another."""
    outer, inner, apart, tilt = 0.95, 0.76, 0.52, 0.32
    x, y = x - 0.05, y
    along, across = x * math.cos(tilt) + y * math.sin(tilt), (y * math.cos(tilt) - x * math.sin(tilt)).abs()
    horn = (outer**2 - inner**2 + apart**2) / (2 * apart)  # where the two circles meet
    height = math.sqrt(outer**2 - horn**2)
    rind = torch.maximum(disc(along, across, radius=outer), -disc(along, across, (apart, 0.0), inner))
    beyond = along * height - across * horn > apart * (height - across).clamp(min=0.0)
    return torch.where(beyond, torch.hypot(along - horn, across - height), rind) - 0.03


def sun(x: Tensor, y: Tensor) -> Tensor:
    """A disc with eight fat rays."""
    along, across = fold(x, y, 8)
    ray = segment(along, across, (0.78, 0.0), (0.87, 0.0)) - 0.125
    return torch.minimum(disc(x, y, radius=0.52), ray)


def cloud(x: Tensor, y: Tensor) -> Tensor:
    """Three puffs on a flat base."""
    base = segment(x, y, (-0.60, -0.32), (0.62, -0.32)) - 0.34
    puffs = melted(disc(x, y, (-0.34, 0.02), 0.43), disc(x, y, (0.24, 0.12), 0.53), 0.06)
    return melted(base, puffs, 0.10)


def petals(x: Tensor, y: Tensor) -> Tensor:
    """Five round petals."""
    along, across = fold(x, y, 5)
    return melted(disc(along, across, (0.59, 0.0), 0.37), disc(x, y, radius=0.50), 0.10)


def flower_centre(x: Tensor, y: Tensor) -> Tensor:
    """The round middle of a flower."""
    return disc(x, y, radius=0.29)


def trunk(x: Tensor, y: Tensor) -> Tensor:
    """The trunk of a tree."""
    return box(x, y, (0.0, -0.66), (0.14, 0.32))


def crown(x: Tensor, y: Tensor) -> Tensor:
    """The leaves of a tree: three puffs."""
    lower = melted(disc(x.abs(), y, (0.42, 0.00), 0.44), disc(x, y, (0.0, 0.04), 0.44))
    return melted(lower, disc(x, y, (0.0, 0.43), 0.51), 0.10)


def walls(x: Tensor, y: Tensor) -> Tensor:
    """The front of a house."""
    return box(x, y, (0.0, -0.33), (0.72, 0.57))


def roof(x: Tensor, y: Tensor) -> Tensor:
    """The roof of a house, wider than its walls."""
    return convex(x, y, ((0.0, 0.88), (0.88, 0.23), (-0.88, 0.23)))


def door(x: Tensor, y: Tensor) -> Tensor:
    """The door of a house."""
    return box(x, y, (0.0, -0.60), (0.19, 0.30), 0.04)


def slopes(x: Tensor, y: Tensor) -> Tensor:
    """A mountain of two peaks."""
    low = convex(x, y, ((0.46, 0.26), (0.94, -0.68), (-0.40, -0.68)))
    return torch.minimum(peak(x, y), low)


def peak(x: Tensor, y: Tensor) -> Tensor:
    """The higher of the mountain's peaks."""
    return convex(x, y, ((-0.20, 0.84), (0.62, -0.68), (-0.94, -0.68)))


def snow(x: Tensor, y: Tensor) -> Tensor:
    """The cap of the higher peak, its lower edge a zigzag."""
    zigzag = ((x + 0.20) * 2.2).frac().abs()
    zigzag = 0.42 - 0.34 * torch.minimum(zigzag, 1 - zigzag) - y
    return torch.maximum(peak(x, y), zigzag * 0.8)


def hull(x: Tensor, y: Tensor) -> Tensor:
    """The hull of a boat."""
    return convex(x, y, ((-0.90, -0.18), (0.90, -0.18), (0.60, -0.84), (-0.60, -0.84)), 0.06)


def sails(x: Tensor, y: Tensor) -> Tensor:
    """Two sails, the larger to the right."""
    large = convex(x, y, ((0.07, 0.88), (0.70, -0.12), (0.07, -0.12)))
    small = convex(x, y, ((-0.13, 0.58), (-0.13, -0.12), (-0.56, -0.12)))
    return torch.minimum(large, small)


PARTS: dict[str, tuple[Part, ...]] = {
    "circle": (("main", circle),),
    "square": (("main", square),),
    "triangle": (("main", triangle),),
    "star": (("main", star),),
    "heart": (("main", heart),),
    "moon": (("main", moon),),
    "sun": (("main", sun),),
    "cloud": (("main", cloud),),
    "flower": (("main", petals), ("centre", flower_centre)),
    "tree": (("wood", trunk), ("main", crown)),
    "house": (("main", walls), ("dark", roof), ("pale", door)),
    "mountain": (("main", slopes), ("pale", snow)),
    "boat": (("pale", sails), ("main", hull)),
}
