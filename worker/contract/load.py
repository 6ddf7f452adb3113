"""How much work there is, how fast it is done, and so how long a new job would wait.

Redis counts work in pixel-steps (`Job.pixel_steps`); speeds are in megapixel-steps a second, of a worker that is busy.
Work of one model is shared by all workers that hold it; a worker that holds several models takes turns between them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Self

from worker.contract.job import PRIORITIES, Priority, queue_name
from worker.contract.record import read_time

MEGA = 1e6

ASSUMED_SPEED = 10.0
"""Megapixel-steps a second of a worker of which nothing was ever measured: about those of an H100 with SD3.5 Large."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """All queues and workers at one moment. The numbers are as the transitions keep them: pixel-steps."""

    workers: tuple[tuple[str, str, float | None], ...]  # model, worker, its megapixel-steps a second if measured
    last_speed: dict[str, float] = field(default_factory=dict)  # of one worker, by model, as last measured
    counts: dict[str, float] = field(default_factory=dict)  # jobs:<queue> waiting:<queue> runs:<model> running:<model>
    ahead: int | None = None  # jobs that go before a new one of the owner asked about, in its queue

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """The load as the transition gives it, in which what is empty may be of any kind."""
        seen: dict[str, Any] = json.loads(text)
        return cls(
            workers=tuple((w[0], w[1], float(w[2]) if len(w) > 2 and w[2] else None) for w in seen["workers"] or ()),
            last_speed=dict(seen["speed"] or {}),
            counts=dict(seen["load"] or {}),
            ahead=seen.get("ahead"),
        )

    def speed(self, model: str) -> float | None:
        """Megapixel-steps a second of all live workers that hold the model; None: there are none, or none measured."""
        speeds = [speed or self.last_speed.get(model) for name, _, speed in self.workers if name == model]
        return sum(speed for speed in speeds if speed) or None

    def outstanding_s(self, model: str) -> float:
        """Seconds of work of a model, queued and running.

        Where no worker is alive, by one as fast as the last; where none ever measured itself, by ASSUMED_SPEED.
        """
        speed = self.speed(model) or self.last_speed.get(model) or ASSUMED_SPEED
        return (self._waiting(model, PRIORITIES) + self.counts.get(f"running:{model}", 0) / MEGA) / speed

    def wait_s(self, model: str, priority: Priority) -> float | None:
        """Seconds until a new job would start; None: there is no worker, or its speed is not known.

        What waits before it is done first; where its workers hold other models too, those get turns of theirs, at most
        as long as its own. Then it waits for one running job to make room.
        """
        speed = self.speed(model)
        if not speed:
            return None
        own = self._ahead(model, priority) / speed
        beside = sum(min(own, self._others_s(other, priority)) for other in self._beside(model))
        return own + beside + self._room_s(model)

    def _ahead(self, model: str, priority: Priority) -> float:
        """Megapixel-steps that go before a new job: all of higher priority; of its own, the share of the jobs ahead."""
        higher = PRIORITIES[: PRIORITIES.index(priority)]
        queue = queue_name(model, priority)
        jobs, share = self.counts.get(f"jobs:{queue}", 0), 1.0
        if self.ahead is not None and jobs:
            share = min(1.0, self.ahead / jobs)
        return self._waiting(model, higher) + share * self._waiting(model, [priority])

    def _waiting(self, model: str, priorities: Iterable[Priority]) -> float:
        return sum(self.counts.get(f"waiting:{queue_name(model, p)}", 0) for p in priorities) / MEGA

    def _others_s(self, model: str, priority: Priority) -> float:
        speed = self.speed(model)
        upto = PRIORITIES[: PRIORITIES.index(priority) + 1]
        return self._waiting(model, upto) / speed if speed else 0.0

    def _beside(self, model: str) -> set[str]:
        """The other models of the workers that hold this one."""
        holders = {worker for name, worker, _ in self.workers if name == model}
        return {name for name, worker, _ in self.workers if worker in holders} - {model}

    def _room_s(self, model: str) -> float:
        """Seconds of the average running job, of this model or one beside it; 0 where none runs."""
        models = {model, *self._beside(model)}
        runs = sum(self.counts.get(f"runs:{name}", 0) for name in models)
        seconds = sum(self._running_s(name) for name in models)
        return seconds / runs if runs else 0.0

    def _running_s(self, model: str) -> float:
        speed = self.speed(model)
        return self.counts.get(f"running:{model}", 0) / MEGA / speed if speed else 0.0


@dataclass(frozen=True, kw_only=True)
class Survey:
    """All queues of all models ever known, and their workers, at one moment."""

    load: Load
    waiting: dict[tuple[str, Priority], int]  # jobs, by model and priority
    oldest_s: dict[tuple[str, Priority], float]  # how long the one waits that has waited longest; 0: none does
    ended: dict[tuple[str, str, str], int] = field(
        default_factory=dict
    )  # jobs so far, by model, outcome, failure's code
    dropped: int = 0  # records of ended jobs that went before their time, as Redis was nearly full
    memory: tuple[int, int] = (0, 0)  # bytes that Redis uses, and those that it may use; 0: nothing bounds it

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """The survey as the transition gives it."""
        seen: dict[str, Any] = json.loads(text)
        ended = list(seen["ended"] or ())
        queues = [(row[0], row[1], row[2], row[3] if len(row) > 3 else None) for row in seen["queues"] or ()]
        return cls(
            load=Load.from_json(text),
            waiting={(model, priority): count for model, priority, count, _ in queues},
            oldest_s={(model, priority): _age_s(since, seen["now"]) for model, priority, _, since in queues},
            ended={tuple(json.loads(how)): int(count) for how, count in zip(ended[::2], ended[1::2], strict=True)},
            dropped=int(seen["dropped"]),
            memory=(int(seen["memory"][0]), int(seen["memory"][1])),
        )

    @property
    def models(self) -> list[str]:
        """All of them, with workers or without."""
        return list(dict.fromkeys(model for model, _ in self.waiting))

    def workers(self, model: str) -> int:
        """How many live workers hold the model."""
        return sum(name == model for name, _, _ in self.load.workers)


def _age_s(since: str | None, now: float) -> float:
    return max(0.0, now - (read_time(since.encode()) or now)) if since else 0.0
