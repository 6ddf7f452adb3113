"""The colours that captions name, and how far apart two of them are."""

from __future__ import annotations

import math

RGB = tuple[float, float, float]

# The order counts: with scenes.SHAPES it fixes which combinations are held out. Append, never reorder.
COLOURS: dict[str, RGB] = {
    "red": (0.89, 0.18, 0.20),
    "orange": (0.97, 0.54, 0.13),
    "yellow": (0.99, 0.83, 0.20),
    "green": (0.22, 0.66, 0.32),
    "blue": (0.17, 0.42, 0.88),
    "purple": (0.50, 0.27, 0.75),
    "pink": (0.97, 0.55, 0.72),
    "white": (0.97, 0.97, 0.96),
    "black": (0.10, 0.10, 0.12),
    "teal": (0.08, 0.62, 0.63),
    "brown": (0.52, 0.33, 0.19),
    "grey": (0.56, 0.58, 0.61),
}

PAPER: RGB = (0.985, 0.97, 0.935)

LIGHT_COLOURS = ("orange", "yellow", "green", "blue", "purple", "pink", "teal", "grey")
DARK_COLOURS = ("red", "green", "blue", "purple", "teal", "grey")


def mix(first: RGB, second: RGB, share: float) -> RGB:
    """`share` of `second` in `first`."""
    r, g, b = (a + (c - a) * share for a, c in zip(first, second, strict=True))
    return r, g, b


def tone(colour: str, tone: str = "plain") -> RGB:
    """The RGB of a named colour, `plain`, `light` (mixed with white) or `dark` (with a deep blue black)."""
    if tone == "light":
        return mix(COLOURS[colour], (1.0, 1.0, 1.0), 0.62)
    if tone == "dark":
        return mix(COLOURS[colour], (0.03, 0.03, 0.07), 0.58)
    return COLOURS[colour]


def contrast(first: RGB, second: RGB) -> float:
    """Euclidean distance in RGB, green counting more as the eye has it; black to white is about 1.0."""
    weights = (0.30, 0.50, 0.20)
    return math.sqrt(sum(w * (a - b) ** 2 for w, a, b in zip(weights, first, second, strict=True)))


def accent(role: str, colour: str) -> RGB:
    """The colour of a thing's lesser part, by its role and the name of the thing's main colour.

    `dark` and `pale` are shades of the main colour; `wood` is of a trunk, `centre` of a flower.
    """
    if role == "dark":
        return mix(COLOURS[colour], (0.07, 0.06, 0.12), 0.45) if colour != "black" else (0.36, 0.37, 0.40)
    if role == "pale":
        return mix(COLOURS[colour], (1.0, 1.0, 1.0), 0.70) if colour != "white" else (0.80, 0.83, 0.87)
    if role == "wood":
        return (0.47, 0.31, 0.20) if colour not in ("brown", "black") else (0.33, 0.22, 0.15)
    if role == "centre":
        return COLOURS["white"] if colour in ("yellow", "orange") else COLOURS["yellow"]
    raise ValueError(f"unknown role {role!r}; known are dark, pale, wood and centre")
