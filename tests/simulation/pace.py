"""How long a GPU takes for a batch: a line by tokens for each network and size, through what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import linear_regression
from typing import Final

from model.text import CLIP_LENGTH, T5_LENGTH
from model.work import image_tokens

TEXT_TOKENS = CLIP_LENGTH + T5_LENGTH

SOLO_S: Final[dict[tuple[str, int], tuple[int, float]]] = {
    ("large", 512): (8, 0.618),
    ("large", 1024): (8, 1.663),
    ("large-turbo", 512): (4, 0.253),
    ("large-turbo", 1024): (4, 0.510),
    ("medium", 512): (8, 0.287),
    ("medium", 1024): (8, 0.789),
}
"""Steps, and seconds of such a picture alone: RESULTS.md, one H100, "Seconds alone"."""

EIGHT_STEP_S: Final[dict[tuple[str, int], tuple[float, float]]] = {
    ("large", 512): (2 * 80 / 28, 0.1465),
    ("medium", 512): (2 * 80 / 29, 0.0759),
}
"""Mean rows and seconds of a batch of eight guided jobs: RESULTS.md, one H100, "The engine's own time"."""

FULL_S: Final[dict[tuple[str, int], tuple[int, float]]] = {("large", 1024): (28, 5.57), ("medium", 1024): (40, 3.54)}
"""Steps, and seconds of a picture end to end: tests/gpu/RESULTS.md."""

T5_S: Final = (0.0392, 0.0691)
"""Seconds of T5-XXL for one row and for eight, on the same GPU; of all three encoders nothing else was measured."""

NOISE_S = 0.001
"""Seconds to draw one picture's noise on the CPU: assumed; its share is part of what was measured as a whole."""

NETS: Final = {"large": "large", "large-turbo": "large", "medium": "medium"}
"""Turbo is Large with other weights: equally fast, row for row."""


@dataclass(frozen=True)
class Line:
    """Seconds of a batch: so many however small, and so many more for each row."""

    fixed_s: float
    row_s: float

    def __call__(self, rows: float) -> float:
        return self.fixed_s + self.row_s * rows


@dataclass(frozen=True)
class Pace:
    """Seconds of every stage. What was not measured is not known: KeyError."""

    text: Mapping[str, Line]  # by model
    denoise: Mapping[tuple[str, int], Line]  # by model and side
    decode_s: Mapping[tuple[str, int], float]
    noise_s: float = NOISE_S
    text_tokens: int = TEXT_TOKENS  # of one row of a step

    def seconds(self, model: str, side: int, stage: str, rows: int) -> float:
        """Of a batch of so many rows."""
        match stage:
            case "text_encode":
                return self.text[model](rows)
            case "noise":
                return self.noise_s * rows
            case "denoise":
                return self.denoise[model, side](rows)
        return self.decode_s[model, side] * rows

    def solo_s(self, model: str, side: int, steps: int, rows: int) -> float:
        """Of a picture alone, with so many rows a step."""
        opening = self.text[model](rows) + self.noise_s
        return opening + steps * self.denoise[model, side](rows) + self.decode_s[model, side]

    def token_us(self, model: str, side: int) -> float:
        """Microseconds of a step for each token more."""
        return 1e6 * self.denoise[model, side].row_s / tokens_of(side)


def tokens_of(side: int, text_tokens: int = TEXT_TOKENS) -> int:
    """Joint tokens of one row."""
    return image_tokens(side, side) + text_tokens


def rows_of(model: str) -> int:
    """Rows of one picture's step: Turbo is not guided."""
    return 1 if model == "large-turbo" else 2


def h100() -> Pace:
    """One H100, full-size networks, bf16, nothing compiled.

    Two solo times of one size differ only in steps, so they give the step (Large and Medium at 1024x1024) and what is
    beside the steps: 0.100 s for both. Of that, text takes as long as T5's line says and 9 ms more for the other two;
    the rest is decoding, by pixels. What is left of the other solo times is their steps.
    """
    t5_row = (T5_S[1] - T5_S[0]) / 7
    text = Line(T5_S[0] - t5_row + 0.009, t5_row)
    step = {name: _difference(SOLO_S[name], FULL_S[name]) for name in FULL_S}
    beside = [SOLO_S[name][1] - SOLO_S[name][0] * step[name] for name in FULL_S]
    decode_1024 = sum(beside) / len(beside) - text(2) - NOISE_S
    decode = {side: decode_1024 * (side / 1024) ** 2 for side in (512, 1024)}

    def points(net: str, side: int) -> list[tuple[float, float]]:
        found = [(2.0, step[net, side])] if (net, side) in step else []
        for (model, measured_side), (steps, seconds) in SOLO_S.items():
            if NETS[model] == net and measured_side == side and (model, side) not in step:
                rows = rows_of(model)
                found.append((rows, (seconds - text(rows) - NOISE_S - decode[side]) / steps))
        if (net, side) in EIGHT_STEP_S:
            found.append(EIGHT_STEP_S[net, side])
        return found

    lines = {(net, side): line(points(net, side)) for net in ("large", "medium") for side in (512, 1024)}
    return Pace(
        text=dict.fromkeys(NETS, text),
        denoise={(model, side): lines[net, side] for model, net in NETS.items() for side in (512, 1024)},
        decode_s={(model, side): decode[side] for model in NETS for side in (512, 1024)},
    )


def _difference(few: tuple[int, float], many: tuple[int, float]) -> float:
    """Seconds of a step, by two pictures of few and of many."""
    return (many[1] - few[1]) / (many[0] - few[0])


def line(points: list[tuple[float, float]]) -> Line:
    """Through one point from the origin, through more by least squares."""
    if len(points) == 1:
        ((rows, seconds),) = points
        return Line(0.0, seconds / rows)
    fit = linear_regression(*zip(*points, strict=True))
    return Line(fit.intercept, fit.slope)
