"""Paints scenes in batches on any device: every shape is a signed distance, so edges are smooth at any size."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from random import Random

import torch
from torch import Tensor

from model.training.palette import COLOURS, RGB, mix, tone
from model.training.scenes import LANDSCAPES, SHAPES, SKY, Background, Scene
from model.training.shapes import DISTANCES, flower_centre

KINDS = ("plain", "gradient", *LANDSCAPES)
MAX_THINGS = 3
PIXELS_AT_ONCE = 1 << 24
"""Pictures are painted in groups of at most so many pixels: about 2 GB of temporaries."""

_THING = 8  # shape, x, y, radius, turn, red, green, blue
_DICE = 78  # numbers from 0 to 1 that place stars, waves and hills: three a star
_BACKGROUND = 8 + _DICE  # kind, two colours, horizon, dice
WIDTH = _BACKGROUND + MAX_THINGS * _THING
"""Numbers that one packed scene takes."""


def pack(scenes: Sequence[Scene]) -> Tensor:
    """Scenes as numbers, on the CPU: cheap to send between processes. shape = (scenes, WIDTH)."""
    return torch.tensor([_pack_one(scene) for scene in scenes], dtype=torch.float32)


def _pack_one(scene: Scene) -> list[float]:
    row = _pack_background(scene.background)
    for thing in scene.things:
        row += [SHAPES.index(thing.shape), thing.x, thing.y, thing.radius, thing.turn, *thing.rgb]
    return row + [-1.0] * (WIDTH - len(row))


def _pack_background(background: Background) -> list[float]:
    top: RGB = (0.0, 0.0, 0.0)
    bottom = top
    if background.kind == "plain":
        top = bottom = tone(background.colour, background.tone)
    elif background.kind == "gradient":
        top, bottom = tone(background.colour), tone(background.second)
    dice = [0.0] * _DICE
    if background.kind in LANDSCAPES:
        rng = Random(background.seed)
        dice = [rng.random() for _ in dice]
    return [KINDS.index(background.kind), *top, *bottom, background.horizon, *dice]


@dataclass(frozen=True)
class View:
    """Which part of each picture is painted: its full height and width, and the window's corner. shape = (batch,)."""

    height: Tensor
    width: Tensor
    top: Tensor
    left: Tensor

    @classmethod
    def whole(cls, batch: int, height: int, width: int) -> View:
        """All of every picture."""
        side = torch.ones(batch)
        return cls(side * height, side * width, side * 0, side * 0)

    def rows(self, start: int, stop: int) -> View:
        """Of some of the pictures."""
        return View(self.height[start:stop], self.width[start:stop], self.top[start:stop], self.left[start:stop])


@dataclass(frozen=True)
class Canvas:
    """Pixels being painted, with where they lie: `x`, `y` in half shorter sides from the middle (y down).

    rgb: shape = (batch, 3, height, width), 0 to 1; x: (batch, 1, width); y: (batch, height, 1); across, down (half the
    picture's width and height in the same unit) and pixel (the size of one): (batch, 1, 1).
    """

    rgb: Tensor
    x: Tensor
    y: Tensor
    across: Tensor
    down: Tensor
    pixel: Tensor

    @classmethod
    def blank(cls, view: View, height: int, width: int, device: torch.device) -> Canvas:
        """Black, of `height` x `width` pixels."""
        sides = (view.height, view.width, view.top, view.left)
        full_h, full_w, top, left = (side.to(device, non_blocking=True)[:, None, None] for side in sides)
        short = torch.minimum(full_h, full_w)
        column = torch.arange(width, device=device, dtype=torch.float32) + 0.5
        row = torch.arange(height, device=device, dtype=torch.float32)[:, None] + 0.5
        x, y = (2 * (left + column) - full_w) / short, (2 * (top + row) - full_h) / short
        rgb = torch.zeros(len(view.height), 3, height, width, device=device)
        return cls(rgb, x, y, full_w / short, full_h / short, 2 / short)

    def of(self, rows: Tensor) -> Canvas:
        """The same for some pictures of the batch; its rgb is a copy."""
        return Canvas(self.rgb[rows], self.x[rows], self.y[rows], self.across[rows], self.down[rows], self.pixel[rows])

    def coverage(self, distance: Tensor) -> Tensor:
        """How much of each pixel lies inside, for a distance in the canvas' unit. shape = (batch, 1, height, width)."""
        return (0.5 - distance / self.pixel).clamp(0.0, 1.0)[:, None]


def draw(
    packed: Tensor, height: int, width: int, device: torch.device | str = "cpu", view: View | None = None
) -> Tensor:
    """Packed scenes as pictures. shape = (batch, 3, height, width), float32 from -1 to 1, on `device`.

    packed : shape = (batch, WIDTH), on the CPU, so that painting never waits for the device
    """
    view = view or View.whole(len(packed), height, width)
    at_once = max(1, PIXELS_AT_ONCE // (height * width))
    device = torch.device(device)
    parts = [
        _draw(packed[i : i + at_once], Canvas.blank(view.rows(i, i + at_once), height, width, device))
        for i in range(0, len(packed), at_once)
    ]
    return torch.cat(parts)


Painter = Callable[[Canvas, Tensor], Tensor]
"""Gives the new rgb of a canvas from its pictures' numbers, shape = (batch, numbers), both on the device."""


def _draw(packed: Tensor, canvas: Canvas) -> Tensor:
    numbers = packed.to(canvas.rgb.device, non_blocking=True)
    for kind, name in enumerate(KINDS):
        _paint_rows(canvas, packed[:, 0] == kind, numbers[:, :_BACKGROUND], _PAINTERS[name])
    for start in range(_BACKGROUND, WIDTH, _THING):
        for shape, name in enumerate(SHAPES):
            wanted = packed[:, start] == shape
            _paint_rows(canvas, wanted, numbers[:, start : start + _THING], partial(_paint_thing, shape=name))
    return canvas.rgb.mul_(2).sub_(1)


def _paint_rows(canvas: Canvas, wanted: Tensor, numbers: Tensor, painter: Painter) -> None:
    rows = wanted.nonzero()[:, 0]
    if len(rows):
        rows = rows.to(canvas.rgb.device, non_blocking=True)
        canvas.rgb[rows] = painter(canvas.of(rows), numbers[rows])


def _column(numbers: Tensor, index: int) -> Tensor:
    """One number a picture, as (batch, 1, 1)."""
    return numbers[:, index, None, None]


def _colour(numbers: Tensor, start: int) -> Tensor:
    """One colour a picture, as (batch, 3, 1, 1)."""
    return numbers[:, start : start + 3, None, None]


def _tint(canvas: Canvas, rgb: RGB) -> Tensor:
    return torch.tensor(rgb).to(canvas.rgb.device, non_blocking=True)[None, :, None, None]


def _over(below: Tensor, colour: Tensor, alpha: Tensor) -> Tensor:
    return below + (colour - below) * alpha


def _paint_plain(canvas: Canvas, numbers: Tensor) -> Tensor:
    return _colour(numbers, 1).expand_as(canvas.rgb)


def _paint_gradient(canvas: Canvas, numbers: Tensor) -> Tensor:
    down = (canvas.y / canvas.down / 1.9 + 0.5).clamp(0.0, 1.0)[:, None]
    return _over(_colour(numbers, 1), _colour(numbers, 4), down).expand_as(canvas.rgb)


def _paint_night(canvas: Canvas, numbers: Tensor) -> Tensor:
    top, bottom = LANDSCAPES["night"]
    down = (canvas.y / canvas.down / 2 + 0.5)[:, None]
    sky = _over(_tint(canvas, top), _tint(canvas, bottom), down).expand_as(canvas.rgb)
    return _over(sky, _tint(canvas, (1.0, 0.97, 0.88)), _starlight(canvas, numbers))


def _starlight(canvas: Canvas, numbers: Tensor) -> Tensor:
    """Small round stars. shape = (batch, 1, height, width)."""
    light = torch.zeros_like(canvas.rgb[:, :1])
    for start in range(8, 8 + _DICE, 3):
        x, y, size = (_column(numbers, start + n) for n in range(3))
        across = canvas.x - (2 * x - 1) * canvas.across
        down = canvas.y - (2 * y - 1) * canvas.down
        star = canvas.coverage(torch.hypot(across, down) - 0.008 - 0.014 * size**3)
        light = torch.maximum(light, star * (0.55 + 0.45 * size)[:, None])
    return light


@dataclass(frozen=True)
class _Layers:
    """Paper-cut layers from the horizon down: colour of the first and the last, how many, how wavy."""

    first: RGB
    last: RGB
    count: int
    height: float
    waves: float


_SEA = _Layers((0.30, 0.62, 0.80), (0.07, 0.33, 0.58), 4, 0.022, 7.0)
_MEADOW = _Layers((0.55, 0.78, 0.38), (0.27, 0.58, 0.25), 3, 0.07, 1.6)


def _paint_layers(canvas: Canvas, numbers: Tensor, layers: _Layers) -> Tensor:
    height = (canvas.y / canvas.down)[:, None]
    high, low = mix(SKY, (0.35, 0.64, 0.93), 0.45), mix(SKY, (1.0, 1.0, 1.0), 0.45)
    rgb = _over(_tint(canvas, high), _tint(canvas, low), (height + 1) / 1.6)
    rgb = rgb.clamp(0.0, 1.0).expand_as(canvas.rgb)
    horizon = _column(numbers, 7)
    for n in range(layers.count):
        phase = _column(numbers, 8 + n) * 2 * math.pi
        level = horizon + (1.0 - horizon) * n / layers.count
        edge = level * canvas.down + layers.height * torch.sin(canvas.x * layers.waves * (1 + 0.13 * n) + phase)
        colour = mix(layers.first, layers.last, n / (layers.count - 1))
        rgb = _over(rgb, _tint(canvas, colour), canvas.coverage(edge - canvas.y))
    return rgb


def _paint_sea(canvas: Canvas, numbers: Tensor) -> Tensor:
    return _paint_layers(canvas, numbers, _SEA)


def _paint_meadow(canvas: Canvas, numbers: Tensor) -> Tensor:
    return _paint_layers(canvas, numbers, _MEADOW)


_PAINTERS: dict[str, Painter] = {
    "plain": _paint_plain,
    "gradient": _paint_gradient,
    "night": _paint_night,
    "sea": _paint_sea,
    "meadow": _paint_meadow,
}

_SHADOW = (0.06, 0.11, 0.09, 0.24)  # offset right and down in radii, softness in half shorter sides, strength


def _paint_thing(canvas: Canvas, numbers: Tensor, shape: str) -> Tensor:
    """One thing with a soft shadow, lit from above."""
    x, y, radius, turn = (_column(numbers, n) for n in range(1, 5))
    distance = DISTANCES[shape]
    right, down, soft, strength = _SHADOW
    fall = distance(*_local(canvas, (x, y, radius, turn), (right, down))) * radius
    shade = (0.5 - fall / soft).clamp(0.0, 1.0)
    rgb = canvas.rgb * (1 - strength * (shade * shade * (3 - 2 * shade))[:, None])

    across, up = _local(canvas, (x, y, radius, turn))
    colour = _lit(_colour(numbers, 5), across, up)
    rgb = _over(rgb, colour, canvas.coverage(distance(across, up) * radius))
    if shape == "flower":
        centre = canvas.coverage(flower_centre(across, up) * radius)
        return _over(rgb, _centre_colour(canvas, _colour(numbers, 5)), centre)
    return rgb


Pose = tuple[Tensor, Tensor, Tensor, Tensor]  # x, y, radius, turn


def _local(canvas: Canvas, pose: Pose, offset: tuple[float, float] = (0.0, 0.0)) -> tuple[Tensor, Tensor]:
    """Pixel places as a thing sees them: its middle (moved by `offset` radii) the origin, its radius the unit, y up."""
    x, y, radius, turn = pose
    across = canvas.x - x * canvas.across - offset[0] * radius
    up = y * canvas.down + offset[1] * radius - canvas.y
    cosine, sine = torch.cos(turn), torch.sin(turn)
    return (across * cosine + up * sine) / radius, (up * cosine - across * sine) / radius


def _lit(colour: Tensor, across: Tensor, up: Tensor) -> Tensor:
    """The colour, a little lighter towards the top left and darker below."""
    light = (0.07 * up - 0.03 * across).clamp(-0.12, 0.12)[:, None]
    return torch.where(light > 0, colour + (1 - colour) * light * 1.6, colour * (1 + light * 1.2))


def _centre_colour(canvas: Canvas, petals: Tensor) -> Tensor:
    """Yellow, but white in a yellow or orange flower."""
    red, green, blue = petals.split(1, dim=1)
    warm = (red > 0.8) & (green > 0.45) & (blue < 0.4)
    return torch.where(warm, _tint(canvas, COLOURS["white"]), _tint(canvas, COLOURS["yellow"]))
