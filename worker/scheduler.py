"""Which work next: the least remaining first, by class of priority, with ageing; equal keys share the batch.

The rule, for the work that makes the batch's start:

1. Work that has waited past its **patience** goes before all else, the longest overdue first. The patience is
   PATIENCE[priority] times as long as the work itself takes, or as LEAST_S if that is longer.
2. Else a higher class goes before a lower one; within a class, work that opens a job (its text, its noise) first, since
   it is short and lets the job ride along; then the job with the least work left.

So a job gets at least one of every PATIENCE + 1 moments of the GPU, as long as nothing else is overdue. And no work
waits longer than its patience and then one batch for each piece of work that waits beside it: what comes up later is
due later.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol, TypeVar

from worker.contract.job import PRIORITIES, Priority

PATIENCE: Final[dict[Priority, float]] = {"high": 2.0, "normal": 8.0, "low": 32.0}
LEAST_S = 0.02
"""Shorter work is no more impatient than this."""

RANK: Final = {priority: n for n, priority in enumerate(PRIORITIES)}


class Pending(Protocol):
    """A piece of work that waits for the GPU."""

    @property
    def key(self) -> Hashable:
        """Equal keys can share a batch."""
        ...

    @property
    def rows(self) -> int:
        """Rows of the batch that it takes."""
        ...

    @property
    def tokens(self) -> int:
        """Tokens of all its rows."""
        ...

    @property
    def priority(self) -> Priority:
        """Its job's class."""
        ...

    @property
    def opening(self) -> bool:
        """Whether it comes before its picture's first step, and may ride with others."""
        ...

    @property
    def since(self) -> float:
        """When it came up, in the clock's seconds."""
        ...

    @property
    def own_s(self) -> float:
        """Seconds that it is expected to take."""
        ...

    @property
    def left_s(self) -> float:
        """Seconds of work that its whole job is expected to have left."""
        ...


P = TypeVar("P", bound=Pending)


@dataclass(frozen=True)
class Room:
    """What one batch may hold."""

    rows: int
    tokens: int


def pick(pending: Sequence[P], now: float, room: Callable[[P], Room]) -> list[P]:
    """The most urgent of `pending` and, by urgency, all that share its key and fit; the first always runs.

    now : the clock's seconds
    room : what a batch with this work may hold
    """
    if not pending:
        return []
    leader = min(pending, key=lambda one: urgency(one, now))
    key, most = leader.key, room(leader)
    riders = [one for one in pending if one is not leader and one.key == key]
    batch, rows, tokens = [leader], leader.rows, leader.tokens
    for one in sorted(riders, key=lambda one: urgency(one, now)):
        if rows + one.rows <= most.rows and tokens + one.tokens <= most.tokens:
            batch.append(one)
            rows, tokens = rows + one.rows, tokens + one.tokens
    return batch


def urgency(one: Pending, now: float) -> tuple[float, ...]:
    """The smaller, the sooner."""
    due = one.since + PATIENCE[one.priority] * max(LEAST_S, one.own_s)
    if now >= due:
        return 0, due
    return 1, RANK[one.priority], not one.opening, one.left_s, one.since
