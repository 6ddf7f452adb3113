"""A job as RQ keeps it: to the hash that RQ would write, and back to the view of its owner."""

from __future__ import annotations

import json
import math
import zlib
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

import redis
from rq.job import Job as RQJob
from rq.serializers import JSONSerializer
from rq.utils import utcparse

from worker.contract.errors import SchemaUnknown
from worker.contract.job import SCHEMA, TERMINAL, Failure, Job, JobView, Outcome, Progress, Result, Status, execute

RQ_STATUS: Final[dict[Outcome, str]] = {"succeeded": "finished", "failed": "failed", "canceled": "canceled"}
STATUS: Final[dict[str, Status]] = {
    "queued": "queued",
    "started": "running",
    "finished": "succeeded",
    "failed": "failed",
    "stopped": "canceled",
    "canceled": "canceled",
}

ENDED_ELSEWHERE = Failure(code="internal_error", message="the job was ended from outside Darkroom, by a tool of RQ's")


@dataclass(frozen=True)
class Ending:
    """How a job ended, in both of the forms that are kept."""

    outcome: str  # the JSON of our Result
    encoded: str  # as in RQ's stream of results: base64 of the return value, or of the packed error


def encode(status: Outcome, result: Result) -> Ending:
    """The forms of a result that Redis keeps."""
    outcome = result.to_json()
    if status == "succeeded":
        return Ending(outcome, b64encode(outcome.encode()).decode())
    error = f"{result.failure.code}: {result.failure.message}" if result.failure else ""
    return Ending(outcome, b64encode(zlib.compress(error.encode())).decode())


class RecordWriter:
    """Writes jobs as RQ's own class does, which wants a connection that it then never uses."""

    def __init__(self, lifetime_s: int) -> None:
        self._connection = redis.Redis()
        self._lifetime_s = lifetime_s

    def fields(self, job: Job) -> list[str | bytes | int]:
        """RQ's job hash as fields and values in turn, for HSET."""
        return [part for pair in self.twin(job).to_dict().items() for part in pair]

    def twin(self, job: Job) -> RQJob:
        """The job as RQ's own."""
        meta: dict[str, Any] = {
            "schema": job.schema,
            "model": job.model,
            "priority": job.priority,
            "deadline": job.deadline,
            "owner": job.owner,
            "work": job.pixel_steps,
            "pictures": job.num_images,
        }
        if job.webhook:
            meta["webhook"] = list(job.webhook.events)
        twin = RQJob.create(
            f"{execute.__module__}.{execute.__name__}",
            args=[job.to_payload()],
            id=job.id,
            origin=job.queue,
            description=f"{job.model}, {job.num_images} picture(s)",  # RQ's own would show the prompt in its logs
            meta=meta,
            timeout=max(1, math.ceil(job.deadline - job.created_at)),
            result_ttl=self._lifetime_s,
            failure_ttl=self._lifetime_s,
            serializer=JSONSerializer,
            connection=self._connection,
        )
        twin.created_at = datetime.fromtimestamp(job.created_at, UTC)
        return twin


def read_job(data: bytes) -> Job:
    """The job in the `data` field of RQ's hash; SchemaUnknown if this Darkroom cannot read it."""
    try:
        _func, _instance, args, _kwargs = json.loads(zlib.decompress(data))
        return Job.from_payload(args[0])
    except (zlib.error, ValueError, TypeError, LookupError, AttributeError) as error:
        raise SchemaUnknown("unreadable", SCHEMA) from error


def read_time(text: bytes | None) -> float | None:
    """Unix seconds of one of RQ's times."""
    return utcparse(text.decode()).timestamp() if text else None


def read_view(record: Sequence[Any]) -> JobView:
    """The view of a record as the transitions return it: position or -1, then fields and values in turn."""
    position, *flat = record
    fields: dict[bytes, bytes] = dict(zip(flat[::2], flat[1::2], strict=True))
    status = STATUS.get(fields[b"status"].decode(), "queued")  # RQ's others (deferred, scheduled) all wait
    job = read_job(fields[b"data"])
    return JobView(
        job=job,
        status=status,
        position=position if status == "queued" and position >= 0 else None,
        progress=_progress(fields, status, job),
        started_at=read_time(fields.get(b"started_at")),
        ended_at=read_time(fields.get(b"ended_at")),
        cancel_requested=b"cancel_requested" in fields,
        result=_result(fields, status) if status in TERMINAL else None,
        deliveries=tuple(json.loads(line) for line in fields.get(b"deliveries", b"").splitlines()),
    )


def _progress(fields: dict[bytes, bytes], status: Status, job: Job) -> Progress | None:
    if status == "succeeded":  # whatever was last heard of it
        return Progress(step=job.steps, steps=job.steps)
    if status != "running" or b"step" not in fields:
        return None
    return Progress(step=int(fields[b"step"]), steps=int(fields[b"steps"]))


def _result(fields: dict[bytes, bytes], status: Status) -> Result:
    if b"outcome" in fields:
        return Result.from_json(fields[b"outcome"])
    return Result() if status == "canceled" else Result(failure=ENDED_ELSEWHERE)
