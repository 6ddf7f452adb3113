"""Paints what is behind the things: plain, gradient, night, sea and meadow."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

from model.training.canvas import Canvas, colour, column, over, tint
from model.training.palette import RGB, mix, tone
from model.training.scenes import KINDS, LANDSCAPES, SKY, Background

STARS = 29  # different ones; more where the picture is wide
_DICE = 2 * STARS  # numbers from 0 to 1 that place stars, waves and hills
_FIRST = 8  # of the dice, after the kind, two colours and the horizon
WIDTH = _FIRST + _DICE
"""Numbers that one packed background takes."""


def pack_background(background: Background) -> list[float]:
    """A background as WIDTH numbers, the first of them its kind."""
    top: RGB = (0.0, 0.0, 0.0)
    bottom = top
    if background.kind == "plain":
        top = bottom = tone(background.colour, background.tone)
    elif background.kind == "gradient":
        top, bottom = tone(background.colour), tone(background.second)
    dice = [0.0] * _DICE
    if background.kind in LANDSCAPES:
        roll = Random(background.seed).random
        dice = [roll() for _ in dice]
    return [KINDS.index(background.kind), *top, *bottom, background.horizon, *dice]


Painter = Callable[[Canvas, Tensor], Tensor]
"""A background's rgb, 0 to 1, from its canvas and numbers. shape = (batch, 3, height or 1, width or 1)."""


def _plain(_: Canvas, numbers: Tensor) -> Tensor:
    return colour(numbers, 1)


def _gradient(canvas: Canvas, numbers: Tensor) -> Tensor:
    down = (canvas.y / canvas.down / 1.9 + 0.5).clamp(0.0, 1.0)[:, None]
    return over(colour(numbers, 1), colour(numbers, 4), down)


def _night(canvas: Canvas, numbers: Tensor) -> Tensor:
    """Stars over dark hills."""
    top, bottom, hills = LANDSCAPES["night"]
    down = (canvas.y / canvas.down / 2 + 0.5)[:, None]
    sky = over(tint(top, numbers), tint(bottom, numbers), down * down * 1.2)
    sky = over(sky, tint((1.0, 0.96, 0.82), numbers), _starlight(canvas, numbers))
    edge = (
        column(numbers, 7) * canvas.down + 0.05 * _wave(canvas, numbers, 0, 1.9) + 0.02 * _wave(canvas, numbers, 1, 4.3)
    )
    return over(sky, tint(hills, numbers), canvas.coverage(edge - canvas.y))


def _starlight(canvas: Canvas, numbers: Tensor) -> Tensor:
    """Small round stars, at most one in each square of a grid. shape = (batch, 1, height, width)."""
    square = 0.36
    left, top = (torch.floor((at + half) / square) for at, half in ((canvas.x, canvas.across), (canvas.y, canvas.down)))
    star = (left * 5 + top * 12).remainder(STARS).long()
    dice = numbers[:, _FIRST:WIDTH].reshape(-1, 2, STARS)
    along, below = (dice[:, n].gather(1, star.flatten(1)).view(star.shape) for n in range(2))
    size = (7 * along + 5 * below).frac()
    x = canvas.place((left + 0.2 + 0.6 * along) * square - canvas.across, canvas.across)
    y = canvas.place((top + 0.2 + 0.6 * below) * square - canvas.down, canvas.down)
    place = torch.hypot(canvas.x - x, canvas.y - y)
    light = canvas.coverage(place - 0.027 * size)
    return light * (0.45 + 0.5 * size)[:, None] * (size > 0.4)[:, None]


def _wave(canvas: Canvas, numbers: Tensor, die: int, length: float) -> Tensor:
    """A wave from left to right with a phase by chance. shape = (batch, 1, width)."""
    return torch.sin(canvas.x * length + column(numbers, _FIRST + die) * (2 * math.pi))


@dataclass(frozen=True)
class _Layers:
    """Paper-cut layers from the horizon down: of which landscape, how many, how high and long their waves are."""

    kind: str
    count: int
    height: float
    waves: float


_SEA = _Layers("sea", 4, 0.022, 7.0)
_MEADOW = _Layers("meadow", 3, 0.075, 1.7)


def _paint_layers(canvas: Canvas, numbers: Tensor, layers: _Layers) -> Tensor:
    _, first, last = LANDSCAPES[layers.kind]
    high, low = mix(SKY, (0.35, 0.64, 0.93), 0.45), mix(SKY, (1.0, 1.0, 1.0), 0.5)
    down = (canvas.y / canvas.down + 1)[:, None] / 1.5
    rgb = over(tint(high, numbers), tint(low, numbers), down.clamp(0.0, 1.0))
    horizon = column(numbers, 7)
    for n in range(layers.count):
        level = horizon + (1.0 - horizon) * n / layers.count
        edge = level * canvas.down + layers.height * _wave(canvas, numbers, n, layers.waves * (1 + 0.13 * n))
        shade = mix(first, last, n / (layers.count - 1))
        rgb = over(rgb, tint(shade, numbers), canvas.coverage(edge - canvas.y))
    return rgb


def _sea(canvas: Canvas, numbers: Tensor) -> Tensor:
    return _paint_layers(canvas, numbers, _SEA)


def _meadow(canvas: Canvas, numbers: Tensor) -> Tensor:
    return _paint_layers(canvas, numbers, _MEADOW)


PAINTERS: dict[str, Painter] = {
    "plain": _plain,
    "gradient": _gradient,
    "night": _night,
    "sea": _sea,
    "meadow": _meadow,
}
