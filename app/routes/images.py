"""Pictures: their bytes."""

from __future__ import annotations

import hashlib
import time
from typing import Annotated

from fastapi import APIRouter, Header, Path, Request, Response, status

from app.deps import JobId, JobsOrSigned, KnownQuery
from app.etags import holds
from app.jobs import finished_picture
from app.schemas import refusals
from worker.contract.job import MEDIA_TYPES, JobView

LINK_S = 300.0
"""A link into the store lives no longer: whoever has it needs nothing else."""

ROUTE = "/v1/generations/{id}/images/{n}"

router = APIRouter(tags=["generations"], responses=refusals(422))


@router.head(ROUTE, include_in_schema=False)
@router.get(
    ROUTE,
    summary="Fetch a picture",
    response_class=Response,
    response_description="The file, in the format chosen at creation.",
    responses={
        200: {"content": {kind: {"schema": {"type": "string", "format": "binary"}} for kind in MEDIA_TYPES.values()}},
        307: {"description": "The picture is at `location`, a url of the store that lives for minutes."},
        304: {"description": "The client has it already (`If-None-Match`)."},
        **refusals(401, 403, 404, 410, 422, 503),
    },
)
async def get_image(
    request: Request,
    jobs: JobsOrSigned,
    _query: Annotated[None, KnownQuery],  # after the key
    job_id: JobId,
    n: Annotated[int, Path(ge=0, description="Which picture, from 0.")],
    if_none_match: Annotated[str | None, Header(description="An `ETag` that the client holds.")] = None,
) -> Response:
    """The bytes of one picture; immutable, so caches may keep them until they expire.

    The urls in answers are signed where API keys are on: whoever has one needs no key, so that a page can show it.
    """
    view = await jobs.get(job_id)
    picture = finished_picture(view, n)
    tag = f'"{hashlib.blake2b(picture.key.encode(), digest_size=12).hexdigest()}"'
    headers = {"etag": tag, "cache-control": f"private, max-age={_seconds_left(view)}, immutable"}
    if holds(if_none_match, tag):
        return Response(status_code=status.HTTP_304_NOT_MODIFIED, headers=headers)
    expires_s = min(LINK_S, _seconds_left(view))
    # a link is signed for GET alone, so whoever asks for the head is answered here
    if request.method == "GET" and (link := await jobs.picture_link(view, n, expires_s)):
        headers = {"location": link, "cache-control": f"private, max-age={int(expires_s / 2)}"}
        return Response(status_code=status.HTTP_307_TEMPORARY_REDIRECT, headers=headers)
    data, picture = await jobs.picture(view, n)
    headers["content-disposition"] = f'inline; filename="{job_id}-{n}.{picture.format}"'
    headers["x-content-type-options"] = "nosniff"
    return Response(data, media_type=MEDIA_TYPES[picture.format], headers=headers)


def _seconds_left(view: JobView) -> int:
    expires_at = view.result.expires_at if view.result else None
    return 0 if expires_at is None else max(0, int(expires_at - time.time()))
