"""A run of few steps as windows, and where a guided teacher's ODE leads across one."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from model.mmdit import MMDiT
from model.sampling import Shift, shifted, sigmas
from model.training.teacher import Teacher, Texts


@dataclass(frozen=True)
class Window:
    """One step of the student: from one sigma to the next, and the teacher's sigmas between them."""

    sigmas: tuple[float, ...]  # falling

    @property
    def start(self) -> float:
        """The sigma that the student sees."""
        return self.sigmas[0]

    @property
    def end(self) -> float:
        """The sigma that it steps to."""
        return self.sigmas[-1]


def windows(steps: int, shift: Shift, substeps: int, tokens: int) -> list[Window]:
    """The windows of a run for an image of so many tokens; sigmas in each are spaced as the schedule spaces its own."""
    factor = shift.factor(tokens)
    found = []
    for start, end in pairwise(sigmas(steps, shift, tokens)):
        first, last = shifted(start, 1 / factor), shifted(end, 1 / factor)
        between = [shifted(first + (last - first) * n / substeps, factor) for n in range(1, substeps)]
        found.append(Window((start, *between, end)))
    return found


def velocity(mmdit: MMDiT, x: Tensor, sigma: float | Tensor, texts: Texts) -> Tensor:
    """What a net says without guidance, in fp32. x : shape = (batch, 16, h/8, w/8); sigma : a number, for all rows."""
    timestep = 1000 * torch.as_tensor(sigma, dtype=torch.float32, device=x.device).expand(len(x))
    found: Tensor = mmdit(x, timestep, texts.context, texts.pooled)
    return found.float()


def with_empty(texts: Texts, teacher: Teacher) -> Texts:
    """Texts and behind them, for each, the empty prompt."""
    return Texts(
        torch.cat([texts.context, teacher.empty.context.expand_as(texts.context)]),
        torch.cat([texts.pooled, teacher.empty.pooled.expand_as(texts.pooled)]),
    )


def guided(teacher: Teacher, x: Tensor, window: Window, texts: Texts, scale: float) -> Tensor:
    """Where the guided teacher's ODE leads from the window's start to its end, by Euler's method."""
    both = with_empty(texts, teacher) if scale > 1 else texts
    for sigma, after in pairwise(window.sigmas):
        if scale > 1:
            v, v_empty = velocity(teacher.mmdit, torch.cat([x, x]), sigma, both).chunk(2)
            v = v_empty + scale * (v - v_empty)
        else:
            v = velocity(teacher.mmdit, x, sigma, texts)
        x = x + (after - sigma) * v
    return x
