"""Generations: ask for one, look at it, list them, cancel it, forget it."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request, Response, status

from app.deps import IdempotencyKey, JobId, JobsDep, JsonOnly, KnownCaller, KnownQuery, WaitSeconds
from app.errors import Shown
from app.examples import QUEUED
from app.idempotency import idempotency
from app.schemas import MAX_PAGE, Generation, GenerationCreate, GenerationPage, refusals
from worker.contract.errors import InvalidField
from worker.contract.job import JOB_ID, TERMINAL

ROUTE = "/v1/generations"

router = APIRouter(tags=["generations"], dependencies=[KnownCaller, KnownQuery], responses=refusals(422))


@router.post(
    ROUTE,
    summary="Ask for pictures",
    status_code=status.HTTP_202_ACCEPTED,
    dependencies=[JsonOnly],
    response_description="Accepted; `Location` and `urls.self` say where to look.",
    responses={
        200: {"model": Generation, "description": "Ended within the seconds of `Prefer: wait=N`."},
        202: {"content": {"application/json": {"example": QUEUED}}},
        **refusals(400, 401, 403, 404, 408, 413, 415, 422, 429, 503),
    },
)
async def create_generation(
    create: GenerationCreate,
    jobs: JobsDep,
    wait_s: WaitSeconds,
    request: Request,
    response: Response,
    idempotency_key: IdempotencyKey = None,
) -> Generation:
    """Accepts a job and answers with its id; with `Prefer: wait=N`, after it has ended or N seconds.

    The same `Idempotency-Key` with the same body gives the first answer again for 24 hours.
    """
    once = None
    if idempotency_key is not None:
        body = create.model_dump(mode="json")
        once = idempotency(idempotency_key, owner=jobs.caller.id, route=f"POST {ROUTE}", request=body)
    view = await jobs.accept(create, idempotency=once)
    if request.state.replayed:
        response.headers["idempotency-replayed"] = "true"
    if wait_s is not None:
        view = await jobs.hold(view, wait_s)
        response.headers["preference-applied"] = f"wait={wait_s}"
        if view.status in TERMINAL:
            response.status_code = status.HTTP_200_OK
    response.headers["location"] = jobs.links.generation(view.job.id)
    return Generation.of(view, jobs.links)


@router.get(ROUTE, summary="List your generations", responses=refusals(401, 403, 422, 503))
async def list_generations(
    jobs: JobsDep,
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE, description="Generations of a page.")] = 20,
    cursor: Annotated[str | None, Query(description="`next` of the page before.")] = None,
) -> GenerationPage:
    """The generations asked for with this API key (where there are none: all), newest first."""
    if cursor is not None and not JOB_ID.fullmatch(cursor):
        raise InvalidField("cursor", Shown(cursor), "`next` of a page that was answered")
    views = await jobs.page(limit + 1, before=cursor)
    more = len(views) > limit
    return GenerationPage(
        generations=[Generation.of(view, jobs.links) for view in views[:limit]],
        next=views[limit - 1].job.id if more else None,
    )


@router.get(f"{ROUTE}/{{id}}", summary="Look at a generation", responses=refusals(401, 403, 404, 503))
async def get_generation(jobs: JobsDep, job_id: JobId) -> Generation:
    """Tells how far a generation is and, once it has succeeded, where its pictures are."""
    return Generation.of(await jobs.get(job_id), jobs.links)


@router.post(f"{ROUTE}/{{id}}/cancel", summary="Cancel a generation", responses=refusals(401, 403, 404, 503))
async def cancel_generation(jobs: JobsDep, job_id: JobId) -> Generation:
    """Cancels at once if queued, at its next step if running; changes nothing once it has ended."""
    return Generation.of(await jobs.cancel(job_id), jobs.links)


@router.delete(
    f"{ROUTE}/{{id}}",
    summary="Forget a generation",
    status_code=status.HTTP_204_NO_CONTENT,
    response_description="Forgotten.",
    responses=refusals(401, 403, 404, 503),
)
async def forget_generation(jobs: JobsDep, job_id: JobId) -> None:
    """Cancels it if need be, then deletes its pictures, its prompt and its events."""
    await jobs.forget(job_id)
