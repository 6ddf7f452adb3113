"""Line charts as PNG, drawn with Pillow."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT, MARGIN = 560, 400, 70
COLORS = ("#888888", "#d9822b", "#2563c9", "#2e9e5b")
GRID, INK = "#dddddd", "#222222"


@dataclass(frozen=True)
class Chart:
    """One panel: a line for each name, over the same x."""

    title: str
    x_label: str
    xs: Sequence[float]
    lines: Mapping[str, Sequence[float]]
    log: bool = False  # the y axis
    top: float | None = None

    @property
    def bounds(self) -> tuple[float, float]:
        """Lowest and highest y."""
        values = [value for line in self.lines.values() for value in line]
        if self.log:
            low = math.floor(math.log10(min(values)))
            return 10**low, 10 ** max(low + 1, math.ceil(math.log10(max(values))))
        return 0.0, self.top or 1.1 * max(values)

    def ticks(self) -> list[float]:
        """Where the y axis has lines."""
        low, high = self.bounds
        if self.log:
            powers = range(round(math.log10(low)), round(math.log10(high)) + 1)
            return [m * 10.0**n for n in powers for m in (1, 2, 5) if m * 10.0**n <= high]
        return [low + (high - low) * n / 5 for n in range(6)]

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Pixels of a point in the panel."""
        low, high = self.bounds
        share = math.log(y / low) / math.log(high / low) if self.log else (y - low) / (high - low)
        across = (x - self.xs[0]) / ((self.xs[-1] - self.xs[0]) or 1)
        return MARGIN + across * (WIDTH - 1.4 * MARGIN), HEIGHT - MARGIN - share * (HEIGHT - 2 * MARGIN)


def save(charts: Sequence[Chart], path: Path) -> None:
    """The charts side by side."""
    image = Image.new("RGB", (WIDTH * len(charts), HEIGHT), "white")
    for n, chart in enumerate(charts):
        panel = Image.new("RGB", (WIDTH, HEIGHT), "white")
        _draw(ImageDraw.Draw(panel), chart)
        image.paste(panel, (n * WIDTH, 0))
    image.save(path)


def _draw(draw: ImageDraw.ImageDraw, chart: Chart) -> None:
    small, large = ImageFont.load_default(12), ImageFont.load_default(15)
    draw.text((MARGIN, 14), chart.title, fill=INK, font=large)
    left, right = chart.place(chart.xs[0], chart.bounds[1])[0], chart.place(chart.xs[-1], chart.bounds[1])[0]
    for tick in chart.ticks():
        y = chart.place(chart.xs[0], tick)[1]
        draw.line([(left, y), (right, y)], fill=GRID)
        draw.text((left - 8, y), f"{tick:g}", fill=INK, font=small, anchor="rm")
    for x in chart.xs:
        draw.text(
            (chart.place(x, chart.bounds[1])[0], HEIGHT - MARGIN + 10), f"{x:g}", fill=INK, font=small, anchor="mt"
        )
    draw.text(((left + right) / 2, HEIGHT - MARGIN + 30), chart.x_label, fill=INK, font=small, anchor="mt")
    for n, (name, line) in enumerate(chart.lines.items()):
        color = COLORS[n % len(COLORS)]
        points = [chart.place(x, y) for x, y in zip(chart.xs, line, strict=True)]
        draw.line(points, fill=color, width=3)
        for x, y in points:
            draw.ellipse([x - 4, y - 4, x + 4, y + 4], fill=color)
        draw.text((left + 8 + n * 130, 40), f"- {name}", fill=color, font=small)
