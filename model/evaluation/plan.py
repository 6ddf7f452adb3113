"""What an evaluation makes, in which order and within which time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from model.evaluation.prompts import Request
from model.evaluation.subject import DTYPES, Card
from model.params import SIDE_MULTIPLE, GenerationParams

BASE = "default"
UNGUIDED = "guidance 1"


@dataclass(frozen=True)
class Plan:
    """How much is made. minutes: after which no picture is begun; None: as long as it takes."""

    prompts: int = 200  # at the default size
    others: int = 200  # at each other size, without guidance and in the other precision
    pairs: int = 100  # for the negative prompt
    tries: int = 3000  # pictures among which the pairs are looked for
    dtypes: tuple[str, ...] = tuple(DTYPES)  # in which the default size is made once more
    minutes: float | None = None

    def limited(self, prompts: int) -> Plan:
        """No more than so many prompts of anything."""
        least = min(prompts, self.others), min(prompts, self.pairs), min(self.tries, 5 * prompts)
        return replace(self, prompts=prompts, others=least[0], pairs=least[1], tries=least[2])


FULL = Plan()
SAMPLE = Plan(prompts=40, others=8, pairs=8, tries=120, dtypes=(), minutes=11.5)
"""Two CPU cores make it in twelve minutes."""


@dataclass(frozen=True)
class Setting:
    """One way in which the requests are made."""

    name: str
    width: int
    height: int
    guidance_scale: float

    def params(self, requests: Sequence[Request], card: Card) -> list[GenerationParams]:
        """What the model is asked for."""
        size = {"width": self.width, "height": self.height, "guidance_scale": self.guidance_scale}
        return [replace(card.params(one.prompt, one.seed), **size) for one in requests]  # type: ignore[arg-type]


def settings_for(card: Card) -> list[Setting]:
    """The default first, then wide, tall, large (of a default of 512x512: 768x512, 512x768, 1024x1024) and unguided."""
    wide, tall = (round(1.5 * side / SIDE_MULTIPLE) * SIDE_MULTIPLE for side in (card.width, card.height))
    sizes = [(wide, card.height), (card.width, tall), (2 * card.width, 2 * card.height)]
    settings = [Setting(BASE, card.width, card.height, card.guidance_scale)]
    settings += [Setting(f"{width}x{height}", width, height, card.guidance_scale) for width, height in sizes]
    if card.guided:
        settings.append(Setting(UNGUIDED, card.width, card.height, 1.0))
    return settings


def work(params: GenerationParams) -> float:
    """What a picture costs, about, in megapixel-steps; decoding is worth three."""
    return params.width * params.height / 1e6 * (params.steps * params.rows + 3)


@dataclass
class Budget:
    """The time an evaluation has, and how fast it is.

    lanes : pictures that are made at a time; the first of each lane tell nothing, for processes begin with loading
    clock : gives seconds
    """

    minutes: float | None
    lanes: int = 1
    clock: Callable[[], float] = time.monotonic
    planned: float = 0.0  # megapixel-steps
    done: float = 0.0
    pictures: int = 0
    refused: bool = False

    def __post_init__(self) -> None:
        self.started = self.clock()
        self.mark = 0.0, 0.0  # seconds and megapixel-steps when the lanes were warm

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return self.clock() - self.started

    @property
    def pace(self) -> float:
        """Seconds for a megapixel-step, all lanes together; NaN while nothing is known."""
        if self.pictures <= self.lanes:
            return math.nan
        return (self.elapsed - self.mark[0]) / (self.done - self.mark[1])

    @property
    def left(self) -> float:
        """Seconds until all is made or the time is up; NaN while nothing is known."""
        rest = self.pace * max(0.0, self.planned - self.done)
        return rest if self.minutes is None or math.isnan(rest) else min(rest, max(0.0, self._until_late))

    @property
    def _until_late(self) -> float:
        return math.inf if self.minutes is None else 60 * self.minutes - self.elapsed

    def go(self, params: GenerationParams) -> bool:
        """Whether a picture that is begun now would be ready in time."""
        seconds = 0.0 if math.isnan(self.pace) else self.pace * self.lanes * work(params)
        fits = seconds <= self._until_late
        self.refused |= not fits
        return fits

    def made(self, params: GenerationParams) -> None:
        """A picture is ready."""
        self.done += work(params)
        self.pictures += 1
        if self.pictures == self.lanes:
            self.mark = self.elapsed, self.done
