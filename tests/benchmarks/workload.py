"""What is asked of the server: kinds of request, how often each comes, and when."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from tests.worker.jobs import make_job
from worker.contract.job import Job


@dataclass(frozen=True)
class Request:
    """One kind of request."""

    model: str
    side: int  # pixels, of a square picture
    steps: int
    guidance_scale: float
    weight: float = 1.0  # its share of all
    short: bool = False

    @property
    def name(self) -> str:
        return f"{self.model} {self.side}x{self.side}, {self.steps} steps"

    def job(self, seed: int) -> Job:
        """A job of this kind; each seed has a prompt of its own, so that texts are encoded."""
        return make_job(
            model=self.model,
            width=self.side,
            height=self.side,
            steps=self.steps,
            guidance_scale=self.guidance_scale,
            seed=seed,
            prompt=f"a red circle, number {seed}",
            deadline_s=36_000,
        )


@dataclass(frozen=True)
class Arrival:
    """A request that comes `at` seconds after the start."""

    at: float
    request: Request
    seed: int


def drawn(mix: Sequence[Request], count: int, seed: int) -> list[Request]:
    """So many requests by their weights."""
    return random.Random(seed).choices(mix, [request.weight for request in mix], k=count)


def poisson(mix: Sequence[Request], rate: float, count: int, seed: int) -> list[Arrival]:
    """So many requests at `rate` a second; the same seed gives the same for every policy."""
    chance, at, found = random.Random(f"{seed} times"), 0.0, []
    for n, request in enumerate(drawn(mix, count, seed)):
        at += chance.expovariate(rate)
        found.append(Arrival(at, request, n))
    return found


def at_once(mix: Sequence[Request], count: int, seed: int) -> list[Arrival]:
    """So many requests at the start."""
    return [Arrival(0.0, request, n) for n, request in enumerate(drawn(mix, count, seed))]
