"""The five styles: what each makes of the signed distances of a picture's things, and of what is behind them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from model.training.canvas import Canvas, column, over, tint
from model.training.palette import PAPER
from model.training.scenes import CELLS, KINDS, LINE_WASH


@dataclass(frozen=True)
class Figures:
    """The things of each picture, all in one, as seen from each pixel. In the canvas' unit.

    distance : to the nearest thing's outline, negative inside. shape = (batch, height, width)
    depth : how far inside its part a pixel lies, so that roof and walls each have a rim; negative outside
    fill : the colour there, 0 to 1. shape = (batch, 3, height, width)
    """

    distance: Tensor
    depth: Tensor
    fill: Tensor

    def slice(self, start: int, stop: int) -> Figures:
        """Of some of the pictures."""
        return Figures(self.distance[start:stop], self.depth[start:stop], self.fill[start:stop])


@dataclass(frozen=True)
class Sheet:
    """What a style works on: pixels, what is painted so far, the things (at their place and moved by each of the
    style's offsets), and numbers a picture.

    scale : the radius of each picture's largest thing. shape = (batch, 1, 1)
    texture : TEXTURE numbers from 0 to 1, by chance. shape = (batch, TEXTURE)
    kind : the background's, as an index into scenes.KINDS. shape = (batch, 1, 1)
    """

    canvas: Canvas
    below: Tensor
    figures: tuple[Figures, ...]
    scale: Tensor
    texture: Tensor
    kind: Tensor


TEXTURE = 5


def flat(sheet: Sheet) -> Tensor:
    """Plain areas."""
    things = sheet.figures[0]
    return over(sheet.below, things.fill, sheet.canvas.coverage(things.distance))


def line(sheet: Sheet) -> Tensor:
    """Outlines in the thing's colour, thicker around large things; a landscape is a pale wash on paper."""
    canvas, things = sheet.canvas, sheet.figures[0]
    pale = (sheet.kind >= KINDS.index("sea"))[:, None] * LINE_WASH
    below = over(sheet.below, tint(PAPER, sheet.texture), pale)
    thick = 0.024 + 0.036 * sheet.scale
    return over(below, things.fill, canvas.coverage(torch.maximum(things.distance, things.depth - thick)))


def pixel(sheet: Sheet) -> Tensor:
    """Cells instead of pixels (the canvas has them already), a darker rim at each thing's edge."""
    things = sheet.figures[0]
    rim = sheet.canvas.coverage(-1.9 / CELLS - things.distance)
    rgb = over(things.fill, things.fill * 0.76, rim)
    return over(sheet.below, rgb, sheet.canvas.coverage(things.distance))


def watercolour(sheet: Sheet) -> Tensor:
    """Washes on paper: uneven pigment, edges that wobble and are darker."""
    canvas, things = sheet.canvas, sheet.figures[0]
    wash, wobble = _pigment(canvas, sheet.texture)
    paper = tint(PAPER, sheet.texture)
    frame = torch.minimum(canvas.across - canvas.x.abs(), canvas.down - canvas.y.abs())
    frame = canvas.coverage(0.03 + 0.8 * wobble - frame)
    below = over(paper, _washed(sheet.below, 0.95 + 0.24 * wash), frame)
    distance = things.distance + wobble
    edge = torch.exp(-(things.depth.abs() - wobble).abs() / 0.016)[:, None]
    pigment = _washed(things.fill, 0.95 + 0.24 * wash) * (1 - 0.26 * edge)
    return over(below, pigment, canvas.coverage(distance))


def _washed(rgb: Tensor, pigment: Tensor) -> Tensor:
    """A colour where more or less pigment lies than one layer: light is absorbed by Beer's law."""
    return rgb.clamp(min=0.02) ** pigment[:, None]


def _pigment(canvas: Canvas, texture: Tensor) -> tuple[Tensor, Tensor]:
    """How much pigment lies where, from -1 to 1, and how far edges stray. shape = (batch, height, width)."""
    phase = [column(texture, n) * (2 * math.pi) for n in range(TEXTURE)]
    x, y = canvas.x, canvas.y
    slow = torch.sin(2.3 * x + 1.4 * y + phase[0])
    turned = torch.sin(-1.9 * x + 3.1 * y + phase[1] + 1.6 * slow)
    quick = torch.sin(4.7 * x + 3.9 * y + phase[2] + 1.9 * turned)
    stray = torch.sin(11 * x + 5 * y + phase[3] + 3 * turned) * torch.sin(-6 * x + 12 * y + phase[4] + 3 * slow)
    return 0.3 * slow + 0.35 * turned + 0.35 * quick, 0.013 * stray


LIGHT = (-0.60, -0.80)  # where the light comes from, in the picture's plane, y down
_PROBE = 0.14
_THROW = 0.10


def shaded(sheet: Sheet) -> Tensor:
    """Inflated things, lit from the top left, that throw a soft shadow on what is behind them."""
    canvas = sheet.canvas
    things, lit, thrown = sheet.figures
    wide = 0.9 * sheet.scale
    height = _height(things.depth / wide)
    slope = (height - _height(lit.depth / wide)) * (wide / (_PROBE * sheet.scale))
    facing = (slope * height.clamp(min=0.25)).clamp(-1.0, 1.0)
    light = (0.30 * facing + 0.55 * height)[:, None]
    rgb = things.fill * (0.68 + 0.5 * light)
    gloss = torch.exp(-((facing - 0.55) ** 2 + (height - 0.84) ** 2) / 0.012)[:, None]
    rgb = over(rgb, torch.ones_like(rgb), 0.55 * gloss).clamp(0.0, 1.0)
    fall = (0.5 - thrown.distance / (0.5 * sheet.scale)).clamp(0.0, 1.0)
    below = sheet.below * (1 - 0.42 * fall * fall * (3 - 2 * fall))[:, None]
    return over(below, rgb, canvas.coverage(things.distance))


def _height(depth: Tensor) -> Tensor:
    """Of a round pillow, 0 at the edge to 1 on top."""
    rest = 1 - depth.clamp(0.0, 1.0)
    return torch.sqrt(1 - rest * rest)


Offset = tuple[float, float]


@dataclass(frozen=True)
class Style:
    """How to paint, and from which offsets (in scales, right and down) the things are seen besides."""

    paint: Callable[[Sheet], Tensor]
    offsets: tuple[Offset, ...] = ()


PAINTERS: dict[str, Style] = {
    "flat": Style(flat),
    "line": Style(line),
    "pixel": Style(pixel),
    "watercolour": Style(watercolour),
    "shaded": Style(shaded, ((LIGHT[0] * _PROBE, LIGHT[1] * _PROBE), (LIGHT[0] * _THROW, LIGHT[1] * _THROW))),
}
