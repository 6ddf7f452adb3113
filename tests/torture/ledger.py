"""What became of jobs, read from what Redis and the store hold: nothing lost, nothing twice, and how fast."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import redis

from worker.contract.job import Job, Result

ENDS = ("succeeded", "failed", "canceled")


@dataclass(frozen=True)
class Event:
    """One entry of a job's stream."""

    at: float  # Unix seconds
    name: str


@dataclass(frozen=True)
class Audit:
    """The books of some jobs."""

    ends: Counter[str]  # jobs by how they ended; "open" for those that did not
    not_once: list[str]  # ids with more or fewer than one end and one row of results
    without_pictures: list[str]  # ids that succeeded, but not all of their pictures are on disk
    orphans: int  # pictures on disk that no result names
    executions: int  # how often a job was started, over all

    @property
    def lost(self) -> int:
        """Jobs without an end, or without what they promise."""
        return self.ends["open"] + len(self.without_pictures)


@dataclass(frozen=True)
class Injury:
    """What was done to a worker, and what it held then."""

    at: float  # Unix seconds
    kind: str
    held: frozenset[str]  # 'id:execution'


@dataclass(frozen=True)
class Recovery:
    """How long the jobs of a dead worker took to be queued again, and the first of them to run again, in seconds."""

    requeued_s: float
    rerun_s: float


def events(client: redis.Redis, job_id: str) -> list[Event]:
    """A job's stream, from its start."""
    found = []
    for entry, fields in client.xrange(f"darkroom:events:{job_id}"):
        at = int(entry.split(b"-")[0]) / 1000
        found.append(Event(at, fields[b"event"].decode()))
    return found


def audit(client: redis.Redis, jobs: Sequence[Job], pictures: Path) -> Audit:
    """The books of these jobs."""
    ends: Counter[str] = Counter()
    not_once, without, named, executions = [], [], set(), 0
    for job in jobs:
        names = [event.name for event in events(client, job.id)]
        terminal = [name for name in names if name in ENDS]
        executions += names.count("running")
        ends[terminal[0] if terminal else "open"] += 1
        rows = client.xlen(f"rq:results:{job.id}")
        if len(terminal) != 1 or rows != (terminal != ["canceled"]):
            not_once.append(job.id)
        if terminal[:1] == ["succeeded"]:
            keys = picture_keys(client, job.id)
            named |= keys
            if len(keys) != job.num_images or not all((pictures / key).is_file() for key in keys):
                without.append(job.id)
    asked = {job.id for job in jobs}
    on_disk = {str(path.relative_to(pictures)) for path in pictures.glob("*/*/*") if path.parts[-3] in asked}
    return Audit(ends, not_once, without, len(on_disk - named), executions)


def picture_keys(client: redis.Redis, job_id: str) -> set[str]:
    """The pictures that a job's result names."""
    outcome = client.hget(f"rq:job:{job_id}", "outcome")
    return {picture.key for picture in Result.from_json(outcome).pictures} if outcome else set()


def recoveries(client: redis.Redis, injuries: Iterable[Injury]) -> list[Recovery]:
    """How fast the jobs of each injured worker were back; injuries whose jobs all had just ended are left out."""
    found = []
    for injury in injuries:
        requeued, rerun = [], []
        for pair in injury.held:
            after = [event for event in events(client, pair.rpartition(":")[0]) if event.at >= injury.at - 0.002]
            back = [event.at for event in after if event.name == "queued"]
            if not back or after[0].name in ENDS:
                continue
            requeued.append(back[0] - injury.at)
            rerun += [event.at - injury.at for event in after if event.name == "running" and event.at >= back[0]][:1]
        if requeued:
            found.append(Recovery(max(requeued), min(rerun, default=float("inf"))))
    return found
