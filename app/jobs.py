"""What native routes and dialects do with jobs, for one caller: ask, look, wait, cancel, forget, fetch pictures."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from starlette.requests import Request

from app.auth import Caller, Scope
from app.errors import ClientGone, Forbidden, NoPicture, NotFinished, PictureLost, WaitTooLong, utc
from app.limits import resolve
from app.links import Links
from app.schemas import GenerationCreate
from worker.contract.errors import (
    DarkroomError,
    PicturesExpired,
    QueueUnavailable,
    StoreUnavailable,
    UnknownGeneration,
)
from worker.contract.events import Event
from worker.contract.job import TERMINAL, Job, JobView, Picture, Webhook
from worker.contract.link import end
from worker.contract.queue import RECHECK_S, WATCH_S, Idempotency

if TYPE_CHECKING:
    from app.deps import Gateway

STORE_TIMEOUT_S = 10.0
WATCH_EVERY_S = WATCH_S / 3

AWAY_FIRST_S, AWAY_LAST_S = 0.1, RECHECK_S
"""Pauses of who waits for a job while Redis is away: twice as long each time."""

TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")


class Jobs:
    """The jobs of one caller, as one request sees them. Those of others do not exist, except for an admin."""

    def __init__(self, gateway: Gateway, caller: Caller, request: Request, links: Links) -> None:
        self._gateway, self._queue = gateway, gateway.queue
        self._request = request
        self.caller, self.links = caller, links

    async def accept(
        self,
        create: GenerationCreate,
        *,
        dialect: str = "native",
        echo: dict[str, Any] | None = None,
        webhook: Webhook | None = None,
        idempotency: Idempotency | None = None,
        hold_s: float | None = None,
    ) -> JobView:
        """Puts a job into its queue; the same idempotency key again gives the first answer again.

        dialect, echo: in whose words its owner is answered, and what those answers repeat of the request.
        webhook: who is told; None: as the request says.
        hold_s: the caller will wait so long for the pictures: WaitTooLong if the job would start later than that.
        UnknownModel, InvalidField, Forbidden, QueueFull, ModelDraining, TooManyJobs, IdempotencyKeyReused.
        """
        state = self._request.state
        state.asked, state.dialect = True, dialect
        if idempotency and (first := await self._replay(idempotency)):
            return first
        self._need("generate")
        if create.priority == "high":
            self._need("high-priority")
        card = await self._gateway.catalog.card(create.model)
        state.model = card.name
        job = replace(
            resolve(create, card, self._gateway.settings, request_id=state.request_id),
            owner=self.caller.id,
            dialect=dialect,
            echo=echo or {},
            trace=self._trace(),
        )
        webhook = webhook or job.webhook
        if webhook is not None:
            await self._gateway.targets.check(webhook.url, "webhook.url" if dialect == "native" else "webhook")
            # whoever calls it has no request to tell the base url by
            job = replace(job, webhook=webhook, echo=job.echo | {"base_url": self.links.base_url})
        if hold_s is not None:
            await self._check_wait(job, hold_s)
        accepted = await self._queue.submit(job, idempotency=idempotency, max_active=self.caller.max_active)
        state.generation, state.replayed = accepted.job_id, accepted.replayed
        if accepted.replayed:
            job = (await self._queue.view(accepted.job_id)).job
        return JobView(job=job, status="queued", position=accepted.position)

    async def _replay(self, idempotency: Idempotency) -> JobView | None:
        """The first answer under this key, whatever changed since: cards, scopes, where webhooks may go."""
        if self.caller.scopes.isdisjoint(("generate", "read")):
            return None
        view = await self._queue.replay(idempotency)
        if view is not None:
            state = self._request.state
            state.model, state.generation, state.replayed = view.job.model, view.job.id, True
        return view

    async def get(self, job_id: str) -> JobView:
        """One of the caller's jobs. UnknownGeneration: also where it is another's."""
        self._need("generate", "read")
        view = await self._queue.view(job_id)
        if view.job.owner != self.caller.id and "admin" not in self.caller.scopes:
            raise UnknownGeneration(job_id)
        return view

    async def page(self, limit: int, before: str | None = None) -> list[JobView]:
        """The caller's own jobs, newest first, at most `limit` of them, those older than `before`."""
        self._need("generate", "read")
        return await self._queue.page(self.caller.id, limit=limit, before=before)

    async def hold(self, view: JobView, seconds: float, *, cancel_if_gone: bool = False) -> JobView:
        """The job once it has ended, when the time is up, or when the gateway drains.

        ClientGone if nobody waits any more; the job is canceled first if `cancel_if_gone`. Nothing else is raised:
        the job is accepted, and an answer that says so is better than none. Redis may go away and come back meanwhile;
        where it is away in the end, the job is given as it was.
        """
        work = self._wait(view.job.id, seconds), self._gateway.draining.wait(), gone(self._request)
        async with _together(*work) as (waiting, _draining, leaving):
            if leaving.done() and not waiting.done():
                if cancel_if_gone:
                    with contextlib.suppress(DarkroomError):
                        await self._queue.cancel(view.job.id)
                raise ClientGone
            with contextlib.suppress(DarkroomError):
                return waiting.result() if waiting.done() else await self._queue.view(view.job.id)
            return view

    async def _wait(self, job_id: str, seconds: float) -> JobView:
        """The job once it has ended or the time is up. UnknownGeneration; QueueUnavailable only when the time is up."""
        loop = asyncio.get_running_loop()
        end_at, pause_s = loop.time() + seconds, AWAY_FIRST_S
        while True:
            try:
                return await self._queue.wait(job_id, max(0, end_at - loop.time()))
            except QueueUnavailable:
                left_s = end_at - loop.time()
                if left_s <= 0:
                    raise
            await asyncio.sleep(min(pause_s, left_s))
            pause_s = min(2 * pause_s, AWAY_LAST_S)

    async def cancel(self, job_id: str) -> JobView:
        """Cancels a queued job at once, a running one at its next step; leaves an ended one. UnknownGeneration."""
        self._need("generate")
        await self.get(job_id)
        return await self._queue.cancel(job_id)

    async def forget(self, job_id: str) -> None:
        """Ends the job if need be and deletes all that is known of it, pictures first. UnknownGeneration."""
        view = await self.cancel(job_id)  # nothing is stored for good after this
        await self._in_store(self._gateway.store.delete_prefix, view.job.id)
        await self._queue.forget(view.job.id)

    def events(self, job_id: str, after: str) -> AsyncGenerator[Event, None]:
        """What happened to a job after that event, then what happens, until it has ended. Look at it with `get` first.

        UnknownGeneration, QueueUnavailable.
        """
        return self._queue.events(job_id, after)

    async def preview(self, job_id: str) -> bytes | None:
        """The latest preview of a running job that is watched: a small JPEG."""
        return await self._queue.preview(job_id)

    @contextlib.asynccontextmanager
    async def watching(self, job_id: str) -> AsyncIterator[None]:
        """Asks for previews of a job all the while; a worker makes none that nobody asked for."""
        task = asyncio.create_task(self._keep_watching(job_id))
        try:
            yield
        finally:
            await end(task)

    async def _keep_watching(self, job_id: str) -> None:
        while True:
            with contextlib.suppress(DarkroomError):
                await self._queue.watch(job_id)
            await asyncio.sleep(WATCH_EVERY_S)

    async def picture(self, view: JobView, n: int) -> tuple[bytes, Picture]:
        """The bytes of picture `n`. NotFinished, NoPicture, PicturesExpired, PictureLost, StoreUnavailable."""
        picture = finished_picture(view, n)
        data = await self._in_store(self._gateway.store.get, picture.key)
        if data is None:
            expires_at = view.result.expires_at if view.result else None
            raise PictureLost(view.job.id, n, "forever" if expires_at is None else utc(expires_at))
        return data, picture

    async def picture_link(self, view: JobView, n: int, expires_s: float) -> str | None:
        """Where the store itself gives picture `n` for so long; None: get it by `picture`. StoreUnavailable."""
        link: str | None = await self._in_store(self._gateway.store.link, finished_picture(view, n).key, expires_s)
        return link

    def _need(self, *scopes: Scope) -> None:
        """Forbidden unless the caller has one of the scopes."""
        if self.caller.scopes.isdisjoint(scopes):
            raise Forbidden(" or ".join(scopes), self.caller.scopes)

    async def _check_wait(self, job: Job, hold_s: float) -> None:
        expected_s = await self._queue.expected_wait(job.model, job.priority, job.owner)
        if expected_s is not None and expected_s > hold_s:
            raise WaitTooLong(expected_s, hold_s)

    def _trace(self) -> str:
        own = getattr(self._request.state, "trace", "")  # of this request's span: see app.tracing
        parent: str = own or self._request.headers.get("traceparent", "")
        return parent if TRACEPARENT.fullmatch(parent) else ""

    async def _in_store(self, work: Any, *args: Any) -> Any:
        try:
            async with asyncio.timeout(STORE_TIMEOUT_S):
                return await asyncio.to_thread(work, *args)
        except TimeoutError as error:
            raise StoreUnavailable(f"no answer within {STORE_TIMEOUT_S:g} s") from error


async def gone(request: Request) -> None:
    """Returns once the client has closed its connection; its body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def finished_picture(view: JobView, n: int) -> Picture:
    """Picture `n` of a job that succeeded. NotFinished, NoPicture, PicturesExpired."""
    job, result = view.job, view.result
    if n >= job.num_images:
        raise NoPicture(f"generation '{job.id}' has no picture {n}; it has {_numbers(job)}")
    if view.status not in TERMINAL:
        raise NotFinished(job.id, view.status)
    if view.status != "succeeded" or result is None or n >= len(result.pictures):
        raise NoPicture(f"generation '{job.id}' is {view.status}: it has no pictures")
    if result.expires_at is not None and result.has_expired(time.time()):
        raise PicturesExpired(job.id, utc(result.expires_at), _why_expired(job))
    return result.pictures[n]


def _numbers(job: Job) -> str:
    return "picture 0" if job.num_images == 1 else f"pictures 0 to {job.num_images - 1}"


def _why_expired(job: Job) -> str:
    if job.picture_lifetime_s is None:
        return "this server keeps pictures no longer"
    return f"the request asked for {job.picture_lifetime_s} s (expires_in_s)"


@contextlib.asynccontextmanager
async def _together(*work: Any) -> AsyncIterator[list[asyncio.Task[Any]]]:
    """The tasks of the coroutines once one of them is done; the others are canceled in the end."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        yield tasks
    finally:
        for task in tasks:  # all before any is waited for: whoever waits here may be canceled in turn
            task.cancel()
        for task in tasks:
            await end(task)
