"""How long GPU work takes, from what it took lately."""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import NamedTuple

MAX_KINDS = 1024
"""Kinds of work that are remembered; those not met for the longest are forgotten."""

GUESS_S = 1e-4
"""Seconds a token, where nothing like it has ever run: only the first order of jobs depends on it."""

FRESH_S = 60.0
"""So old may a measurement be that says what cannot be done: else whoever was slow once would refuse all for ever."""

FIRST_S = 12.0
"""The first batch of a kind may take so long: kernels are compiled and chosen, memory is reserved."""


class Kind(NamedTuple):
    """Work that takes equally long, for equally many rows."""

    model: str
    stage: str
    shape: tuple[int, ...]  # (h/8, w/8)


@dataclass
class Pace:
    """The seconds of the last batches of one kind and size."""

    ran: int = 0
    last: deque[float] = field(default_factory=lambda: deque(maxlen=9))
    seconds: float = 0.0  # their median: one slow batch is no pace
    at: float = 0.0  # when the last of them ran

    def add(self, seconds: float, now: float) -> None:
        """One more batch. The first is dropped as soon as there is a second: it was slower than any other will be."""
        if self.ran == 1:
            self.last.clear()
        self.ran += 1
        self.last.append(seconds)
        self.seconds, self.at = median(self.last), now


class Forecast:
    """Seconds by kind of work and rows."""

    def __init__(
        self, paces: Mapping[str, Mapping[str, float]] | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`paces`: seconds a token by model and stage, where they are known beforehand."""
        self._paces: OrderedDict[Kind, dict[int, Pace]] = OrderedDict()
        self._clock = clock
        known = paces or {}
        # By model and stage, of the last batch.
        self._per_token = {(name, stage): s for name, pace in known.items() for stage, s in pace.items()}

    def observe(self, kind: Kind, rows: int, tokens: int, seconds: float) -> None:
        """A batch ran."""
        self._paces.setdefault(kind, {}).setdefault(rows, Pace()).add(seconds, self._clock())
        self._paces.move_to_end(kind)
        if len(self._paces) > MAX_KINDS:
            self._paces.popitem(last=False)
        self._per_token[kind.model, kind.stage] = seconds / max(1, tokens)

    def least(self, kind: Kind, rows: int) -> float:
        """Seconds that so many rows will take at the very least; 0 where we cannot honestly say.

        The fastest of the last batches, if one ran lately. Known from a larger batch: its share. From a smaller one: no
        less than that.
        """
        fresh = self._clock() - FRESH_S
        known = {size: pace for size, pace in self._of(kind).items() if pace.ran >= 2 and pace.at >= fresh}
        if not known:
            return 0.0
        near = _nearest(known, rows)
        return min(known[near].last) * min(1.0, rows / near)

    def expected(self, kind: Kind, rows: int, tokens: int) -> float:
        """Seconds that so many rows will take, about; for what never ran, by its tokens."""
        if known := self._of(kind):
            near = _nearest(known, rows)
            return known[near].seconds * rows / near
        return tokens * self._per_token.get((kind.model, kind.stage), GUESS_S)

    def allowance(self, kind: Kind, rows: int, tokens: int) -> float:
        """As `expected`, but generous to the first of a kind."""
        expected = self.expected(kind, rows, tokens)
        return expected if rows in self._of(kind) else max(FIRST_S, expected)

    def _of(self, kind: Kind) -> Mapping[int, Pace]:
        """What ran of a kind, by rows."""
        return self._paces.get(kind, {})


def _nearest(known: Mapping[int, Pace], rows: int) -> int:
    """The size that is nearest, of batches that ran."""
    return min(known, key=lambda size: max(size / rows, rows / size))
