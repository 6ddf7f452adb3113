"""Events: what happens to a generation, as it happens."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, aclosing, suppress
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Response, status
from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event

from app.deps import GatewayDep, JobId, JobsDep, KnownCaller, KnownQuery
from app.errors import Shown
from app.examples import EVENTS
from app.jobs import Jobs
from app.schemas import Generation, refusals
from app.sse import EventStream
from worker.contract.errors import DarkroomError, InvalidField
from worker.contract.events import EVENT_ID, FIRST, Event
from worker.contract.job import TERMINAL, JobView

EVENT = {
    "type": "object",
    "description": "One event. `data` is JSON.",
    "properties": {
        "event": {
            "type": "string",
            "enum": ["queued", "running", "progress", "preview", "succeeded", "failed", "canceled"],
        },
        "data": {"type": "string"},
        "id": {"type": "string", "description": "Its place in the stream; a queue position that changed has none."},
    },
    "required": ["event", "data"],
}

router = APIRouter(tags=["generations"], dependencies=[KnownCaller, KnownQuery], responses=refusals(422))


@router.get(
    "/v1/generations/{id}/events",
    summary="Follow a generation",
    response_class=Response,
    response_description="Server-sent events, from the first one or the one after `Last-Event-ID`, until it has ended.",
    responses={
        200: {"content": {"text/event-stream": {"schema": EVENT, "example": EVENTS}}},
        204: {"description": "It has ended and nothing came after `Last-Event-ID`: do not come back."},
        **refusals(401, 403, 404, 422, 503),
    },
)
async def follow_generation(
    jobs: JobsDep,
    job_id: JobId,
    gateway: GatewayDep,
    previews: Annotated[bool, Query(description="Also small pictures of what becomes of it.")] = False,
    last_event_id: Annotated[str | None, Header(description="The last event that the client has seen.")] = None,
) -> Response:
    """Sends an event whenever something happens, and the current queue position every few seconds while it waits.

    - `queued` `{"queue_position"}`, `running` `{}`, `progress` `{"step", "steps"}`
    - `preview` `{"step", "media_type", "image"}`: base64 of a small JPEG; only with `previews=true`
    - `succeeded`, `failed` or `canceled`: the generation; then the stream ends
    """
    view = await jobs.get(job_id)
    if last_event_id is not None and not EVENT_ID.fullmatch(last_event_id):
        raise InvalidField("Last-Event-ID", Shown(last_event_id), "the id of an event of this stream")
    after = last_event_id or FIRST
    if view.status in TERMINAL and after != FIRST and await _is_over(jobs, job_id, after):
        return Response(status_code=status.HTTP_204_NO_CONTENT)
    following = Following(jobs, view, previews)
    return EventStream(following.chunks(after), gateway.draining, idle=following.idle)


class Following:
    """One client that follows one job."""

    def __init__(self, jobs: Jobs, view: JobView, previews: bool) -> None:
        self._jobs, self._job_id, self._previews = jobs, view.job.id, previews
        self._waits, self._position = view.status == "queued", view.position

    async def chunks(self, after: str) -> AsyncGenerator[bytes, None]:
        """The events after that one, as they are sent. Ends early when Redis goes away: the client comes back."""
        async with AsyncExitStack() as stack:
            if self._previews:
                await stack.enter_async_context(self._jobs.watching(self._job_id))
            events = await stack.enter_async_context(aclosing(self._jobs.events(self._job_id, after)))
            with suppress(DarkroomError):
                async for event in events:
                    data = await self._data(event)
                    if data is not None:
                        yield format_sse_event(event=event.name, data_str=data, id=event.id)

    async def idle(self) -> bytes:
        """Where the job stands in its queue, if that has changed; it is no event of the job's, so it has no id."""
        if self._waits:
            with suppress(DarkroomError):
                view = await self._jobs.get(self._job_id)
                if view.position not in (None, self._position):
                    self._position = view.position
                    return format_sse_event(event="queued", data_str=_json({"queue_position": view.position}))
        return KEEPALIVE_COMMENT

    async def _data(self, event: Event) -> str | None:
        """What is said of an event; None: nothing."""
        self._waits = event.name == "queued"
        match event.name:
            case "queued":
                return _json({"queue_position": self._position})
            case "running":
                return "{}"
            case "progress":
                return _json({"step": event.data["step"], "steps": event.data["steps"]})
            case "preview":
                picture = await self._jobs.preview(self._job_id) if self._previews else None
                return _json(_preview(event, picture)) if picture else None
            case _:
                view = await self._jobs.get(self._job_id)
                return Generation.of(view, self._jobs.links).model_dump_json(by_alias=True)


async def _is_over(jobs: Jobs, job_id: str, after: str) -> bool:
    """Whether nothing came after that event of a job that has ended."""
    async with aclosing(jobs.events(job_id, after)) as events:
        return await anext(events, None) is None


def _preview(event: Event, picture: bytes) -> dict[str, Any]:
    image = base64.b64encode(picture).decode()
    return {"step": event.data["step"], "media_type": "image/jpeg", "image": image}


def _json(data: dict[str, Any]) -> str:
    return json.dumps(data, separators=(",", ":"))
