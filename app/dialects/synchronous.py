"""A job whose client waits for the pictures on its one connection."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel
from starlette.requests import Request

from app.deps import Gateway
from app.dialects.body import checked, in_their_words
from app.dialects.retries import Retry, adopted, wait_for_retry
from app.errors import ClientGone, GenerationCanceled, GenerationFailed, NotInTime, ShuttingDown, StillMaking
from app.idempotency import HEADER as IDEMPOTENCY_KEY
from app.idempotency import idempotency
from app.jobs import Jobs
from app.schemas import GenerationCreate
from worker.contract.errors import InvalidField, QueueUnavailable
from worker.contract.job import TERMINAL, JobView, Webhook
from worker.contract.queue import Idempotency

LATE = "deadline_exceeded"
"""Code of a failure: the job's deadline passed."""


@dataclass(frozen=True)
class Call:
    """One call of a vendor's client: what it asks for in our words and in its own."""

    dialect: str
    sent: Any  # the body as it was read, with what else decides on the job; JSON-ready
    asked: BaseModel
    create: dict[str, Any]  # fields of GenerationCreate; None: not said
    names: Mapping[str, str] = field(default_factory=dict)  # our field names to theirs, where they differ
    echo: dict[str, Any] = field(default_factory=dict)


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
    if hold_s is not None and not comes_back(request):
        fields.setdefault("deadline_s", math.ceil(hold_s))  # should this gateway die, nobody waits any longer
    try:
        create = checked(GenerationCreate, fields)
        return await jobs.accept(
            create,
            dialect=call.dialect,
            echo=call.echo,
            webhook=webhook,
            idempotency=_once(call, jobs, request),
            hold_s=hold_s,
        )
    except InvalidField as error:
        raise in_their_words(error, call.names, call.asked) from error


async def finish(call: Call, jobs: Jobs, gateway: Gateway, request: Request, retry: Retry | None = None) -> JobView:
    """The job of a call once it has succeeded; it is canceled when nobody waits for it or comes back for it any more.

    retry: the client will ask again by itself if its connection breaks; then it gets the same job.
    All that Jobs.accept raises, GenerationFailed, GenerationCanceled, NotInTime, StillMaking, ShuttingDown, ClientGone.
    """
    hold_s, keyed = gateway.settings.hold_s, comes_back(request)
    if keyed:
        retry = None  # the key says it better
    view = await adopted(jobs, gateway, retry) or await accept(call, jobs, request, hold_s=hold_s)
    try:
        view = await jobs.hold(view, hold_s, cancel_if_gone=retry is None and not keyed)
    except ClientGone:
        if retry is not None:
            await wait_for_retry(view, gateway, retry)
        raise
    if view.status not in TERMINAL:
        view = await (_left_running(view, gateway) if keyed else _given_up(view, gateway, retry))
    return succeeded(view)


def comes_back(request: Request | None) -> bool:
    """Whether a client can ask for the same job again, by its key: the job goes on when it stops waiting."""
    return request is not None and IDEMPOTENCY_KEY in request.headers


def _once(call: Call, jobs: Jobs, request: Request | None) -> Idempotency | None:
    """What the key stands for: what was sent, not what it came to, which changes with the models that are held."""
    key = None if request is None else request.headers.get(IDEMPOTENCY_KEY)
    if request is None or key is None:
        return None
    return idempotency(key, owner=jobs.caller.id, route=f"POST {request.url.path}", request=call.sent)


async def _left_running(view: JobView, gateway: Gateway) -> JobView:
    """The job, if it has ended after all. StillMaking, ShuttingDown: its key finds it. GenerationFailed."""
    try:
        view = await gateway.queue.view(view.job.id)
    except QueueUnavailable as error:
        raise _lost(error) from error
    if view.status in TERMINAL:
        return view
    raise ShuttingDown if gateway.draining.is_set() else StillMaking(gateway.settings.hold_s)


async def _given_up(view: JobView, gateway: Gateway, retry: Retry | None) -> JobView:
    """The job, if it has succeeded after all. NotInTime, ShuttingDown: a retry may go on with it at another gateway.

    GenerationFailed.
    """
    job_id, draining = view.job.id, gateway.draining.is_set()
    try:
        if draining and retry is not None:
            await gateway.queue.orphans.leave(retry.request, job_id)
        elif (view := await gateway.queue.cancel(job_id)).status == "succeeded":
            return view
    except QueueUnavailable as error:
        raise _lost(error) from error
    raise ShuttingDown if draining else NotInTime(gateway.settings.hold_s)


def _lost(error: QueueUnavailable) -> GenerationFailed:
    """Nobody knows how far the job is. Not QueueUnavailable, after which clients ask again: it may be made."""
    return GenerationFailed(error.code, "the queue went away while the picture was being made")


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
