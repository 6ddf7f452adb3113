"""The transitions of a job: each one Lua script that Redis runs whole or not at all.

submit -> claim -> commit, and cancel and progress beside them. A worker holds what it claimed under a lease: renew,
hand_back, retire; reap and bury take it from a worker that is gone. Either side runs them. An operator's are retry,
purge and status. A job ends once in each of its lives: each has one terminal event, and only retry begins another.

What Redis holds beside RQ's own keys (`rq:job:<id>`, `rq:queue:<queue>`, `rq:<registry>:<queue>`, ...):

darkroom:cards              hash    model -> its card as JSON, for good
darkroom:workers            zset    JSON of [model, worker] -> when the worker was last heard of
darkroom:leases             zset    worker -> the end of its lease
darkroom:held:<worker>      set     'id:execution' of all that it holds
darkroom:deadlines          zset    id of every job not yet ended -> its deadline
darkroom:suspects:<group>   set     ids of jobs that run with nothing beside them but each other
darkroom:events:<id>        stream  event and data: queued, running, progress, preview, succeeded, failed, canceled
darkroom:watch:<id>         string  exists while somebody wants to see previews
darkroom:preview:<id>       string  the latest preview, for a short while
darkroom:paused             set     models that no worker claims for
darkroom:draining           set     models that no new job is accepted for
darkroom:reaped_at          string  when somebody last reaped
darkroom:graced_at          string  when all leases were last extended, for nobody had reaped

And what is said on its channels:

darkroom:submitted          a model that has something to claim
darkroom:ended              the id of a job that ended
darkroom:stop:<worker>      the id of a job that the worker should stop
"""

from __future__ import annotations

from importlib.resources import files

from rq.defaults import RQ_KEY_PREFIX

from worker.contract.job import Failure, Result
from worker.contract.record import encode

LATE_QUEUED = Failure(code="deadline_exceeded", message="the deadline passed before a worker could start the job")
LATE_STARTED = Failure(code="deadline_exceeded", message="the deadline passed before the job was done")
WORKER_LOST = Failure(
    code="worker_lost", message="the worker's process died each time that it ran this job with nothing beside it"
)

LEASE_S = 6.0
"""How long a worker that says nothing keeps its jobs."""


def script(name: str) -> str:
    """The Lua source of a transition, complete."""
    folder = files(__package__)
    return "\n".join([_constants(), *((folder / f"{part}.lua").read_text("utf-8") for part in ("common", name))])


def _constants() -> str:
    """What common.lua expects to be defined."""
    endings = {
        "LATE_QUEUED": encode("failed", Result(failure=LATE_QUEUED)),
        "LATE_STARTED": encode("failed", Result(failure=LATE_STARTED)),
        "CANCELED": encode("canceled", Result()),
        "WORKER_LOST": encode("failed", Result(failure=WORKER_LOST)),
    }
    tables = [f"local {name} = {{outcome = [[{e.outcome}]], encoded = [[{e.encoded}]]}}" for name, e in endings.items()]
    return "\n".join([f"local RQ, LEASE_S = [[{RQ_KEY_PREFIX}:]], {LEASE_S}", *tables])
