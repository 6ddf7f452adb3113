"""Makes a model's pictures, reads them and counts what is right."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor

from model.evaluation.checker import Checker, Reading
from model.evaluation.plan import BASE, Budget, Plan, Setting, settings_for, work
from model.evaluation.prompts import (
    EVALUATION_SEEDS,
    OPEN_PROMPT,
    OpenRequest,
    Request,
    drawings_of_open_prompt,
    open_requests,
    requests,
)
from model.evaluation.rendering import Renderer
from model.evaluation.scores import Count, Marks, count, distances, judge
from model.evaluation.subject import Card
from model.params import GenerationParams
from model.training.drawing import draw, pack

SEEDS = 8  # of the open prompt
SHOWN, SHOWN_OF_OTHERS = 64, 8  # pictures kept for the sheet: of the default setting, and of each other
THUMBNAIL = 192  # pixels, of the shorter side of the pictures that are kept


@dataclass(frozen=True, eq=False)
class Shown:
    """A picture that was judged, small. pixels: shape = (3, h, w), from -1 to 1."""

    pixels: Tensor
    request: Request
    reading: Reading
    marks: Marks


@dataclass(frozen=True)
class Result:
    """What one setting gave. `base`: what the same prompts gave by default; None if this is the default."""

    setting: str
    dtype: str
    pictures: int
    counts: dict[str, Count]
    base: dict[str, Count] | None = None


@dataclass(frozen=True)
class Removal:
    """What "red" as negative prompt does to pictures that show red where the colour is open.

    pairs : their prompts, shapes and seeds, found among `tried` pictures
    removed : how many of them then show no red thing; kept : how many still the shape that was asked for
    """

    tried: int
    pairs: tuple[OpenRequest, ...]
    removed: Count
    kept: Count


@dataclass(frozen=True)
class Diversity:
    """How far eight seeds of one open prompt differ, and as many drawings: mean distances over pairs.

    pixels : root mean square difference of 32 x 32 pixels from 0 to 1; places : of the surest thing, halves of a side
    """

    pixels: float
    places: float
    drawn_pixels: float
    drawn_places: float


@dataclass(eq=False)
class Evaluation:
    """All that was found of one model."""

    results: list[Result] = field(default_factory=list)
    removal: Removal | None = None
    diversity: Diversity | None = None
    shown: dict[str, list[Shown]] = field(default_factory=dict)


Say = Callable[[str], None]


class Evaluator:
    """Runs a plan on one model.

    renderers : gives the renderer of a dtype; it is closed here
    say : is told how far it is
    """

    def __init__(
        self, card: Card, longest: int, renderers: Callable[[str], Renderer], checker: Checker, plan: Plan, say: Say
    ) -> None:
        self.card, self.longest, self.renderers, self.checker = card, longest, renderers, checker
        self.plan, self.say = plan, say
        self.budget = Budget(plan.minutes)
        self.requests = requests(plan.prompts)
        self.marks: dict[str, dict[int, Marks]] = {}
        self.told = 0.0

    def run(self, dtype: str, known: Sequence[OpenRequest] = ()) -> Evaluation:
        """The whole plan in `dtype`, and the default in the others if the plan says so.

        known : open requests that showed red in an earlier evaluation of these weights: then no others are tried,
            and if the plan wants fewer, they are taken from all over them
        """
        found = Evaluation()
        settings = [s for s in settings_for(self.card) if max(s.width, s.height) <= self.longest]
        self._expect(settings, bool(known))
        renderer = self.renderers(dtype)
        try:
            self.budget.lanes = renderer.lanes
            for setting in settings:
                self._setting(found, setting, setting.name, renderer)
            found.diversity = self._diversity(renderer)
            if self.card.guided and self.plan.pairs:
                found.removal = self._removal(renderer, known)
        finally:
            renderer.close()
        for other in [name for name in self.plan.dtypes if name != dtype]:
            renderer = self.renderers(other)
            try:
                self._setting(found, settings[0], other, renderer)
            finally:
                renderer.close()
        return found

    def _expect(self, settings: Sequence[Setting], known: bool) -> None:
        """Count the work, for the time left."""
        plan, usual = self.plan, work(self.card.params("", 0))
        for setting in settings:
            number = plan.prompts if setting.name == BASE else plan.others
            self.budget.planned += sum(work(params) for params in setting.params(self.requests[:number], self.card))
        pictures = SEEDS + max(0, len(plan.dtypes) - 1) * plan.others
        if self.card.guided:
            pictures += 2 * plan.pairs if known else plan.pairs + min(plan.tries, 13 * plan.pairs)
        self.budget.planned += usual * pictures

    def _setting(self, found: Evaluation, setting: Setting, name: str, renderer: Renderer) -> None:
        number = self.plan.prompts if name == BASE else min(self.plan.others, self.plan.prompts)
        asked = self.requests[:number]
        marks: dict[int, Marks] = {}
        shown: dict[int, Shown] = {}
        label = f"{setting.width}x{setting.height}" + ("" if name == BASE else f" ({name})")
        for n, pixels in self._pictures(renderer, setting.params(asked, self.card), label):
            reading = self.checker.read(pixels[None])[0]
            marks[n] = judge(asked[n], reading)
            if n < (SHOWN if name == BASE else SHOWN_OF_OTHERS):
                shown[n] = Shown(thumbnail(pixels), asked[n], reading, marks[n])
        self.marks[name] = marks
        base = None
        if name != BASE:
            base = count(mark for n, mark in self.marks[BASE].items() if n in marks)
        found.results.append(Result(name, renderer.dtype, len(marks), count(marks.values()), base))
        found.shown[name] = [shown[n] for n in sorted(shown)]

    def _pictures(
        self, renderer: Renderer, wanted: Sequence[GenerationParams], label: str
    ) -> Iterator[tuple[int, Tensor]]:
        """Which of them, and its pixels from -1 to 1, shape = (3, h, w); says how far it is."""
        for made, (n, pixels) in enumerate(renderer.render(wanted, self.budget.go), 1):
            self.budget.made(wanted[n])
            yield n, pixels.permute(2, 0, 1).float() / 127.5 - 1
            if self.budget.elapsed - self.told > 10 or made == len(wanted):
                self.told = self.budget.elapsed
                self.say(
                    f"{label:<24}{made:>4} of {len(wanted):<5}{self.budget.elapsed:>5.0f} s  {self._left()}".rstrip()
                )

    def _left(self) -> str:
        left = self.budget.left
        return "" if math.isnan(left) else f"about {math.ceil(left / 60)} min left"

    def _diversity(self, renderer: Renderer) -> Diversity | None:
        wanted = [self.card.params(OPEN_PROMPT, EVALUATION_SEEDS + n) for n in range(SEEDS)]
        pictures = [pixels for _, pixels in self._pictures(renderer, wanted, f'"{OPEN_PROMPT}"')]
        if len(pictures) < 2:
            return None
        side = min(self.card.width, self.card.height)
        drawn = draw(pack(drawings_of_open_prompt(SEEDS)), side, side)
        made = torch.stack(pictures)
        return Diversity(*self._spread(made), *self._spread(drawn))

    def _spread(self, pixels: Tensor) -> tuple[float, float]:
        """Mean distances of pictures' pixels and of their surest things' places."""
        small = F.interpolate(pixels, (32, 32), mode="bilinear", antialias=True).flatten(1) / 2
        things = [reading.things[0] for reading in self.checker.read(pixels) if reading.things]
        return distances(small.tolist()), distances([(thing.x, thing.y) for thing in things])

    def _removal(self, renderer: Renderer, known: Sequence[OpenRequest]) -> Removal:
        """Looks for pictures of which the asked shape is red, and makes each again with "red" as negative prompt."""
        pairs: list[OpenRequest] = []
        removed: list[bool] = []
        kept: list[bool] = []
        tried = 0
        spread = known[:: max(1, len(known) // self.plan.pairs)]
        among = iter(spread) if known else islice(open_requests(), self.plan.tries)
        while len(pairs) < self.plan.pairs and (some := list(islice(among, max(1, self.plan.pairs)))):
            wanted = [self.card.params(one.prompt, one.seed) for one in some]
            seen = {n: self.checker.read(x[None])[0] for n, x in self._pictures(renderer, wanted, "looking for red")}
            tried += len(seen)
            red = [some[n] for n in sorted(seen) if _shows(seen[n], some[n].shape, "red")]
            red = red[: self.plan.pairs - len(pairs)]
            again = [replace(self.card.params(one.prompt, one.seed), negative_prompt="red") for one in red]
            for n, pixels in self._pictures(renderer, again, 'without "red"'):
                reading = self.checker.read(pixels[None])[0]
                pairs.append(red[n])
                removed.append(all(thing.colour != "red" for thing in reading.things))
                kept.append(any(thing.shape == red[n].shape for thing in reading.things))
            if len(seen) < len(some):  # the time is up
                break
        return Removal(tried, tuple(pairs), Count(sum(removed), len(removed)), Count(sum(kept), len(kept)))


def _shows(reading: Reading, shape: str, colour: str) -> bool:
    return any((thing.shape, thing.colour) == (shape, colour) for thing in reading.things)


def thumbnail(pixels: Tensor) -> Tensor:
    """A picture at the size at which it is kept. shape = (3, h, w)."""
    height, width = pixels.shape[-2:]
    scale = THUMBNAIL / min(height, width)
    size = [round(side * scale) for side in (height, width)]
    return F.interpolate(pixels[None], size, mode="bilinear", antialias=True)[0]
