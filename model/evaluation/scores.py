"""How far a picture is what was asked for: the checker's reading against the request; shares with their intervals."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations

from model.evaluation.checker import Reading, Seen
from model.evaluation.prompts import Asked, Request

SCORES = ("colour", "shape", "position", "style", "background", "number")
"""What is counted: of things, colour and shape; of statements, position or relation; the rest of pictures."""

BESIDE = 0.25  # a side begins so far from the middle, in halves of the picture
AROUND = 0.35  # and the centre ends here
ALONG = 0.5  # what is on a side, and in no corner, is at most so far from that side's middle
APART = 0.1  # what is left of something is so much farther left


@dataclass(frozen=True)
class ThingMarks:
    """What became of a thing. `position` is None where no place was stated."""

    asked: Asked
    seen: Seen | None
    colour: bool
    shape: bool
    position: bool | None


@dataclass(frozen=True)
class Marks:
    """What became of a request. `relation` is None where none was stated."""

    things: tuple[ThingMarks, ...]
    relation: bool | None
    style: bool
    background: bool
    number: bool

    def of(self, score: str) -> list[bool]:
        """The marks that count for one of SCORES."""
        if score in ("colour", "shape"):
            return [getattr(thing, score) for thing in self.things]
        if score == "position":
            stated = [*(thing.position for thing in self.things), self.relation]
            return [mark for mark in stated if mark is not None]
        return [getattr(self, score)]


@dataclass(frozen=True)
class Count:
    """So many right of so many asked."""

    right: int = 0
    asked: int = 0

    @property
    def share(self) -> float:
        """Of what was asked; NaN of nothing."""
        return self.right / self.asked if self.asked else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Where the true share lies with a confidence of 95 %."""
        return exact(self.right, self.asked)


def exact(right: int, asked: int, outside: float = 0.05) -> tuple[float, float]:
    """The exact interval of a share (Clopper and Pearson 1934); 0 to 1 where nothing was asked.

    For few pictures others are too narrow: 13 of 14 right would speak against a share of 99 %.

    outside : how often, at most, the interval misses the true share
    """
    return _least(right, asked, outside / 2), 1 - _least(asked - right, asked, outside / 2)


def _least(right: int, asked: int, chance: float) -> float:
    """The share by which so many or more of those asked are right with this chance."""
    if not right:
        return 0.0
    ways = [math.lgamma(asked + 1) - math.lgamma(k + 1) - math.lgamma(asked - k + 1) for k in range(asked + 1)]
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        hit, miss = math.log(middle), math.log1p(-middle)
        tail = sum(math.exp(ways[k] + k * hit + (asked - k) * miss) for k in range(right, asked + 1))
        low, high = (middle, high) if tail < chance else (low, middle)
    return low


def count(marks: Iterable[Marks]) -> dict[str, Count]:
    """The counts of many pictures, for each of SCORES."""
    every = list(marks)
    given = {score: [mark for one in every for mark in one.of(score)] for score in SCORES}
    return {score: Count(sum(them), len(them)) for score, them in given.items()}


def judge(request: Request, reading: Reading) -> Marks:
    """The marks of a picture."""
    seen = assign(request.things, reading.things)
    things = tuple(_judge_thing(asked, it) for asked, it in zip(request.things, seen, strict=True))
    return Marks(
        things=things,
        relation=_related(request.relation, seen) if request.relation else None,
        style=reading.style == request.style,
        background=(reading.background, reading.colours) == (request.background, request.colours),
        number=len(reading.things) == len(request.things),
    )


def assign(asked: Sequence[Asked], seen: Sequence[Seen]) -> tuple[Seen | None, ...]:
    """Which thing that was seen stands for which that was asked for: the best in all; None for what is missing."""
    choices: list[Seen | None] = [*seen, *([None] * len(asked))]
    best = max(
        permutations(range(len(choices)), len(asked)),
        key=lambda order: sum(_likeness(thing, choices[n]) for thing, n in zip(asked, order, strict=True)),
    )
    return tuple(choices[n] for n in best)


def _likeness(asked: Asked, seen: Seen | None) -> float:
    if seen is None:
        return 0.0
    placed = asked.place is not None and is_at(seen, asked.place)
    return 1.0 + 4 * (seen.colour == asked.colour) + 4 * (seen.shape == asked.shape) + 2 * placed + 0.1 * seen.score


def _judge_thing(asked: Asked, seen: Seen | None) -> ThingMarks:
    position = None if asked.place is None else seen is not None and is_at(seen, asked.place)
    if seen is None:
        return ThingMarks(asked, None, False, False, position)
    return ThingMarks(asked, seen, seen.colour == asked.colour, seen.shape == asked.shape, position)


def is_at(seen: Seen, place: str) -> bool:
    """Whether something is at a stated place: one of captions.PLACES."""
    if place == "centre":
        return max(abs(seen.x), abs(seen.y)) < AROUND
    sides = {"left": -seen.x, "right": seen.x, "top": -seen.y, "bottom": seen.y}
    words = place.split()
    if len(words) == 2:
        return all(sides[word] > BESIDE for word in words)
    off = seen.y if place in ("left", "right") else seen.x
    return sides[place] > BESIDE and abs(off) < ALONG


def _related(relation: str, seen: Sequence[Seen | None]) -> bool:
    """Whether the first of two is `relation` of the second, and more so than it is beside or above it."""
    first, second = seen
    if first is None or second is None:
        return False
    right, down = first.x - second.x, first.y - second.y
    along, off = (right, down) if relation in ("left", "right") else (down, right)
    return (along > 0) == (relation in ("right", "below")) and abs(along) > max(APART, abs(off))


def distances(pictures: Sequence[Sequence[float]]) -> float:
    """The mean over all pairs of the root mean square difference of their numbers."""
    pairs = [(a, b) for n, a in enumerate(pictures) for b in pictures[:n]]
    between = [math.sqrt(sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) / len(a)) for a, b in pairs]
    return sum(between) / max(1, len(between))


def shares(counts: Mapping[str, Count]) -> dict[str, float]:
    """The share of each."""
    return {name: one.share for name, one in counts.items()}
