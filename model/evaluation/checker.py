"""A small network that reads a drawing: which things of which colour are where, in what style, on what background.

A detector by centres (Zhou, Wang and Krähenbühl 2019, arXiv:1904.07850): it says for each cell of 8 x 8 pixels whether
a thing's centre lies there, and of the thing its shape, colour, exact centre and radius. Unlike the paper's it looks
for things of any shape, and "none of the shapes" is an answer: a blob keeps its place and its colour.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from model.training.palette import COLOURS
from model.training.scenes import KINDS, SHAPES, STYLES

COLOUR_NAMES = tuple(COLOURS)
MALFORMED = "none"
"""What the shape of a thing is called that is none of the shapes."""

SIDE = 256  # pixels, of the shorter side of what the network is shown
THRESHOLD = 0.3  # how sure a centre must be
MAX_SEEN = 8  # things a picture, the surest
COMMITTED = Path(__file__).with_name("checker.safetensors")


@dataclass(frozen=True)
class Seen:
    """A thing that was found. x and y from -1 (left, top) to 1; the radius in half shorter sides."""

    shape: str  # or MALFORMED
    colour: str
    x: float
    y: float
    radius: float
    score: float = 1.0  # how sure its centre is


@dataclass(frozen=True)
class Reading:
    """What a picture shows. The colours are those of a plain background or of a gradient's top and bottom."""

    things: tuple[Seen, ...]
    style: str
    background: str
    colours: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Answer:
    """What the network says, in logits. shape = (batch, …, h/8, w/8) of the first five, (batch, …) of the rest.

    offset : of the centre from the cell's middle, in cells, right and down; radius : its logarithm
    """

    centre: Tensor
    offset: Tensor
    radius: Tensor
    shape: Tensor  # the shapes, then MALFORMED
    colour: Tensor
    style: Tensor
    kind: Tensor
    top: Tensor
    bottom: Tensor


_THING = (1, 2, 1, len(SHAPES) + 1, len(COLOUR_NAMES))
_PICTURE = (len(STYLES), len(KINDS), len(COLOUR_NAMES), len(COLOUR_NAMES))


class Block(nn.Module):
    """Two convolutions around which the input passes (He et al. 2016, arXiv:1512.03385)."""

    def __init__(self, width: int, dilation: int = 1) -> None:
        super().__init__()
        self.first = Unit(width, width, dilation=dilation)
        self.second = Unit(width, width, dilation=dilation)

    def forward(self, x: Tensor) -> Tensor:
        """The same shape."""
        return x + self.second(self.first(x))


class Unit(nn.Sequential):
    """Convolution, batch normalization, ReLU."""

    def __init__(self, wide: int, out: int, size: int = 3, stride: int = 1, dilation: int = 1) -> None:
        padding = dilation * (size // 2)
        super().__init__(
            nn.Conv2d(wide, out, size, stride, padding, dilation, bias=False), nn.BatchNorm2d(out), nn.ReLU()
        )


class Checker(nn.Module):
    """About 480,000 parameters.

    side : what the shorter side of a picture is resized to
    about : what is written beside the weights: accuracy, the drawings' version
    """

    def __init__(self, side: int = SIDE, about: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.side, self.about = side, about or {}
        self.near = nn.Sequential(
            Unit(3, 24, stride=2), Unit(24, 32, stride=2), Block(32), Unit(32, 64, stride=2), Block(64)
        )
        self.far = nn.Sequential(Unit(64, 84, stride=2), Block(84), Block(84, dilation=2))
        self.across = Unit(84, 64, size=1)
        self.joined = Unit(64, 64)
        self.things = nn.Conv2d(64, sum(_THING), 1)
        self.picture = nn.Linear(2 * (64 + 84), sum(_PICTURE))
        with torch.no_grad():  # at first hardly any cell holds a centre
            nn.init.constant_(self.things.get_parameter("bias")[0:1], -4.0)

    def forward(self, pixels: Tensor) -> Answer:
        """Pixels from -1 to 1. shape = (batch, 3, height, width), sides multiples of 16."""
        near = self.near(pixels)
        far = self.far(near)
        joined = self.joined(near + F.interpolate(self.across(far), scale_factor=2.0))
        pooled = torch.cat([pool for x in (near, far) for pool in (x.mean((2, 3)), x.amax((2, 3)))], dim=1)
        things = self.things(joined).float().split(_THING, dim=1)
        return Answer(*things, *self.picture(pooled).float().split(_PICTURE, dim=1))

    def read(self, pixels: Tensor) -> list[Reading]:
        """What pictures of one size show. Pixels: shape = (batch, 3, height, width), from -1 to 1, on any device."""
        weight = self.things.weight
        readings: list[Reading] = []
        for part in pixels.split(64):
            with torch.inference_mode():
                readings += _readings(self(resized(part.to(weight.device, torch.float32), self.side)))
        return readings

    def save(self, path: Path) -> None:
        """Weights in 16 bit, with what `about` says."""
        state = {name: value.detach().to("cpu", torch.float16).contiguous() for name, value in self._floats()}
        metadata = {"side": self.side, "shapes": SHAPES, "colours": COLOUR_NAMES, "styles": STYLES, "kinds": KINDS}
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        save_file(state, part, {key: json.dumps(value) for key, value in (self.about | metadata).items()})
        part.chmod(0o644)  # save_file leaves it to the owner alone
        part.replace(path)

    def _floats(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, value) for name, value in self.state_dict().items() if value.is_floating_point())


def load_checker(path: Path = COMMITTED, device: torch.device | str = "cpu") -> Checker:
    """A trained checker, ready to read. Errors: ValueError if it is none, or knows other shapes than the drawings."""
    try:
        with safe_open(path, "pt") as file:
            about = {key: json.loads(value) for key, value in (file.metadata() or {}).items()}
            state = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
        checker = Checker(about.pop("side"))
        missing, unexpected = checker.load_state_dict(state, strict=False)
    except (SafetensorError, RuntimeError, KeyError) as error:
        raise ValueError(f"{path} holds no checker: {error}") from error
    if unexpected or any(not name.endswith("num_batches_tracked") for name in missing):
        raise ValueError(f"{path} holds no checker: it lacks {missing}, has besides {unexpected}")
    for key, known in (("shapes", SHAPES), ("colours", COLOUR_NAMES), ("styles", STYLES), ("kinds", KINDS)):
        if about.pop(key) != list(known):
            raise ValueError(f"{path} knows other {key} than the drawings: train it again")
    checker.about = about
    return checker.to(device).eval().requires_grad_(False)


def resized(pixels: Tensor, side: int) -> Tensor:
    """Pictures with their shorter side of `side` pixels, both sides multiples of 16."""
    height, width = pixels.shape[-2:]
    scale = side / min(height, width)
    size = [max(16, round(length * scale / 16) * 16) for length in (height, width)]
    if size == [height, width]:
        return pixels
    return F.interpolate(pixels, size, mode="bilinear", antialias=True, align_corners=False).clamp(-1, 1)


def _readings(answer: Answer) -> list[Reading]:
    centre = answer.centre.sigmoid()
    peaks = (centre * (centre == F.max_pool2d(centre, 3, 1, 1))).cpu()
    fields = [part.cpu() for part in (answer.offset, answer.radius, answer.shape.argmax(1), answer.colour.argmax(1))]
    pictures = zip(*(part.argmax(1).tolist() for part in (answer.style, answer.kind, answer.top, answer.bottom)),
                   strict=True)  # fmt: skip
    return [
        Reading(_things(peaks[n, 0], [field[n] for field in fields]), STYLES[style], KINDS[kind],
                _colours(KINDS[kind], top, bottom))
        for n, (style, kind, top, bottom) in enumerate(pictures)
    ]  # fmt: skip


def _colours(kind: str, top: int, bottom: int) -> tuple[str, ...]:
    names = {"plain": (top,), "gradient": (top, bottom)}.get(kind, ())
    return tuple(COLOUR_NAMES[index] for index in names)


def _things(peaks: Tensor, fields: Sequence[Tensor]) -> tuple[Seen, ...]:
    """The surest centres, none inside a surer thing."""
    offset, radius, shape, colour = fields
    height, width = peaks.shape
    short = min(height, width)
    found: list[Seen] = []
    rows, columns = (peaks > THRESHOLD).nonzero(as_tuple=True)
    for row, column in sorted(zip(rows.tolist(), columns.tolist(), strict=True), key=lambda cell: -peaks[cell].item()):
        seen = Seen(
            shape=(*SHAPES, MALFORMED)[int(shape[row, column])],
            colour=COLOUR_NAMES[int(colour[row, column])],
            x=2 * (column + 0.5 + offset[0, row, column].item()) / width - 1,
            y=2 * (row + 0.5 + offset[1, row, column].item()) / height - 1,
            radius=math.exp(min(1.0, radius[0, row, column].item())),
            score=peaks[row, column].item(),
        )
        if all(_distance(seen, other, width / short, height / short) > 0.6 * other.radius for other in found):
            found.append(seen)
    return tuple(found[:MAX_SEEN])


def _distance(first: Seen, second: Seen, across: float, down: float) -> float:
    return math.hypot((first.x - second.x) * across, (first.y - second.y) * down)
