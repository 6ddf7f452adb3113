"""The transitions of a job: each one Lua script that Redis runs whole or not at all.

submit -> claim -> commit, and cancel and progress beside them. A worker holds what it claimed under a lease: renew,
hand_back, retire; reap and bury take it from a worker that is gone. Either side runs them. view, page, load and survey
read; forget leaves nothing; expire and expired are for whoever deletes pictures, send and sent for whoever calls
webhooks. An operator's are retry, purge, forget_model and status. A job ends once in each of its lives: each has one
terminal event, and only retry begins another.

What Redis holds beside RQ's own keys (`rq:job:<id>`, `rq:queue:<queue>`, `rq:<registry>:<queue>`, ...):

darkroom:cards              hash    model -> its card as JSON, until an operator forgets it
darkroom:workers            zset    JSON of [model, worker] -> when the worker was last heard of
darkroom:speeds:<worker>    hash    model -> megapixel-steps a second
darkroom:speed              hash    model -> the same, as a worker last measured it, as long as its card
darkroom:leases             zset    worker -> the end of its lease
darkroom:held:<worker>      set     'id:execution' of all that it holds

darkroom:deadlines          zset    id of every job not yet ended -> its deadline
darkroom:open               hash    id of every job not yet ended -> JSON of where it is and what it counts for
darkroom:active:<owner>     set     ids of an owner's jobs that have not ended
darkroom:owner:<owner>      zset    ids of all jobs of an owner, which sort by time
darkroom:turns:<queue>      zset    owners with jobs in a queue -> their turn, a number
darkroom:line:<queue>:<o>   zset    ids of an owner's jobs in a queue, first come first
darkroom:rounds             hash    queue -> the last turn taken in it; 'came:<queue>' -> how many owners came
darkroom:load               hash    of each queue and model: how many jobs wait and run, and their pixel-steps
darkroom:suspects:<group>   set     ids of jobs that run with nothing beside them but each other
darkroom:yields:<group>     string  the worker that takes nothing until it is idle and can take them, for a minute
darkroom:lost:<worker>      string  id of the one job that it held when its lease lapsed, for an hour or until it renews

darkroom:events:<id>        stream  event and data: queued, running, progress, preview, succeeded, failed, canceled
darkroom:watch:<id>         string  exists while somebody wants to see previews
darkroom:preview:<id>       string  the latest preview, for a short while
darkroom:pictures           zset    id of a job that may have pictures -> when they are to go
darkroom:outbox             zset    'id:event' of what a webhook is to be told -> when that is due
darkroom:outbox_entries     hash    of the same: JSON of at, attempt, sender
darkroom:idempotency:<key>  hash    of the first job of a key: id, position, fingerprint of the request
darkroom:orphans:<request>  list    ids of jobs whose client went away: whoever asks the same gets one
darkroom:untold:<id>:<e>    string  JSON of owner and model of a job that others ended while execution e ran, until that
                                    tells what it took of the GPU, or for an hour
darkroom:ended              hash    JSON of [model, outcome, code of a failure] -> how many jobs ended so, for good
darkroom:records            zset    'queue id' of every ended job that has a record -> when it ended
darkroom:dropped            string  how many records of ended jobs went early, as Redis was nearly full
darkroom:usage:<day>        hash    JSON of [owner, model, counter] -> number, for 91 days

darkroom:paused             set     models that no worker claims for
darkroom:draining           set     models that no new job is accepted for
darkroom:reaped_at          string  when somebody last reaped
darkroom:graced_at          string  when all leases were last extended, for nobody had reaped
darkroom:keys               hash    id of an API key -> JSON of it, without its secret
darkroom:keys:used          hash    id of an API key -> when it was last used
darkroom:secret             string  random bytes that all processes share, for good

And what is said on its channels:

darkroom:submitted          a model that has something to claim
darkroom:event              each event: the job's id, the event's id in its stream, its name and its data
darkroom:stop:<worker>      the id of a job that the worker should stop
"""

from __future__ import annotations

from importlib.resources import files

from rq.defaults import RQ_KEY_PREFIX

from worker.contract.job import DEADLINE_EXCEEDED, Failure, Result
from worker.contract.record import encode

LATE_QUEUED = Failure(code=DEADLINE_EXCEEDED, message="the deadline passed before a worker could start the job")
LATE_STARTED = Failure(code=DEADLINE_EXCEEDED, message="the deadline passed before the job was done")
WORKER_LOST = Failure(
    code="worker_lost", message="the worker's process died each time that it ran this job with nothing beside it"
)

PARTS = ("common", "events", "turns", "books", "lives")
"""What comes before every transition's own lines."""

FLAGS = "#!lua flags=allow-oom"
"""A full Redis takes no more jobs, but those that it has go on and end. It must be the first line of a script."""

FIRST_LINES: dict[str, list[str]] = {"submit": ["#!lua"]} | {
    reader: [] for reader in ("view", "page", "load", "survey", "status")
}
"""A full Redis refuses submit as a whole. What reads has none: a Redis that takes no writes would refuse it for one."""

EVEN_IF_FULL = f"{FLAGS}\nreturn redis.call(unpack(ARGV))"
"""One command, for EVAL without keys: what must be said and noted also where Redis is full."""

LEASE_S = 6.0
"""How long a worker that says nothing keeps its jobs."""


def script(name: str) -> str:
    """The Lua source of a transition, complete."""
    folder = files(__package__)
    parts = [_constants(), *((folder / f"{part}.lua").read_text("utf-8") for part in (*PARTS, name))]
    return "\n".join([*FIRST_LINES.get(name, [FLAGS]), *parts])


def _constants() -> str:
    """What the parts expect to be defined."""
    endings = {
        "LATE_QUEUED": encode("failed", Result(failure=LATE_QUEUED)),
        "LATE_STARTED": encode("failed", Result(failure=LATE_STARTED)),
        "CANCELED": encode("canceled", Result()),
        "WORKER_LOST": encode("failed", Result(failure=WORKER_LOST)),
    }
    tables = [f"local {name} = {{outcome = [[{e.outcome}]], encoded = [[{e.encoded}]]}}" for name, e in endings.items()]
    return "\n".join([f"local RQ, LEASE_S = [[{RQ_KEY_PREFIX}:]], {LEASE_S}", *tables])
