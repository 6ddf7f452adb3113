"""The schedule of a flow training: which sizes when, how many pictures a step, and how noisy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from model.training.demo import T5_LENGTH
from model.training.sources import Frame
from model.training.tokenizers import CLIP_LENGTH

DEMO_TEXT_TOKENS = CLIP_LENGTH + T5_LENGTH
"""Of every picture, as the demo reads its caption."""

STEP_TOKENS = 80_000


@dataclass(frozen=True)
class Size:
    """What a step is made of: so many pictures of one height and width, in pixels."""

    height: int
    width: int
    batch: int

    def __post_init__(self) -> None:
        if self.height % 16 or self.width % 16 or min(self.height, self.width, self.batch) < 1:
            raise ValueError(f"size is {self}, expected sides that are multiples of 16")

    @classmethod
    def of(cls, height: int, width: int, tokens: int = STEP_TOKENS) -> Size:
        """As many pictures as make about `tokens` tokens, text included: every step then takes about as long."""
        batch = tokens // (height * width // 256 + DEMO_TEXT_TOKENS)
        return cls(height, width, max(1, batch - batch % 8 if batch > 8 else batch))

    @property
    def frame(self) -> Frame:
        """Of each picture."""
        return Frame(self.height, self.width)

    @property
    def shift(self) -> float:
        """The timestep shift: 3 at 256x256, 5 at 512x512, 8.5 at one megapixel.

        Colours and places are decided where they can just be seen through the noise. The more pixels show them, the
        more noise that is, so the larger the shift must be for the training to see the sigmas that decide.
        """
        return 3.0 * (self.frame.pixels / 256**2) ** 0.375

    def __str__(self) -> str:
        return f"{self.batch} x {self.width}x{self.height}"


@dataclass(frozen=True)
class Phase:
    """A part of the schedule: until which fraction of it, and its sizes; each step takes one at random."""

    until: float
    sizes: tuple[Size, ...]


Plan = tuple[Phase, ...]


def demo_plan(tokens: int = STEP_TOKENS) -> Plan:
    """Small pictures first: most is learnt on them, and they are four times as many. The largest come last."""
    small, square, large = (Size.of(side, side, tokens) for side in (256, 512, 1024))
    wide, tall = Size.of(512, 768, tokens), Size.of(768, 512, tokens)
    huge = (large, Size.of(832, 1216, tokens), Size.of(1216, 832, tokens))
    return (
        Phase(0.40, (small,)),
        Phase(0.85, (square, square, square, wide, tall)),
        Phase(1.00, (*huge, square, square, wide, tall)),
    )


def plan_of(sizes: Sequence[tuple[int, int]], tokens: int = STEP_TOKENS) -> Plan:
    """One phase of sizes given as (width, height)."""
    return (Phase(1.0, tuple(Size.of(height, width, tokens) for width, height in sizes)),)


def within(plan: Plan, shorter: int) -> Plan:
    """The plan without sizes whose shorter side is longer than `shorter`. Errors: ValueError if nothing is left."""
    kept = [replace(phase, sizes=tuple(s for s in phase.sizes if s.frame.shorter <= shorter)) for phase in plan]
    kept = [phase for phase in kept if phase.sizes]
    if not kept:
        smallest = min(size.frame.shorter for phase in plan for size in phase.sizes)
        raise ValueError(f"most pictures are below {smallest} pixels a side ({shorter}): give smaller sizes")
    return (*kept[:-1], replace(kept[-1], until=1.0))


def phase_at(plan: Plan, fraction: float) -> Phase:
    """The phase at a fraction of the schedule."""
    return next((phase for phase in plan if fraction < phase.until), plan[-1])
