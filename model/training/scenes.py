"""What is in a picture: a background and one to three things, at random from a seed. `drawing.py` paints it.

Places are fractions of the picture: x and y run from -1 (left, top) to 1 (right, bottom), sizes are radii as a share of
half the shorter side. Things that keep apart in a square do so in every other aspect: a scene has none of its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random

from model.training.palette import COLOURS, DARK_COLOURS, LIGHT_COLOURS, RGB, contrast, mix, tone

DATA_VERSION = "1"
"""Of the pictures and the captions: raise it whenever either changes, since it is written beside trained weights."""

# The order counts, as in palette.COLOURS.
SHAPES = ("circle", "square", "triangle", "star", "heart", "moon", "sun", "cloud", "flower")
UPRIGHT = frozenset({"circle", "sun", "cloud"})

SIZES: dict[str, tuple[float, float]] = {"small": (0.17, 0.23), "medium": (0.32, 0.40), "large": (0.52, 0.64)}

SKY: RGB = (0.62, 0.82, 0.96)
NIGHT: RGB = (0.07, 0.09, 0.24)
SEA: RGB = (0.12, 0.45, 0.68)
MEADOW: RGB = (0.42, 0.70, 0.30)
LANDSCAPES: dict[str, tuple[RGB, ...]] = {
    "night": (NIGHT, (0.20, 0.18, 0.42)),
    "sea": (SKY, SEA),
    "meadow": (SKY, MEADOW),
}
MIN_CONTRAST = 0.19


@dataclass(frozen=True)
class Background:
    """`plain` (one colour), `gradient` (from `colour` down to `second`), `night`, `sea` or `meadow`."""

    kind: str
    colour: str = ""
    tone: str = "plain"
    second: str = ""
    horizon: float = 0.0  # y of the line between sky and sea or meadow
    seed: int = 0  # places stars, waves and hills

    @property
    def tints(self) -> tuple[RGB, ...]:
        """The colours that something standing out must differ from."""
        if self.kind == "plain":
            return (tone(self.colour, self.tone),)
        if self.kind == "gradient":
            top, bottom = tone(self.colour), tone(self.second)
            return top, mix(top, bottom, 0.5), bottom
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
    """A background and its things, in the order in which they are painted.

    layout : how they were placed: `single`, `row` (left to right), `column` (top to bottom) or `scattered`
    """

    background: Background
    things: tuple[Thing, ...]
    layout: str


def held_out(shape: str, colour: str) -> bool:
    """Whether the combination is kept from training, so that it can be asked for later."""
    return (SHAPES.index(shape) * 10 + list(COLOURS).index(colour)) % 9 == 6


def sample_scene(seed: int, *, only_held_out: bool = False) -> Scene:
    """The scene of a seed. Training scenes hold no held-out combination; with `only_held_out` every thing is one."""
    rng = Random(seed)
    background = sample_background(rng)
    count = rng.choices((1, 2, 3), (50, 33, 17))[0]
    looks = _sample_looks(rng, background, count, only_held_out)
    layout, places = _LAYOUTS[count](rng)
    things = tuple(
        Thing(shape, colour, x, y, radius, size, _sample_turn(rng, shape), _sample_jitter(rng, colour))
        for (shape, colour), (x, y, radius, size) in zip(looks, places, strict=True)
    )
    return Scene(background, things, layout)


def sample_background(rng: Random) -> Background:
    """A background: half of them plain, a fifth gradients, the rest landscapes."""
    kind = rng.choices(("plain", "gradient", "night", "sea", "meadow"), (50, 18, 11, 10, 11))[0]
    if kind == "plain":
        shade = rng.choices(("plain", "light", "dark"), (60, 25, 15))[0]
        among = {"plain": tuple(COLOURS), "light": LIGHT_COLOURS, "dark": DARK_COLOURS}[shade]
        return Background(kind, rng.choice(among), shade)
    if kind == "gradient":
        first, second = rng.sample(tuple(COLOURS), 2)
        return Background(kind, first, second=second)
    return Background(kind, horizon=rng.uniform(0.22, 0.5), seed=rng.randrange(1 << 20))


def _sample_looks(rng: Random, background: Background, count: int, only_held_out: bool) -> list[tuple[str, str]]:
    """`count` pairs (shape, colour) that stand out from the background and are not twice the same."""
    looks: list[tuple[str, str]] = []
    while len(looks) < count:
        look = rng.choice(SHAPES), rng.choice(tuple(COLOURS))
        taken = look in looks or any(colour == look[1] and rng.random() < 0.8 for _, colour in looks)
        if not taken and held_out(*look) == only_held_out and _stands_out(look[1], background):
            looks.append(look)
    return looks


def _stands_out(colour: str, background: Background) -> bool:
    rgb = COLOURS[colour]
    if colour in (background.colour, background.second):
        return False
    return all(contrast(rgb, tint) >= MIN_CONTRAST for tint in background.tints)


def _sample_turn(rng: Random, shape: str) -> float:
    return 0.0 if shape in UPRIGHT else rng.gauss(0.0, 0.12)


def _sample_jitter(rng: Random, colour: str) -> RGB:
    spread = 0.0 if colour in ("white", "black") else 0.025
    return rng.uniform(-spread, spread), rng.uniform(-spread, spread), rng.uniform(-spread, spread)


Place = tuple[float, float, float, str]


def _sample_radius(rng: Random, weights: tuple[int, int, int]) -> tuple[float, str]:
    size = rng.choices(tuple(SIZES), weights)[0]
    return rng.uniform(*SIZES[size]), size


def _single(rng: Random) -> tuple[str, list[Place]]:
    radius, size = _sample_radius(rng, (22, 48, 30))
    reach = 0.94 - radius
    edge = rng.choices(("centre", "side", "corner", "free"), (42, 30, 18, 10))[0]
    if edge == "centre":
        x, y = rng.uniform(-0.05, 0.05), rng.uniform(-0.05, 0.05)
    elif edge == "free":
        x, y = rng.uniform(-reach, reach), rng.uniform(-reach, reach)
    else:
        near, far = rng.uniform(0.8, 1.0) * reach, rng.uniform(-0.08, 0.08)
        x, y = near * rng.choice((-1, 1)), far
        if edge == "corner":
            y = rng.uniform(0.8, 1.0) * reach * rng.choice((-1, 1))
        elif rng.random() < 0.5:
            x, y = y, x
    return "single", [(x, y, radius, size)]


def _pair(rng: Random) -> tuple[str, list[Place]]:
    (r1, s1), (r2, s2) = (_sample_radius(rng, (35, 65, 0)) for _ in range(2))
    layout = rng.choices(("row", "column", "scattered"), (42, 38, 20))[0]
    if layout == "scattered":
        return layout, _scatter(rng, [(r1, s1), (r2, s2)])
    first, second = (rng.uniform(0.42, 0.94 - max(r1, r2)) for _ in range(2))
    drift = (rng.uniform(-0.1, 0.1), rng.uniform(-0.1, 0.1))
    shift = rng.choice((0.0, 0.0, rng.uniform(-0.35, 0.35)))
    along = ((-first, r1, s1, shift + drift[0]), (second, r2, s2, shift + drift[1]))
    return layout, [(a, c, r, s) if layout == "row" else (c, a, r, s) for a, r, s, c in along]


def _triple(rng: Random) -> tuple[str, list[Place]]:
    radii = [(rng.uniform(0.17, 0.26), "medium") for _ in range(3)]
    layout = rng.choices(("row", "column", "scattered"), (45, 30, 25))[0]
    if layout == "scattered":
        return layout, _scatter(rng, radii)
    shift = rng.uniform(-0.25, 0.25)
    along = [(a + rng.uniform(-0.03, 0.03), shift + rng.uniform(-0.06, 0.06)) for a in (-0.62, 0.0, 0.62)]
    pairs = [((a, c) if layout == "row" else (c, a)) for a, c in along]
    return layout, [(x, y, r, s) for (x, y), (r, s) in zip(pairs, radii, strict=True)]


def _scatter(rng: Random, radii: list[tuple[float, str]]) -> list[Place]:
    """Places without overlap, by rejection; shrinks what finds no room."""
    for shrink in range(1000):
        places: list[Place] = []
        for radius, size in radii:
            small = radius * 0.999**shrink
            reach = 0.94 - small
            places.append((rng.uniform(-reach, reach), rng.uniform(-reach, reach), small, size))
        if all(_apart(a, b) for i, a in enumerate(places) for b in places[:i]):
            return places
    raise RuntimeError("no room for the things of a scene")


def _apart(a: Place, b: Place) -> bool:
    return math.hypot(a[0] - b[0], a[1] - b[1]) > a[2] + b[2] + 0.08


_LAYOUTS = {1: _single, 2: _pair, 3: _triple}
