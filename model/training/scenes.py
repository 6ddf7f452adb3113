"""What is in a picture: a background, one to three things and a style, at random from a seed. `drawing.py` paints it.

Places are fractions of the picture: x and y run from -1 (left, top) to 1 (right, bottom), sizes are radii as a share of
half the shorter side. Things that keep apart in a square do so in every other aspect: a scene has none of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from random import Random

from model.training.composition import Ground, Place, compose
from model.training.palette import COLOURS, DARK_COLOURS, LIGHT_COLOURS, PAPER, RGB, contrast, mix, tone

DATA_VERSION = "2.2"
"""Of the pictures and the captions: raise it whenever either changes, since it is written beside trained weights.

After the point: what changes neither how a scene is drawn nor the words of captions, such as how often each is taken.
"""

# The order counts, as in palette.COLOURS.
SHAPES = (
    "circle", "square", "triangle", "star", "heart", "moon", "sun", "cloud", "flower",
    "tree", "house", "mountain", "boat",
)  # fmt: skip
UPRIGHT = frozenset({"circle", "sun", "cloud", "tree", "house", "mountain", "boat"})
OF_THE_SKY = frozenset({"star", "moon", "sun", "cloud"})
OF_THE_GROUND = frozenset({"flower", "tree", "house", "mountain", "boat"})

STYLES = ("flat", "line", "pixel", "watercolour", "shaded")
STYLE_SHARES = (28, 30, 16, 13, 13)  # lines are the hardest: nothing but their edges says what they are
KINDS = ("plain", "gradient", "night", "sea", "meadow")
STYLES_OF: dict[str, tuple[str, ...]] = dict.fromkeys(KINDS, STYLES)
"""The styles that each kind of background is drawn in."""

SKY: RGB = (0.62, 0.82, 0.96)
LANDSCAPES: dict[str, tuple[RGB, ...]] = {
    "night": ((0.07, 0.09, 0.24), (0.20, 0.18, 0.42), (0.05, 0.06, 0.17)),  # the sky above and below, hills
    "sea": (SKY, (0.33, 0.66, 0.82), (0.07, 0.33, 0.58)),  # then the farthest waves, and the nearest
    "meadow": (SKY, (0.60, 0.81, 0.42), (0.25, 0.57, 0.27)),  # the same with hills
}
OUT_OF_PLACE = {"sea": frozenset({"flower", "tree", "house"}), "meadow": frozenset({"boat"})}
"""What is seldom seen in a landscape."""

CELLS = 64
"""Pixel art has so many cells along the shorter side: at 512 pixels a cell is one latent."""

MIN_CONTRAST = 0.19
LINE_CONTRAST = 0.29  # of a line, which has less to show than an area
LINE_WASH = 0.55  # how much of the paper is seen through sea and meadow behind a line drawing


@dataclass(frozen=True)
class Background:
    """`plain` (one colour), `gradient` (from `colour` down to `second`), `night`, `sea` or `meadow`."""

    kind: str
    colour: str = ""
    tone: str = "plain"
    second: str = ""
    horizon: float = 0.0  # y of the line between sky and sea, meadow or dark hills
    seed: int = 0  # places stars, waves and hills

    def tints(self, style: str = "flat") -> tuple[RGB, ...]:
        """The colours that something standing out must differ from."""
        if self.kind == "plain":
            return (tone(self.colour, self.tone),)
        if self.kind == "gradient":
            top, bottom = tone(self.colour), tone(self.second)
            return top, mix(top, bottom, 0.5), bottom
        if style == "line" and self.kind != "night":
            return tuple(mix(rgb, PAPER, LINE_WASH) for rgb in LANDSCAPES[self.kind])
        return LANDSCAPES[self.kind]


@dataclass(frozen=True)
class Thing:
    """One shape: its colour's name, its place, its radius and size word, and how far it is turned (radians)."""

    shape: str
    colour: str
    x: float
    y: float
    radius: float
    size: str
    turn: float
    jitter: RGB  # added to the colour, so that red is not one single red

    @property
    def rgb(self) -> RGB:
        """Its colour, 0 to 1."""
        r, g, b = (min(1.0, max(0.0, c + j)) for c, j in zip(COLOURS[self.colour], self.jitter, strict=True))
        return r, g, b


@dataclass(frozen=True)
class Scene:
    """A background and its things, in the order in which they are placed.

    layout : how they were placed: `single`, `row` (left to right), `column` (top to bottom) or `scattered`
    style : one of STYLES
    seed : places the style's texture
    """

    background: Background
    things: tuple[Thing, ...]
    layout: str
    style: str = "flat"
    seed: int = 0


Look = tuple[str, str]  # shape, colour


def drawn_alike(one: str, other: str) -> bool:
    """Whether drawings of two versions look alike, and their captions have the same words."""
    return one.partition(".")[0] == other.partition(".")[0]


def held_out(shape: str, colour: str) -> bool:
    """Whether the combination is kept from training, so that it can be asked for later."""
    return (SHAPES.index(shape) * 10 + list(COLOURS).index(colour)) % 9 == 6


def sample_scene(seed: int, *, only_held_out: bool = False) -> Scene:
    """The scene of a seed. Training scenes hold no held-out combination; with `only_held_out` every thing is one."""
    rng = Random(seed)
    style = rng.choices(STYLES, STYLE_SHARES)[0]
    count = rng.choices((1, 2, 3), (50, 33, 17))[0]
    among: tuple[Look, ...] = ()
    while len(among) < count:  # a few gradients leave hardly a colour visible
        background = sample_background(rng, style)
        among = visible_looks(background, style, only_held_out)
    looks = _sample_looks(rng, among, count, OUT_OF_PLACE.get(background.kind, frozenset()))
    ground = Ground(background.horizon) if background.kind in LANDSCAPES else None
    layout, places = compose(rng, [_belongs(shape) for shape, _ in looks], ground)
    things = tuple(_thing(rng, look, place, style) for look, place in zip(looks, places, strict=True))
    return Scene(background, things, layout, style, rng.randrange(1 << 20))


def sample_background(rng: Random, style: str = "flat") -> Background:
    """A background: half of them plain, a seventh gradients, the rest landscapes. Lines are often on white paper."""
    kind = rng.choices(KINDS, (50, 14, 12, 12, 12))[0]
    if style not in STYLES_OF[kind]:
        kind = "plain"
    if kind == "plain":
        if style == "line" and rng.random() < 0.35:
            return Background(kind, "white")
        shade = rng.choices(("plain", "light", "dark"), (55, 30, 15))[0]
        among = {"plain": tuple(COLOURS), "light": LIGHT_COLOURS, "dark": DARK_COLOURS}[shade]
        return Background(kind, rng.choice(among), shade)
    if kind == "gradient":
        first, second = rng.sample(tuple(COLOURS), 2)
        return Background(kind, first, second=second)
    horizon = rng.uniform(0.62, 0.78) if kind == "night" else rng.uniform(0.22, 0.46)
    return Background(kind, horizon=horizon, seed=rng.randrange(1 << 20))


def visible_looks(background: Background, style: str, only_held_out: bool = False) -> tuple[Look, ...]:
    """The pairs (shape, colour) that stand out from a background, of training or only those held out."""
    return _visible_looks(background.kind, background.colour, background.tone, background.second, style, only_held_out)


@lru_cache(maxsize=4096)
def _visible_looks(kind: str, colour: str, tone: str, second: str, style: str, only_held_out: bool) -> tuple[Look, ...]:
    background = Background(kind, colour, tone, second)
    colours = [colour for colour in COLOURS if stands_out(colour, background, style)]
    return tuple((shape, c) for shape in SHAPES for c in colours if held_out(shape, c) == only_held_out)


def stands_out(colour: str, background: Background, style: str = "flat") -> bool:
    """Whether a thing of the colour is plain to see on the background."""
    if colour in (background.colour, background.second):
        return False
    least = LINE_CONTRAST if style == "line" else MIN_CONTRAST
    return all(contrast(COLOURS[colour], tint) >= least for tint in background.tints(style))


def _sample_looks(rng: Random, among: Sequence[Look], count: int, seldom: frozenset[str]) -> list[Look]:
    """`count` looks that are not twice the same; mostly of different colours, and seldom of some shapes."""
    looks: list[Look] = []
    while len(looks) < count:
        look = among[rng.randrange(len(among))]
        taken = look in looks or any(colour == look[1] and rng.random() < 0.8 for _, colour in looks)
        if not taken and not (look[0] in seldom and rng.random() < 0.75):
            looks.append(look)
    return looks


_CELL = 2 / CELLS / 0.92
"""In pixel art radii differ by whole cells of a circle, so that none ends in a row of a single cell."""


def _belongs(shape: str) -> int:
    """1 for what stands on the ground, -1 for what is in the sky, 0 for what may be anywhere."""
    return (shape in OF_THE_GROUND) - (shape in OF_THE_SKY)


def _thing(rng: Random, look: Look, place: Place, style: str) -> Thing:
    shape, colour = look
    x, y, radius, size = place
    turn = 0.0 if shape in UPRIGHT else rng.gauss(0.0, 0.12)
    if style == "pixel":
        turn, radius = 0.0, (round(radius / _CELL - 0.45) + 0.45) * _CELL
    return Thing(shape, colour, x, y, radius, size, turn, _sample_jitter(rng, colour))


def _sample_jitter(rng: Random, colour: str) -> RGB:
    spread = 0.0 if colour in ("white", "black") else 0.025
    return rng.uniform(-spread, spread), rng.uniform(-spread, spread), rng.uniform(-spread, spread)
