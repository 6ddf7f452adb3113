"""The transitions of a job: each one Lua script that Redis runs whole or not at all.

submit -> claim -> commit, and cancel, expire (the deadline) and progress beside them. Either side runs them.
"""

from __future__ import annotations

from importlib.resources import files

from rq.defaults import RQ_KEY_PREFIX

from worker.contract.job import Failure, Result
from worker.contract.record import encode

LATE_QUEUED = Failure(code="deadline_exceeded", message="the deadline passed before a worker could start the job")
LATE_STARTED = Failure(code="deadline_exceeded", message="the deadline passed before the job was done")


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
    }
    tables = [f"local {name} = {{outcome = [[{e.outcome}]], encoded = [[{e.encoded}]]}}" for name, e in endings.items()]
    return "\n".join([f"local RQ = [[{RQ_KEY_PREFIX}:]]", *tables])
