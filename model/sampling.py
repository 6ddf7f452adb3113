"""Rectified flow: noise, sigmas, and solvers written as three numbers a step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from model.params import Sampler

SHIFT = 3.0
"""Of the published models' schedules."""

TRAIN_STEPS = 1000


@dataclass(frozen=True)
class Stretched:
    """A timestep shift whose levels are then stretched: the last one before 0 is `terminal`.

    The published levels end at 0.009, so a run of few steps wastes one. diffusers has the same as `shift_terminal`.
    """

    shift: float
    terminal: float  # above 0, below 1


Shift = float | Stretched
"""How the noise levels of a run are spaced."""


class Step(NamedTuple):
    """One solver step: x' = keep * x + denoised * D + previous * D_previous, with D = x - sigma * velocity, guided.

    Euler and DPM++ 2M are both of this form, so rows of different samplers, lengths and times can share one batch.
    """

    sigma: float
    keep: float
    denoised: float
    previous: float


def shifted(t: float, shift: float = SHIFT) -> float:
    """The timestep shift of SD3 (arXiv:2403.03206, section 5.3.2): more steps at high noise for large pictures."""
    return shift * t / (1 + (shift - 1) * t)


def sigmas(steps: int, shift: Shift = SHIFT) -> tuple[float, ...]:
    """The noise levels of a run, from 1 down to 0; `steps` + 1 of them.

    The published schedule shifts its lower end twice, so the last level before 0 is 0.0089 for shift 3.
    """
    if isinstance(shift, Stretched):
        return _stretched(sigmas(steps, shift.shift), shift.terminal)
    low = shifted(1 / TRAIN_STEPS, shift)
    stride = (1 - low) / (steps - 1) if steps > 1 else 0.0
    return (*(shifted(1 - i * stride, shift) for i in range(steps)), 0.0)


def _stretched(levels: tuple[float, ...], terminal: float) -> tuple[float, ...]:
    """Levels from 1 down, the last one before 0 moved to `terminal` and the others in proportion."""
    if len(levels) < 3:
        return levels
    scale = (1 - terminal) / (1 - levels[-2])
    return (*(1 - (1 - level) * scale for level in levels[:-1]), 0.0)


def euler(levels: Sequence[float]) -> list[Step]:
    """Euler's method on dx / dsigma = velocity."""
    return [Step(s, s_next / s, 1 - s_next / s, 0.0) for s, s_next in pairwise(levels)]


def dpmpp_2m(levels: Sequence[float]) -> list[Step]:
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv:2211.01095) with lambda = -ln sigma, as Stability's reference runs it.

    First order on the first step and on the step to sigma 0.
    """
    steps: list[Step] = []
    h_previous = None
    for s, s_next in pairwise(levels):
        ratio = s_next / s  # e^-h
        if h_previous is None or s_next == 0:
            steps.append(Step(s, ratio, 1 - ratio, 0.0))
        else:
            back = math.log(s / s_next) / (2 * h_previous)  # 1 / (2 r) with r = h_previous / h
            steps.append(Step(s, ratio, (1 - ratio) * (1 + back), -(1 - ratio) * back))
        h_previous = math.log(s / s_next) if s_next else None
    return steps


def schedule(sampler: Sampler, steps: int, shift: Shift = SHIFT) -> list[Step]:
    """The steps of a run."""
    solver = {"euler": euler, "dpmpp_2m": dpmpp_2m}[sampler]
    return solver(sigmas(steps, shift))


def noise(seed: int, width: int, height: int, channels: int = 16) -> Tensor:
    """The start of a picture, from its own CPU generator so that a seed means the same everywhere.

    width, height : pixels
    returns : shape = (channels, height/8, width/8), fp32, on the CPU
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn((channels, height // 8, width // 8), generator=generator, dtype=torch.float32)
