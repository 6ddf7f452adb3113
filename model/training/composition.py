"""Where the things of a scene are: alone, in a row, in a column or scattered, apart from one another and the frame."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

SIZES: dict[str, tuple[float, float]] = {"small": (0.17, 0.23), "medium": (0.32, 0.40), "large": (0.52, 0.64)}
OF_THREE = (0.205, 0.26)  # the radii when there are three
MARGIN, GAP = 0.06, 0.08
TRIES = 12  # to find places where things stand on the ground or hang in the sky

Place = tuple[float, float, float, str]  # x, y, radius, size word
Layout = tuple[str, list[Place]]


@dataclass(frozen=True)
class Ground:
    """What lies below the horizon of a landscape, from y = `horizon` down."""

    horizon: float

    def bears(self, place: Place) -> bool:
        """Whether something there stands on it."""
        _, y, radius, _ = place
        return y + 0.75 * radius >= self.horizon

    def frees(self, place: Place) -> bool:
        """Whether something there hangs in the sky."""
        _, y, radius, _ = place
        return y + 0.5 * radius <= self.horizon


def compose(rng: Random, belongs: Sequence[int], ground: Ground | None) -> Layout:
    """The name of a layout and a place for each thing, in the layout's order.

    belongs : for each thing 1 (on the ground), -1 (in the sky) or 0. Where a landscape has room, they are there.
    """
    sample = _LAYOUTS[len(belongs)]
    layout = sample(rng)
    if ground is None or not any(belongs):
        return layout
    best, fitting = layout, _fitting(layout, belongs, ground)
    for _ in range(TRIES):
        if fitting == len(belongs):
            break
        layout = sample(rng)
        count = _fitting(layout, belongs, ground)
        if count > fitting:
            best, fitting = layout, count
    return best


def _fitting(layout: Layout, belongs: Sequence[int], ground: Ground) -> int:
    """How many things are where they belong."""
    return sum(
        not where or (ground.bears(place) if where > 0 else ground.frees(place))
        for where, place in zip(belongs, layout[1], strict=True)
    )


def _sample_radius(rng: Random, weights: tuple[int, int, int]) -> tuple[float, str]:
    size = rng.choices(tuple(SIZES), weights)[0]
    return rng.uniform(*SIZES[size]), size


def _single(rng: Random) -> Layout:
    radius, size = _sample_radius(rng, (20, 46, 34))
    reach = 1 - MARGIN - radius
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


def _pair(rng: Random) -> Layout:
    (r1, s1), (r2, s2) = (_sample_radius(rng, (30, 70, 0)) for _ in range(2))
    layout = rng.choices(("row", "column", "scattered"), (42, 38, 20))[0]
    if layout == "scattered":
        return layout, _scatter(rng, [(r1, s1), (r2, s2)])
    first, second = (rng.uniform(0.44, 1 - MARGIN - max(r1, r2)) for _ in range(2))
    drift = (rng.uniform(-0.1, 0.1), rng.uniform(-0.1, 0.1))
    shift = rng.choice((0.0, 0.0, rng.uniform(-0.35, 0.35)))
    along = ((-first, r1, s1, shift + drift[0]), (second, r2, s2, shift + drift[1]))
    return layout, [(a, c, r, s) if layout == "row" else (c, a, r, s) for a, r, s, c in along]


def _triple(rng: Random) -> Layout:
    radii = [(rng.uniform(*OF_THREE), "medium") for _ in range(3)]
    layout = rng.choices(("row", "column", "scattered"), (45, 30, 25))[0]
    if layout == "scattered":
        return layout, _scatter(rng, radii)
    shift = rng.uniform(-0.25, 0.25)
    along = [(a + rng.uniform(-0.02, 0.02), shift + rng.uniform(-0.06, 0.06)) for a in (-0.64, 0.0, 0.64)]
    pairs = [((a, c) if layout == "row" else (c, a)) for a, c in along]
    return layout, [(x, y, r, s) for (x, y), (r, s) in zip(pairs, radii, strict=True)]


def _scatter(rng: Random, radii: list[tuple[float, str]]) -> list[Place]:
    """Places without overlap, by rejection."""
    while True:
        places: list[Place] = []
        for radius, size in radii:
            reach = 1 - MARGIN - radius
            places.append((rng.uniform(-reach, reach), rng.uniform(-reach, reach), radius, size))
        if all(_apart(a, b) for i, a in enumerate(places) for b in places[:i]):
            return places


def _apart(a: Place, b: Place) -> bool:
    return math.hypot(a[0] - b[0], a[1] - b[1]) > a[2] + b[2] + GAP


_LAYOUTS = {1: _single, 2: _pair, 3: _triple}
