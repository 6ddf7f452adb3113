"""Rectified flow: noise, sigmas, and solvers written as three numbers a step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from model.params import Sampler

TRAIN_STEPS = 1000

T = TypeVar("T", float, Tensor)


@dataclass(frozen=True)
class Growth:
    """A timestep shift that grows with the picture: its logarithm is linear in the image's tokens.

    In a large picture the same noise hides less, so what decides where things are comes at higher sigmas
    (arXiv:2403.03206, section 5.3.2). diffusers has it as `use_dynamic_shifting`, and the names are its own.
    """

    base_shift: float = 0.5  # the logarithm for base_image_seq_len tokens
    max_shift: float = 1.15
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096  # 1024x1024

    def logarithm(self, tokens: int) -> float:
        """Of the shift for an image of so many tokens."""
        slope = (self.max_shift - self.base_shift) / (self.max_image_seq_len - self.base_image_seq_len)
        return self.base_shift + slope * (tokens - self.base_image_seq_len)


@dataclass(frozen=True)
class Shift:
    """How the sigmas of a run, its noise levels, are spaced.

    by : the timestep shift, one for all pictures or one that grows with them
    terminal : where the last sigma before 0 is then moved to, and the others in proportion; 0: it stays. The published
        ones end at 0.009, so a run of few steps wastes one. diffusers has the same as `shift_terminal`.
    """

    by: float | Growth = 3.0
    terminal: float = 0.0

    def factor(self, tokens: int) -> float:
        """The timestep shift for an image of so many tokens."""
        return math.exp(self.by.logarithm(tokens)) if isinstance(self.by, Growth) else self.by


SHIFT = Shift()
"""Of the published models' schedules."""


class Step(NamedTuple):
    """One solver step: x' = keep * x + denoised * D + previous * D_previous, with D = x - sigma * velocity, guided.

    Euler and DPM++ 2M are both of this form, so rows of different samplers, lengths and times can share one batch.
    """

    sigma: float
    keep: float
    denoised: float
    previous: float


def shifted(t: T, shift: float) -> T:
    """The timestep shift of SD3 (arXiv:2403.03206, section 5.3.2): more steps at high noise for large pictures."""
    return shift * t / (1 + (shift - 1) * t)


def sigmas(steps: int, shift: Shift = SHIFT, tokens: int = 4096) -> tuple[float, ...]:
    """The noise levels of a run, from 1 down to 0; `steps` + 1 of them.

    The published schedule shifts its lower end twice, so the last sigma before 0 is 0.0089 for shift 3; one that grows
    with the picture shifts it once.

    tokens : of the image, which a shift may grow with; by default of 1024x1024
    """
    factor, low = shift.factor(tokens), 1 / TRAIN_STEPS
    if not isinstance(shift.by, Growth):
        low = shifted(low, factor)
    stride = (1 - low) / (steps - 1) if steps > 1 else 0.0
    spaced = (*(shifted(1 - i * stride, factor) for i in range(steps)), 0.0)
    return _stretched(spaced, shift.terminal) if shift.terminal else spaced


def _stretched(sigmas: tuple[float, ...], terminal: float) -> tuple[float, ...]:
    """Sigmas from 1 down, the last one before 0 moved to `terminal` and the others in proportion."""
    if len(sigmas) < 3:
        return sigmas
    scale = (1 - terminal) / (1 - sigmas[-2])
    return (*(1 - (1 - sigma) * scale for sigma in sigmas[:-1]), 0.0)


def euler(sigmas: Sequence[float]) -> list[Step]:
    """Euler's method on dx / dsigma = velocity."""
    return [Step(s, s_next / s, 1 - s_next / s, 0.0) for s, s_next in pairwise(sigmas)]


def dpmpp_2m(sigmas: Sequence[float]) -> list[Step]:
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv:2211.01095) with lambda = -ln sigma, as Stability's reference runs it.

    First order on the first step and on the step to sigma 0.
    """
    steps: list[Step] = []
    h_previous = None
    for s, s_next in pairwise(sigmas):
        ratio = s_next / s  # e^-h
        if h_previous is None or s_next == 0:
            steps.append(Step(s, ratio, 1 - ratio, 0.0))
        else:
            back = math.log(s / s_next) / (2 * h_previous)  # 1 / (2 r) with r = h_previous / h
            steps.append(Step(s, ratio, (1 - ratio) * (1 + back), -(1 - ratio) * back))
        h_previous = math.log(s / s_next) if s_next else None
    return steps


def schedule(sampler: Sampler, steps: int, shift: Shift = SHIFT, tokens: int = 4096) -> list[Step]:
    """The steps of a run for an image of so many tokens."""
    solver = {"euler": euler, "dpmpp_2m": dpmpp_2m}[sampler]
    return solver(sigmas(steps, shift, tokens))


def noise(seed: int, width: int, height: int, channels: int = 16) -> Tensor:
    """The start of a picture, from its own CPU generator so that a seed means the same everywhere.

    width, height : pixels
    returns : shape = (channels, height/8, width/8), fp32, on the CPU
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn((channels, height // 8, width // 8), generator=generator, dtype=torch.float32)
