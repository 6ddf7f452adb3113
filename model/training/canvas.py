"""Where the pixels of a batch of pictures lie, and how much of each something covers."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from model.training.palette import RGB
from model.training.scenes import CELLS

HARD = 1e-5


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

    def rows(self, some: slice) -> View:
        """Of some of the pictures."""
        return View(self.height[some], self.width[some], self.top[some], self.left[some])


@dataclass(frozen=True)
class Canvas:
    """Pixels being painted, with where they lie: `x`, `y` in half shorter sides from the middle (y down).

    x : shape = (batch, 1, width)
    y : shape = (batch, height, 1)
    across, down : half the picture's width and height in the same unit. shape = (batch, 1, 1)
    pixel : the size of one; next to nothing in pixel art, whose edges are hard. shape = (batch, 1, 1)
    cells : whether it is pixel art. shape = (batch, 1, 1)
    """

    x: Tensor
    y: Tensor
    across: Tensor
    down: Tensor
    pixel: Tensor
    cells: Tensor

    @classmethod
    def blank(cls, view: View, height: int, width: int, cells: Tensor) -> Canvas:
        """Of `height` x `width` pixels; in pixel art each of them lies in the middle of its cell."""
        sides = (view.height, view.width, view.top, view.left)
        full_h, full_w, top, left = (side.to(cells.device, non_blocking=True)[:, None, None] for side in sides)
        short = torch.minimum(full_h, full_w)
        column = torch.arange(width, device=cells.device, dtype=torch.float32) + 0.5
        row = torch.arange(height, device=cells.device, dtype=torch.float32)[:, None] + 0.5
        x, y = (2 * (left + column) - full_w) / short, (2 * (top + row) - full_h) / short
        pixel = torch.where(cells, HARD, 2 / short)
        canvas = cls(x, y, full_w / short, full_h / short, pixel, cells)
        return replace(canvas, x=canvas.place(x, canvas.across), y=canvas.place(y, canvas.down))

    def place(self, along: Tensor, half: Tensor) -> Tensor:
        """A place on an axis that runs from -half to half; in pixel art that of the cell there."""
        cell = (torch.floor((along + half) * (CELLS / 2)) + 0.5) * (2 / CELLS) - half
        return torch.where(self.cells, cell, along)

    def moved(self, x: Tensor, y: Tensor) -> Canvas:
        """Seen from elsewhere: every pixel lies (x, y) further right and down. shape = (batch, 1, 1)."""
        return replace(self, x=self.x + x, y=self.y + y)

    def of(self, rows: Tensor) -> Canvas:
        """For some pictures of the batch, in any order."""
        return Canvas(*(getattr(self, field.name)[rows] for field in fields(self)))

    def coverage(self, distance: Tensor) -> Tensor:
        """How much of each pixel lies inside, for a distance in the canvas' unit. shape = (batch, 1, height, width)."""
        return (0.5 - distance / self.pixel).clamp(0.0, 1.0)[:, None]


def column(numbers: Tensor, index: int) -> Tensor:
    """One number a picture, of shape (batch, numbers), as (batch, 1, 1)."""
    return numbers[:, index, None, None]


def colour(numbers: Tensor, start: int) -> Tensor:
    """Three numbers a picture as its colour, (batch, 3, 1, 1)."""
    return numbers[:, start : start + 3, None, None]


def tint(rgb: RGB, like: Tensor) -> Tensor:
    """One colour for all, on the device of `like`. shape = (1, 3, 1, 1)."""
    return torch.tensor(rgb).to(like.device, non_blocking=True)[None, :, None, None]


def over(below: Tensor, above: Tensor, alpha: Tensor | float) -> Tensor:
    """`above` laid on `below`, as opaque as `alpha`."""
    return below + (above - below) * alpha
