"""Where training's pictures and captions come from: our own drawings, a folder of pictures, or a function of yours."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from model.training.canvas import View
from model.training.captions import caption
from model.training.drawing import WIDTH, draw, pack
from model.training.scenes import DATA_VERSION, sample_scene

HELD_OUT_SEEDS = 1 << 40
"""Pictures from this seed on are for looking and measuring, never for training."""


@dataclass(frozen=True)
class Frame:
    """The pixels that are wanted of each picture: all of it, or a window of a larger one.

    largest : the longest side of the pictures that windows are cut from; None for whole pictures
    """

    height: int
    width: int
    largest: int | None = None

    @property
    def pixels(self) -> int:
        """How many."""
        return self.height * self.width

    @property
    def shorter(self) -> int:
        """The shorter side."""
        return min(self.height, self.width)


class Source(Protocol):
    """Pictures by seed: the same seed always gives the same picture and caption."""

    @property
    def name(self) -> str:
        """What the record of a training says of it."""

    def chunk(self, frame: Frame) -> int:
        """How many pictures a process should read at once."""

    def read(self, seeds: Sequence[int], frame: Frame) -> tuple[np.ndarray, list[str]]:
        """Pictures as numbers that travel between processes, one row each, and their captions. Runs in any process."""

    def pixels(self, rows: Tensor, frame: Frame, device: torch.device) -> Tensor:
        """Those rows as pictures on the device: shape = (rows, 3, height, width), float32 from -1 to 1."""

    def captions(self) -> Iterable[str]:
        """Captions enough to make tokenizers of."""


class Drawings:
    """Our own scenes: they travel packed and are painted on the device at any size."""

    name = f"drawings of version {DATA_VERSION}"

    def chunk(self, frame: Frame) -> int:  # noqa: ARG002
        """Packed scenes are small whatever their frame."""
        return 64

    def read(self, seeds: Sequence[int], frame: Frame) -> tuple[np.ndarray, list[str]]:
        """Packed scenes, and with windows where they lie: shape = (seeds, WIDTH) or (seeds, WIDTH + 3)."""
        scenes = [sample_scene(seed) for seed in seeds]
        rows = pack(scenes).numpy()
        if frame.largest is not None:
            rows = np.concatenate([rows, np.array([_window(seed, frame) for seed in seeds], dtype=np.float32)], axis=1)
        return rows, [caption(scene, Random(~seed)) for scene, seed in zip(scenes, seeds, strict=True)]

    def pixels(self, rows: Tensor, frame: Frame, device: torch.device) -> Tensor:
        """Paints them."""
        view = None
        if frame.largest is not None:
            side, top, left = rows[:, WIDTH:].unbind(1)
            view = View(side, side, top, left)
        return draw(rows[:, :WIDTH], frame.height, frame.width, device, view)

    def captions(self) -> Iterable[str]:
        """Of the scenes of some thousand seeds."""
        return (caption(sample_scene(seed), Random(seed)) for seed in range(4000))


def _window(seed: int, frame: Frame) -> tuple[float, float, float]:
    """The side of a square picture, and the window's top and left in it, pixels; sides are log-uniform."""
    rng = Random(~seed)
    shortest = max(frame.height, frame.width)
    side = round(math.exp(rng.uniform(math.log(shortest), math.log(max(shortest, frame.largest or 0)))))
    return side, rng.randint(0, side - frame.height), rng.randint(0, side - frame.width)
