"""Clients that ask again by themselves, without a key: how they are known, and how no work is done twice for them."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass

from starlette.requests import Request

from app.deps import Gateway
from app.errors import GenerationCanceled, GenerationFailed, NothingMade, NotInTime
from app.jobs import Jobs
from worker.contract.errors import DarkroomError, StoreUnavailable, UnknownGeneration
from worker.contract.job import JobView

OPENAI_COUNT = "x-stainless-retry-count"
COUNT = re.compile(r"[0-9]{1,2}", re.ASCII)
OPENAI_FIRST_S, OPENAI_LAST_S = 0.5, 8.0
"""How long OpenAI's clients wait before they ask again: twice as long each time."""

AI_SDK = re.compile(r"(^|\s)ai/[0-9]", re.ASCII)
"""In the user agent of Vercel's AI SDK, which tells no count of its tries and reads no header but Retry-After."""

AI_SDK_LAST_S = 4.0
RETRY_TRAVELS_S = 2.0


@dataclass(frozen=True)
class Retry:
    """What is known of a client that asks again when its connection breaks or it is answered 408, 409, 429 or 5xx."""

    request: str  # stands for who asks and for what; the same in every try
    first: bool  # surely nothing was tried before; False: perhaps
    next_within_s: float  # should this connection break
    heeds_us: bool  # it does not ask again where `x-should-retry` says so


async def retry_of(request: Request, jobs: Jobs) -> Retry | None:
    """What a client with a habit of asking again tells of itself; None: it has none that we know."""
    count = request.headers.get(OPENAI_COUNT, "")
    if COUNT.fullmatch(count):
        pause_s = min(OPENAI_FIRST_S * 2 ** int(count), OPENAI_LAST_S)
        return Retry(await _request(request, jobs), int(count) == 0, pause_s + RETRY_TRAVELS_S, heeds_us=True)
    if AI_SDK.search(request.headers.get("user-agent", "")):
        return Retry(await _request(request, jobs), False, AI_SDK_LAST_S + RETRY_TRAVELS_S, heeds_us=False)
    return None


async def adopted(jobs: Jobs, gateway: Gateway, retry: Retry | None) -> JobView | None:
    """The job of the same call's last try, if nobody got its answer. QueueUnavailable: it is left to the next try."""
    if retry is None or retry.first:
        return None
    orphans = gateway.queue.orphans
    if (job_id := await orphans.adopt(retry.request)) is None:
        return None
    try:
        view = await jobs.get(job_id)
    except UnknownGeneration:
        return None
    except DarkroomError:
        with contextlib.suppress(DarkroomError):
            await orphans.leave(retry.request, job_id)
        raise
    return None if view.status == "canceled" else view


async def wait_for_retry(view: JobView, gateway: Gateway, retry: Retry) -> None:
    """Cancels the job unless somebody adopts it before a retry would have come."""
    job_id, orphans = view.job.id, gateway.queue.orphans
    with contextlib.suppress(DarkroomError):
        await orphans.leave(retry.request, job_id)
        await asyncio.sleep(retry.next_within_s)
        if await orphans.take_back(retry.request, job_id):
            await gateway.queue.cancel(job_id)


@contextlib.contextmanager
def told_once(retry: Retry | None) -> Iterator[None]:
    """NothingMade instead of what an accepted job came to, where its client would ask again after that."""
    try:
        yield
    except (GenerationFailed, GenerationCanceled, NotInTime, StoreUnavailable) as error:
        if retry is None or retry.heeds_us:
            raise
        raise NothingMade(error) from error


async def _request(request: Request, jobs: Jobs) -> str:
    asked = f"{jobs.caller.id}\0{request.url.path}\0".encode() + await request.body()
    return hashlib.sha256(asked).hexdigest()
