"""The queues: what a claim gets, as claim.lua and turns.lua decide it."""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from worker.contract.job import PRIORITIES, Priority

ROUNDING_S = 1e-9


class Queued(Protocol):
    """What waits."""

    @property
    def model(self) -> str: ...

    @property
    def priority(self) -> Priority: ...

    @property
    def owner(self) -> str: ...


J = TypeVar("J", bound=Queued)


@dataclass
class Line(Generic[J]):
    """One model and priority: its owners take turns, and each one's jobs are first come, first served."""

    jobs: dict[str, deque[tuple[float, J]]] = field(default_factory=dict)  # with when each came
    turns: list[tuple[float, str]] = field(default_factory=list)  # a heap
    last_turn: float = 0.0
    came: int = 0
    count: int = 0

    def put(self, job: J, at: float) -> None:
        """At the end of its owner's."""
        self.count += 1
        if job.owner in self.jobs:
            self.jobs[job.owner].append((at, job))
            return
        self.jobs[job.owner] = deque([(at, job)])
        self.came += 1
        heapq.heappush(self.turns, (math.floor(self.last_turn) + 1 + self.came % 1e6 / 1e6, job.owner))

    def take(self) -> J:
        """The first job of the owner whose turn it is."""
        turn, owner = heapq.heappop(self.turns)
        line = self.jobs[owner]
        _, job = line.popleft()
        self.count -= 1
        if line:
            heapq.heappush(self.turns, (turn + 1, owner))
        else:
            del self.jobs[owner]
        if self.turns:
            self.last_turn = max(turn, self.last_turn)
        else:
            self.last_turn, self.came = 0.0, 0
        return job

    def oldest(self) -> float:
        """When the job came that waits longest; inf if none does."""
        return min((line[0][0] for line in self.jobs.values()), default=math.inf)


class Broker(Generic[J]):
    """All lines."""

    def __init__(self, models: Sequence[str]) -> None:
        self._lines: dict[tuple[str, Priority], Line[J]] = {(m, p): Line() for m in models for p in PRIORITIES}
        self.waiting = dict.fromkeys(models, 0)

    def submit(self, job: J, now: float = 0.0) -> None:
        """Puts a job into its line."""
        self._lines[job.model, job.priority].put(job, now)
        self.waiting[job.model] += 1

    def claim(self, models: Sequence[str], want: int, now: float = 0.0, spare_after_s: float = 0.0) -> list[J]:
        """At most `want`: high before normal before low, and one of each model in turn."""
        found: list[J] = []
        models = [model for model in models if self.offered(model, now, spare_after_s)]
        for priority in PRIORITIES:
            lines = [self._lines[model, priority] for model in models]
            while len(found) < want and (lines := [line for line in lines if line.count]):
                for line in lines[: want - len(found)]:
                    job = line.take()
                    self.waiting[job.model] -= 1
                    found.append(job)
        return found

    def offered(self, model: str, now: float, spare_after_s: float) -> int:
        """How many jobs of it wait, unless all came less than so long ago."""
        before = now - spare_after_s + ROUNDING_S
        waited = any(self._lines[model, priority].oldest() <= before for priority in PRIORITIES)
        return self.waiting[model] if waited else 0
