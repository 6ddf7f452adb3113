"""Width and height from an aspect ratio and a number of megapixels."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

from app.errors import Shown
from worker.contract.cards import Defaults, Limits
from worker.contract.errors import InvalidField

MEGAPIXEL = 1_048_576
"""Pixels of 1024 x 1024, what models are trained on and speak of as one megapixel."""


def size_of(aspect_ratio: str | None, megapixels: float | None, defaults: Defaults, limits: Limits) -> tuple[int, int]:
    """The legal size nearest to what is asked, in pixels; what is None is the default's. InvalidField.

    aspect_ratio: such as "16:9", two whole numbers above 0.
    """
    pixels = defaults.width * defaults.height if megapixels is None else megapixels * MEGAPIXEL
    if not limits.min_pixels <= pixels <= limits.max_pixels:
        least, most = limits.min_pixels / MEGAPIXEL, limits.max_pixels / MEGAPIXEL
        raise InvalidField("megapixels", Shown(megapixels), f"{least:g} to {most:g}")
    width, height = map(int, (aspect_ratio or f"{defaults.width}:{defaults.height}").split(":"))
    ratio = width / height
    sizes = list(_legal_near(math.sqrt(pixels * ratio), math.sqrt(pixels / ratio), limits))
    if not sizes:
        raise InvalidField("aspect_ratio", Shown(aspect_ratio), _allowed(pixels, width, height, limits))
    return min(sizes, key=lambda size: _distance(size, pixels, ratio))


def _legal_near(width: float, height: float, limits: Limits) -> list[tuple[int, int]]:
    """Sizes within the limits whose sides are next to these, one multiple more or less."""
    sizes = itertools.product(_multiples(width, limits.side_multiple), _multiples(height, limits.side_multiple))
    return [size for size in sizes if limits.allows(*size)]


def _multiples(side: float, multiple: int) -> list[int]:
    below = int(side // multiple) * multiple
    return [below - multiple, below, below + multiple, below + 2 * multiple]


def _distance(size: tuple[int, int], pixels: float, ratio: float) -> float:
    """How far a size is from what was asked: its shape, and half as much its area, by what factor they differ."""
    width, height = size
    return abs(math.log(width / height / ratio)) + abs(math.log(width * height / pixels)) / 2


def _allowed(pixels: float, width: int, height: int, limits: Limits) -> str:
    longest = min(limits.max_side, pixels / limits.min_side)
    steepest = max(1, math.floor(10 * longest * longest / pixels) / 10)
    allowed = f"up to {steepest:g}:1 or 1:{steepest:g} with {pixels / MEGAPIXEL:.2g} megapixels"
    ratio = max(width / height, height / width)
    least, most = max(limits.min_pixels, limits.min_side**2 * ratio), min(limits.max_pixels, limits.max_side**2 / ratio)
    if least <= most < pixels:
        return f"{allowed}, or at most {_rounded(most, math.floor):g} megapixels at {width}:{height}"
    if pixels < least <= most:
        return f"{allowed}, or at least {_rounded(least, math.ceil):g} megapixels at {width}:{height}"
    return allowed


def _rounded(pixels: float, to: Callable[[float], int]) -> float:
    """Megapixels, in two digits."""
    step = 10.0 ** (math.floor(math.log10(pixels / MEGAPIXEL)) - 1)
    return to(pixels / MEGAPIXEL / step) * step
