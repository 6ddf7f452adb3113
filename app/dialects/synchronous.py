"""A job whose client waits for the pictures on its one connection."""

from __future__ import annotations

from starlette.requests import Request

from app.deps import Gateway
from app.dialects.call import Call, accept, comes_back
from app.dialects.retries import Retry, adopted, wait_for_retry
from app.errors import ClientGone, GenerationCanceled, GenerationFailed, NotInTime, ShuttingDown, StillMaking
from app.jobs import Jobs
from worker.contract.errors import QueueUnavailable
from worker.contract.job import DEADLINE_EXCEEDED, TERMINAL, JobView


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
    if failure.code == DEADLINE_EXCEEDED:
        raise NotInTime(view.job.deadline - view.job.created_at, failure.message)
    raise GenerationFailed(failure.code, failure.message)
