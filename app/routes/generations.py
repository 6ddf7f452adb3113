"""Generations: ask for one, follow it, fetch its pictures, cancel it."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from typing import Annotated

from fastapi import APIRouter, Header, Path, Request, Response, status

from app.deps import BaseUrl, Gateway, GatewayDep, JobId, JsonOnly, WaitSeconds
from app.errors import NoPicture, NotFinished
from app.examples import QUEUED
from app.limits import resolve
from app.schemas import Generation, GenerationCreate, moment, refusals
from worker.contract.errors import DarkroomError, PicturesExpired, StoreUnavailable
from worker.contract.job import MEDIA_TYPES, TERMINAL, Job, JobView, Picture

STORE_TIMEOUT_S = 10.0

router = APIRouter(tags=["generations"])


@router.post(
    "/v1/generations",
    summary="Ask for pictures",
    status_code=status.HTTP_202_ACCEPTED,
    dependencies=[JsonOnly],
    response_description="Accepted; `Location` and `urls.self` say where to look.",
    responses={
        200: {"model": Generation, "description": "Ended within the seconds of `Prefer: wait=N`."},
        202: {"content": {"application/json": {"example": QUEUED}}},
        **refusals(400, 404, 408, 413, 415, 422, 429, 503),
    },
)
async def create_generation(
    create: GenerationCreate,
    gateway: GatewayDep,
    base_url: BaseUrl,
    wait_s: WaitSeconds,
    request: Request,
    response: Response,
) -> Generation:
    """Accepts a job and answers with its id; with `Prefer: wait=N`, after it has ended or N seconds."""
    card = await gateway.catalog.card(create.model)
    request.state.model = card.name
    job = resolve(
        create,
        card,
        record_lifetime_s=gateway.settings.record_lifetime_s,
        request_id=request.state.request_id,
    )
    position = await gateway.queue.submit(job)
    request.state.generation = job.id
    view = JobView(job=job, status="queued", position=position)
    if wait_s is not None:
        view = await _held(gateway, view, wait_s)
        response.headers["preference-applied"] = f"wait={wait_s}"
        if view.status in TERMINAL:
            response.status_code = status.HTTP_200_OK
    response.headers["location"] = f"{base_url}/v1/generations/{job.id}"
    return Generation.of(view, base_url)


@router.get("/v1/generations/{id}", summary="Look at a generation", responses=refusals(404, 503))
async def get_generation(job_id: JobId, gateway: GatewayDep, base_url: BaseUrl) -> Generation:
    """Tells how far a generation is and, once it has succeeded, where its pictures are."""
    return Generation.of(await gateway.queue.view(job_id), base_url)


@router.post("/v1/generations/{id}/cancel", summary="Cancel a generation", responses=refusals(404, 503))
async def cancel_generation(job_id: JobId, gateway: GatewayDep, base_url: BaseUrl) -> Generation:
    """Cancels at once if queued, at its next step if running; changes nothing once it has ended."""
    return Generation.of(await gateway.queue.cancel(job_id), base_url)


@router.get(
    "/v1/generations/{id}/images/{n}",
    summary="Fetch a picture",
    response_class=Response,
    response_description="The file, in the format chosen at creation.",
    responses={
        200: {"content": {kind: {"schema": {"type": "string", "format": "binary"}} for kind in MEDIA_TYPES.values()}},
        304: {"description": "The client has it already (`If-None-Match`)."},
        **refusals(404, 410, 422, 503),
    },
)
async def get_image(
    job_id: JobId,
    n: Annotated[int, Path(ge=0, description="Which picture, from 0.")],
    gateway: GatewayDep,
    if_none_match: Annotated[str | None, Header(description="An `ETag` that the client holds.")] = None,
) -> Response:
    """The bytes of one picture; immutable, so caches may keep them until they expire."""
    view = await gateway.queue.view(job_id)
    picture, expires_at = _finished_picture(view, n)
    tag = f'"{hashlib.blake2b(picture.key.encode(), digest_size=12).hexdigest()}"'
    seconds_left = max(0, int(expires_at - time.time()))
    headers = {"etag": tag, "cache-control": f"private, max-age={seconds_left}, immutable"}
    if _holds(if_none_match, tag):
        return Response(status_code=status.HTTP_304_NOT_MODIFIED, headers=headers)
    data = await _stored(gateway, picture)
    if data is None:
        raise NoPicture(f"picture {n} of generation '{job_id}' is no longer in the store")
    headers["content-disposition"] = f'inline; filename="{job_id}-{n}.{picture.format}"'
    headers["x-content-type-options"] = "nosniff"
    return Response(data, media_type=MEDIA_TYPES[picture.format], headers=headers)


async def _held(gateway: Gateway, view: JobView, wait_s: float) -> JobView:
    """The job once it has ended, after `wait_s`, or when the gateway drains. It is accepted: nothing here may fail."""
    waiting = asyncio.ensure_future(gateway.queue.wait(view.job.id, wait_s))
    draining = asyncio.ensure_future(gateway.draining.wait())
    try:
        await asyncio.wait({waiting, draining}, return_when=asyncio.FIRST_COMPLETED)
        with contextlib.suppress(DarkroomError):
            return waiting.result() if waiting.done() else await gateway.queue.view(view.job.id)
        return view
    finally:
        waiting.cancel()
        draining.cancel()


def _finished_picture(view: JobView, n: int) -> tuple[Picture, float]:
    """Picture `n` and when it expires. NotFinished, NoPicture, PicturesExpired."""
    job, result = view.job, view.result
    if n >= job.num_images:
        raise NoPicture(f"generation '{job.id}' has no picture {n}; it has {_numbers(job)}")
    if view.status not in TERMINAL:
        raise NotFinished(job.id, view.status)
    if view.status != "succeeded" or result is None or n >= len(result.pictures):
        raise NoPicture(f"generation '{job.id}' is {view.status}: it has no pictures")
    expires_at = float("inf") if result.expires_at is None else result.expires_at
    if expires_at <= time.time():
        raise PicturesExpired(job.id, f"{moment(expires_at):%Y-%m-%dT%H:%M:%SZ}")
    return result.pictures[n], expires_at


def _numbers(job: Job) -> str:
    return "picture 0" if job.num_images == 1 else f"pictures 0 to {job.num_images - 1}"


async def _stored(gateway: Gateway, picture: Picture) -> bytes | None:
    try:
        async with asyncio.timeout(STORE_TIMEOUT_S):
            return await asyncio.to_thread(gateway.store.get, picture.key)
    except TimeoutError as error:
        raise StoreUnavailable(f"no answer within {STORE_TIMEOUT_S:g} s") from error


def _holds(if_none_match: str | None, tag: str) -> bool:
    """Weak comparison, as If-None-Match asks for."""
    held = [candidate.strip().removeprefix("W/") for candidate in (if_none_match or "").split(",")]
    return tag in held or held == ["*"]
