"""Paints scenes in batches on any device: every shape is a signed distance, so edges are smooth at any size.

The work is shared: backgrounds are painted kind by kind, the distances of things taken shape by shape, and both brought
together style by style, each once for all the pictures that want it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

from model.training import backgrounds, styles
from model.training.backgrounds import pack_background
from model.training.canvas import Canvas, View, colour, column, over
from model.training.palette import accent
from model.training.scenes import KINDS, SHAPES, STYLES, Scene, Thing
from model.training.shapes import PARTS
from model.training.styles import TEXTURE, Figures, Sheet, Style

MAX_THINGS = 3
PIXELS_AT_ONCE = {"cpu": 1 << 19, "cuda": 1 << 24}
"""Pictures are painted in groups of at most so many pixels. On a GPU, where a group takes 50 ms of launching kernels
however large it is, they make about 4 GB of temporaries."""

ACCENTS = 2  # colours of a thing besides its main one
_THING = 5 + 3 * (1 + ACCENTS)  # shape, x, y, radius, turn, colours
_SCENE = backgrounds.WIDTH + 1 + TEXTURE  # background, style, texture
WIDTH = _SCENE + MAX_THINGS * _THING
"""Numbers that one packed scene takes."""

FAR = 9.0
RISE = 3.0
"""How much steeper a part's edge is outside than inside, where another part lies: its rim is mostly its own."""


def pack(scenes: Sequence[Scene]) -> Tensor:
    """Scenes as numbers, on the CPU: cheap to send between processes. shape = (scenes, WIDTH)."""
    return torch.tensor([_pack_one(scene) for scene in scenes], dtype=torch.float32)


def _pack_one(scene: Scene) -> list[float]:
    texture = [0.0] * TEXTURE
    if scene.style == "watercolour":
        roll = Random(scene.seed).random
        texture = [roll() for _ in texture]
    row = [*pack_background(scene.background), STYLES.index(scene.style), *texture]
    for thing in scene.things:
        row += _pack_thing(thing, one_colour=scene.style == "line")
    return row + [-1.0] * (WIDTH - len(row))


def _pack_thing(thing: Thing, one_colour: bool) -> list[float]:
    accents = [thing.rgb if one_colour else accent(role, thing.colour) for role in _accents(thing.shape)]
    colours = [channel for rgb in (thing.rgb, *accents) for channel in rgb]
    row = [SHAPES.index(thing.shape), thing.x, thing.y, thing.radius, thing.turn, *colours]
    return row + [0.0] * (_THING - len(row))


def _accents(shape: str) -> tuple[str, ...]:
    """The roles of its parts, besides the main one, in the order of their colours."""
    return tuple(dict.fromkeys(role for role, _ in PARTS[shape] if role != "main"))


def draw(
    packed: Tensor, height: int, width: int, device: torch.device | str = "cpu", view: View | None = None
) -> Tensor:
    """Packed scenes as pictures. shape = (batch, 3, height, width), float32 from -1 to 1, on `device`.

    packed : shape = (batch, WIDTH), on the CPU, so that painting never waits for the device
    """
    view = view or View.whole(len(packed), height, width)
    at_once = max(1, PIXELS_AT_ONCE.get(torch.device(device).type, PIXELS_AT_ONCE["cpu"]) // (height * width))
    numbers = _Numbers(packed, packed.to(device, non_blocking=True))
    cells = column(numbers.device, _STYLE) == STYLES.index("pixel")
    parts = []
    for start in range(0, len(packed), at_once):
        some = slice(start, start + at_once)
        canvas = Canvas.blank(view.rows(some), height, width, cells[some])
        parts.append(_draw(_Numbers(packed[some], numbers.device[some]), canvas))
    return torch.cat(parts)


@dataclass(frozen=True)
class _Numbers:
    """The packed scenes where they are cheap to ask (`host`) and where they are painted (`device`)."""

    host: Tensor
    device: Tensor

    def rows(self, index: int, value: int) -> Tensor:
        """The pictures whose number at `index` is `value`, on the host."""
        return (self.host[:, index] == value).nonzero()[:, 0]

    def of(self, rows: Tensor) -> _Numbers:
        """Of some of the pictures; `rows` on the host."""
        return _Numbers(self.host[rows], self.device[self.send(rows)])

    def send(self, rows: Tensor) -> Tensor:
        """Rows of the host on the device."""
        return rows.to(self.device.device, non_blocking=True)


_STYLE = backgrounds.WIDTH


def _draw(numbers: _Numbers, canvas: Canvas) -> Tensor:
    picture = _backgrounds(canvas, numbers)
    wanted = [(styles.PAINTERS[name], numbers.rows(_STYLE, n)) for n, name in enumerate(STYLES)]
    scale = numbers.device[:, _SCENE + 3 :: _THING].amax(1).clamp(min=0.1)[:, None, None]
    seen = _seen(canvas, numbers, scale, wanted)
    for (style, rows), figures in zip(wanted, seen, strict=True):
        if len(rows):
            here = numbers.send(rows)
            own = numbers.device[here]
            texture = own[:, _STYLE + 1 : _SCENE]
            sheet = Sheet(canvas.of(here), picture[here], figures, scale[here], texture, column(own, 0))
            picture[here] = style.paint(sheet)
    return picture.mul_(2).sub_(1)


def _backgrounds(canvas: Canvas, numbers: _Numbers) -> Tensor:
    """What lies behind the things. shape = (batch, 3, height, width), 0 to 1."""
    rgb = canvas.x.new_empty(len(numbers.host), 3, canvas.y.shape[1], canvas.x.shape[2])
    for kind, name in enumerate(KINDS):
        rows = numbers.rows(0, kind)
        if len(rows):
            here = numbers.send(rows)
            rgb[here] = backgrounds.PAINTERS[name](canvas.of(here), numbers.device[here])
    return rgb


def _seen(
    canvas: Canvas, numbers: _Numbers, scale: Tensor, wanted: Sequence[tuple[Style, Tensor]]
) -> list[tuple[Figures, ...]]:
    """The things of the pictures of each style: at their place, and from each of the style's offsets; in one go."""
    views = [(rows, offset) for style, rows in wanted for offset in ((0.0, 0.0), *style.offsets)]
    rows = torch.cat([rows for rows, _ in views])
    offsets = torch.cat([torch.tensor([offset]).expand(len(rows), 2) for rows, offset in views])
    here, offsets = numbers.send(rows), offsets.to(scale.device, non_blocking=True)[:, :, None, None]
    shift = scale[here] * offsets.unbind(1)[0], scale[here] * offsets.unbind(1)[1]
    figures = _figures(canvas.of(here).moved(*shift), numbers.of(rows))
    slices, start = [], 0
    for rows, _ in views:
        slices.append(figures.slice(start, start + len(rows)))
        start += len(rows)
    each = iter(slices)
    return [tuple(next(each) for _ in range(1 + len(style.offsets))) for style, _ in wanted]


def _figures(canvas: Canvas, numbers: _Numbers) -> Figures:
    """The things of each picture as one, the nearest counting."""
    batch, height, width = len(numbers.host), canvas.y.shape[1], canvas.x.shape[2]
    things = _Numbers(*(table[:, _SCENE:].reshape(-1, _THING) for table in (numbers.host, numbers.device)))
    distance = canvas.x.new_full((batch * MAX_THINGS, height, width), FAR)
    depth, fill = torch.full_like(distance, -FAR), canvas.x.new_zeros(batch * MAX_THINGS, 3, height, width)
    for shape, name in enumerate(SHAPES):
        rows = things.rows(0, shape)
        if len(rows):
            here = things.send(rows)
            pictures = canvas.of(things.send(rows // MAX_THINGS))
            distance[here], depth[here], fill[here] = _thing(pictures, things.device[here], name)
    return _nearest(*(field.unflatten(0, (batch, MAX_THINGS)) for field in (distance, depth, fill)))


def _thing(canvas: Canvas, numbers: Tensor, shape: str) -> tuple[Tensor, Tensor, Tensor]:
    """Distance, depth and fill (see Figures) of one thing a picture."""
    radius = column(numbers, 3)
    place = _local(canvas, numbers)
    colours = {role: colour(numbers, 5 + 3 * n) for n, role in enumerate(("main", *_accents(shape)))}
    (role, first), *others = PARTS[shape]
    distance = first(*place) * radius
    depth, fill = -distance, colours[role].expand(-1, -1, *distance.shape[1:])
    for role, part in others:
        edge = part(*place) * radius
        fill = over(fill, colours[role], canvas.coverage(edge - distance.clamp(min=0.0)))
        depth = torch.where(edge < 0, -edge, torch.minimum(depth, edge * RISE))
        distance = torch.minimum(distance, edge)
    return distance, depth, fill


def _local(canvas: Canvas, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Pixel places as a thing sees them: its middle the origin, its radius the unit, y up."""
    x, y, radius, turn = (column(numbers, n) for n in range(1, 5))
    across = (canvas.x - canvas.place(x * canvas.across, canvas.across)) / radius
    up = (canvas.place(y * canvas.down, canvas.down) - canvas.y) / radius
    cosine, sine = torch.cos(turn), torch.sin(turn)
    return across * cosine + up * sine, up * cosine - across * sine


def _nearest(distance: Tensor, depth: Tensor, fill: Tensor) -> Figures:
    """Of the things, second in shape, that which is nearest each pixel."""
    best = Figures(distance[:, 0], depth[:, 0], fill[:, 0])
    for n in range(1, MAX_THINGS):
        closer = distance[:, n] < best.distance
        best = Figures(
            torch.where(closer, distance[:, n], best.distance),
            torch.where(closer, depth[:, n], best.depth),
            torch.where(closer[:, None], fill[:, n], best.fill),
        )
    return best
