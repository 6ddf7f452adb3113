"""A job whose client waits for the pictures on its one connection."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel
from starlette.requests import Request

from app.deps import Gateway
from app.dialects.body import checked, in_their_words
from app.errors import ClientGone, GenerationCanceled, GenerationFailed, NotInTime, ShuttingDown
from app.idempotency import HEADER as IDEMPOTENCY_KEY
from app.idempotency import idempotency
from app.jobs import Jobs
from app.schemas import GenerationCreate
from worker.contract.errors import DarkroomError, InvalidField, QueueUnavailable, UnknownGeneration
from worker.contract.job import TERMINAL, JobView, Webhook
from worker.contract.queue import Idempotency

LATE = "deadline_exceeded"
"""Code of a failure: the job's deadline passed."""


@dataclass(frozen=True)
class Call:
    """One call of a vendor's client: what it asks for in our words and in its own."""

    dialect: str
    asked: BaseModel
    create: dict[str, Any]  # fields of GenerationCreate; None: not said
    names: Mapping[str, str] = field(default_factory=dict)  # our field names to theirs, where they differ
    echo: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Retry:
    """What is known of a client that tries a call again when its connection breaks."""

    request: str  # stands for who asks and for what; the same in every try
    count: int  # tries before this one
    next_within_s: float  # should this one's connection break


async def accept(
    call: Call,
    jobs: Jobs,
    request: Request | None = None,
    *,
    hold_s: float | None = None,
    webhook: Webhook | None = None,
) -> JobView:
    """The accepted job. With `hold_s`: WaitTooLong if it would start later than that, and late after that time.

    request: the same `Idempotency-Key` with the same body asks for nothing new.
    All that Jobs.accept raises; a wrong field under the name that the client knows.
    """
    fields = {name: value for name, value in call.create.items() if value is not None}
    if hold_s is not None:
        fields.setdefault("deadline_s", math.ceil(hold_s))  # should this gateway die, nobody waits any longer
    try:
        create = checked(GenerationCreate, fields)
        return await jobs.accept(
            create,
            dialect=call.dialect,
            echo=call.echo,
            webhook=webhook,
            idempotency=_once(create, jobs, request),
            hold_s=hold_s,
        )
    except InvalidField as error:
        raise in_their_words(error, call.names, call.asked) from error


async def finish(call: Call, jobs: Jobs, gateway: Gateway, request: Request, retry: Retry | None = None) -> JobView:
    """The job of a call once it has succeeded; it is canceled when nobody waits for it any more.

    retry: the client will ask again by itself if its connection breaks; then it gets the same job.
    All that Jobs.accept raises, GenerationFailed, GenerationCanceled, NotInTime, ShuttingDown, ClientGone.
    """
    hold_s = gateway.settings.hold_s
    comes_back = IDEMPOTENCY_KEY in request.headers  # for the same job, by its key
    view = await _adopted(jobs, gateway, retry) or await accept(call, jobs, request, hold_s=hold_s)
    try:
        view = await jobs.hold(view, hold_s, cancel_if_gone=retry is None and not comes_back)
    except ClientGone:
        if retry is not None and not comes_back:
            await _wait_for_retry(view, gateway, retry)
        raise
    if view.status not in TERMINAL:
        view = await _given_up(view, gateway, retry)
    return succeeded(view)


def _once(create: GenerationCreate, jobs: Jobs, request: Request | None) -> Idempotency | None:
    key = None if request is None else request.headers.get(IDEMPOTENCY_KEY)
    if request is None or key is None:
        return None
    route = f"POST {request.url.path}"
    return idempotency(key, owner=jobs.caller.id, route=route, request=create.model_dump(mode="json"))


async def _adopted(jobs: Jobs, gateway: Gateway, retry: Retry | None) -> JobView | None:
    """The job of the same call's last try, if that lost its connection."""
    if retry is None or not retry.count:
        return None
    with contextlib.suppress(UnknownGeneration):
        if job_id := await gateway.queue.orphans.adopt(retry.request):
            view = await jobs.get(job_id)
            return None if view.status == "canceled" else view
    return None


async def _wait_for_retry(view: JobView, gateway: Gateway, retry: Retry) -> None:
    """Cancels the job unless somebody adopts it before a retry would have come."""
    job_id, orphans = view.job.id, gateway.queue.orphans
    with contextlib.suppress(DarkroomError):
        await orphans.leave(retry.request, job_id)
        await asyncio.sleep(retry.next_within_s)
        if await orphans.take_back(retry.request, job_id):
            await gateway.queue.cancel(job_id)


async def _given_up(view: JobView, gateway: Gateway, retry: Retry | None) -> JobView:
    """The job, if it has ended after all. NotInTime, ShuttingDown: a retry may go on with it at another gateway.

    GenerationFailed: nobody knows how far it is. Not QueueUnavailable, after which clients ask again: it may be made.
    """
    job_id, draining = view.job.id, gateway.draining.is_set()
    try:
        if draining and retry is not None:
            await gateway.queue.orphans.leave(retry.request, job_id)
        elif (view := await gateway.queue.cancel(job_id)).status == "succeeded":
            return view
    except QueueUnavailable as error:
        raise GenerationFailed(error.code, "the queue went away while the picture was being made") from error
    raise ShuttingDown if draining else NotInTime(gateway.settings.hold_s)


def succeeded(view: JobView) -> JobView:
    """An ended job, if it has succeeded. GenerationFailed, GenerationCanceled, NotInTime."""
    if view.status == "succeeded":
        return view
    failure = view.result.failure if view.result else None
    if failure is None:
        raise GenerationCanceled
    if failure.code == LATE:
        raise NotInTime(view.job.deadline - view.job.created_at)
    raise GenerationFailed(failure.code, failure.message)
