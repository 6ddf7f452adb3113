"""Replicate's HTTP API: predictions, and what its clients ask of models, files and webhooks to make them.

It lives at the root, as Replicate's does: its paths and ours do not meet.
"""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from itertools import product
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.sse import format_sse_event
from pydantic import Field
from starlette.responses import JSONResponse

from app.deps import CallerDep, Gateway, GatewayDep, JobId, JobsDep, JobsOrSigned, LinksDep, preferred_wait_s
from app.dialects import predictions
from app.dialects.body import NO_PICTURES, Asked, checked, read_json
from app.dialects.call import Call, accept, comes_back
from app.dialects.models import card_named
from app.dialects.predictions import EVENTS, VERSIONS, Input, Published, prediction, published_as, version_id
from app.dialects.retries import Retry, adopted, retry_of
from app.errors import ClientGone, Shown, Words
from app.jobs import Jobs
from app.refusals import Refusal
from app.schemas import MAX_WAIT_S
from app.sse import EventStream
from worker.contract.cards import ModelCard
from worker.contract.errors import DarkroomError, InvalidField
from worker.contract.job import TERMINAL, JobView, Webhook

PREFIXES = (
    "/v1/predictions",
    "/v1/deployments",
    "/v1/models/*/*",
    "/v1/files",
    "/v1/webhooks",
    "/v1/account",
    "/v1/trainings",
    "/v1/hardware",
    "/v1/collections",
)

ANSWER_WITHIN_S = 0.3
"""Clients hang up half a second after the time that they asked to wait for."""

PAGE = 100
DURATION = re.compile(r"(?:(\d{1,6})h)?(?:(\d{1,6})m)?(?:(\d{1,6})s?)?", re.ASCII)
MOMENT = re.compile(r"\d{1,20}(-\d{1,20}){1,2}", re.ASCII)
HEXADECIMAL = re.compile(r"[0-9a-f]{64}", re.ASCII)

TITLES = {401: "Unauthenticated", 404: "Not Found", 422: "Input validation failed", 429: "Too Many Requests"}

router = APIRouter(include_in_schema=False)


class Create(Asked):
    """The body of a request for a prediction."""

    version: str | None = Field(
        None, max_length=256, description="the id of a version, owner/name or owner/name:version"
    )
    input: dict[str, Any] = Field(default_factory=dict, description="a JSON object")
    webhook: str | None = Field(None, description="an https url")
    webhook_completed: str | None = Field(None, description="an https url")
    webhook_events_filter: list[Literal["start", "output", "logs", "completed"]] | None = Field(
        None, description="a list of start, output, logs, completed"
    )
    stream: bool | None = Field(None, description="true, false")  # a stream is there for who wants it


@dataclass(frozen=True)
class Wanted:
    """The model that a client means, and what it takes it for."""

    card: ModelCard
    model: str  # owner/name
    version: str
    published: Published
    deployment: str | None = None


@router.post("/v1/predictions")
async def create(request: Request, jobs: JobsDep, gateway: GatewayDep) -> Response:
    """A prediction by a version of a model."""
    body = await read_json(request)
    version = checked(Create, body).version
    if version is None:
        raise InvalidField("version", Shown(None), "the id of a version, owner/name or owner/name:version")
    return await _create(body, await _by_version(version, gateway), request, jobs, gateway)


@router.post("/v1/models/{owner}/{name}/predictions")
async def create_by_model(owner: str, name: str, request: Request, jobs: JobsDep, gateway: GatewayDep) -> Response:
    """A prediction by the latest version of a model."""
    return await _create(await read_json(request), await _by_name(owner, name, gateway), request, jobs, gateway)


@router.post("/v1/deployments/{owner}/{name}/predictions")
async def create_by_deployment(owner: str, name: str, request: Request, jobs: JobsDep, gateway: GatewayDep) -> Response:
    """The same: here every model is deployed under its name."""
    wanted = await _by_name(owner, name, gateway, deployed=True)
    return await _create(await read_json(request), wanted, request, jobs, gateway)


@router.get("/v1/deployments")
async def list_deployments(_: CallerDep) -> dict[str, Any]:
    """None: a deployment is there for who names it."""
    return {"previous": None, "next": None, "results": []}


@router.get("/v1/deployments/{owner}/{name}")
async def get_deployment(owner: str, name: str, gateway: GatewayDep, _: CallerDep) -> dict[str, Any]:
    """The deployment of a model; nothing was ever released, for it is always the latest version."""
    await _by_name(owner, name, gateway, deployed=True)
    return {"owner": owner, "name": name, "current_release": None}


@router.get("/v1/predictions")
async def list_predictions(jobs: JobsDep, cursor: Annotated[str | None, Query()] = None) -> dict[str, Any]:
    """The caller's predictions, newest first; what it asked for in other words is among them."""
    views = await jobs.page(PAGE + 1, cursor)
    more = f"{jobs.links.base_url}/v1/predictions?cursor={views[PAGE - 1].job.id}" if len(views) > PAGE else None
    return {"previous": None, "next": more, "results": [prediction(view, jobs.links) for view in views[:PAGE]]}


@router.get("/v1/predictions/{id}")
async def get(job_id: JobId, jobs: JobsDep) -> dict[str, Any]:
    """A prediction as it is now."""
    return prediction(await jobs.get(job_id), jobs.links)


@router.post("/v1/predictions/{id}/cancel")
async def cancel(job_id: JobId, jobs: JobsDep) -> dict[str, Any]:
    """Cancels a prediction at once if it waits, at its next step if it runs."""
    return prediction(await jobs.cancel(job_id), jobs.links)


@router.get("/v1/predictions/{id}/stream")
async def stream(
    job_id: JobId,
    jobs: JobsOrSigned,
    gateway: GatewayDep,
    last_event_id: Annotated[str, Header()] = "",
) -> Response:
    """What becomes of a prediction, as server-sent events: logs, output, error, done."""
    view = await jobs.get(job_id)
    return EventStream(_streamed(view, jobs, _moment(last_event_id)), gateway.draining)


@router.get("/v1/models/{owner}/{name}")
async def get_model(owner: str, name: str, gateway: GatewayDep, links: LinksDep, _: CallerDep) -> dict[str, Any]:
    """A model with its latest version."""
    wanted = await _by_name(owner, name, gateway)
    return predictions.model(wanted.card, owner, name, _version(wanted), links)


@router.get("/v1/models/{owner}/{name}/versions")
async def list_versions(owner: str, name: str, gateway: GatewayDep, _: CallerDep) -> dict[str, Any]:
    """The one version that there is."""
    wanted = await _by_name(owner, name, gateway)
    return {"previous": None, "next": None, "results": [_version(wanted)]}


@router.get("/v1/models/{owner}/{name}/versions/{version}")
async def get_version(owner: str, name: str, version: str, gateway: GatewayDep, _: CallerDep) -> dict[str, Any]:
    """A version with the schema of its input and output."""
    return _version(await _by_version(f"{owner}/{name}:{version}", gateway))


@router.get("/v1/files")
async def list_files(_: CallerDep) -> dict[str, Any]:
    """None: see `create_file`."""
    return {"previous": None, "next": None, "results": []}


@router.post("/v1/files")
async def create_file(_: CallerDep) -> Response:
    """Refused: files are input of models that take pictures."""
    raise InvalidField("content", Words("given"), "none: no model here takes pictures as input yet, only text")


@router.get("/v1/account")
async def account(caller: CallerDep, links: LinksDep) -> dict[str, Any]:
    """Whose API key it is: clients try theirs with it."""
    return {"type": "organization", "username": "darkroom", "name": caller.name, "github_url": links.base_url}


def render(said: Refusal) -> Response:
    """A problem of RFC 7807. Clients read `detail`, which must be text."""
    detail = said.message
    if said.code == "rate_limited":
        detail = f"Request was throttled. Your rate limit resets in ~{said.headers.get('retry-after', '1')}s."
    problem: dict[str, Any] = {
        "type": "about:blank",
        "title": TITLES.get(said.status, said.code.replace("_", " ").capitalize()),
        "status": said.status,
        "detail": detail,
        "code": said.code,
        "request_id": said.request_id,
    }
    if said.field:
        where = f"input.{said.field}" if said.field in Input.model_fields else said.field
        problem["invalid_fields"] = [{"type": said.code, "field": where, "description": said.message}]
    return JSONResponse(problem, said.status, said.headers, media_type="application/problem+json")


async def _create(body: dict[str, Any], wanted: Wanted, request: Request, jobs: Jobs, gateway: Gateway) -> Response:
    """Accepts the prediction and answers at once, or with `Prefer: wait` once it has ended or the time is up.

    While it has not ended the answer says `starting`: clients take any other word for an end.
    """
    asked = checked(Create, body)
    call = _call(body, asked, wanted, _cancel_after_s(request))
    retry = None if comes_back(request) else await retry_of(request, jobs)
    view = await adopted(jobs, gateway, retry) or await accept(call, jobs, request, webhook=_webhook(asked))
    hold_s, status = preferred_wait_s(request, unsaid=MAX_WAIT_S), 201
    if hold_s is not None:
        view = await _held(view, jobs, gateway, max(1, hold_s) - ANSWER_WITHIN_S, retry)
        status = 201 if view.status in TERMINAL else 202
    said = prediction(view, jobs.links)
    if view.status not in TERMINAL:
        said["status"] = "starting"
    return JSONResponse(said, status, {"location": said["urls"]["get"]})


async def _held(view: JobView, jobs: Jobs, gateway: Gateway, hold_s: float, retry: Retry | None) -> JobView:
    """The job at the end of the wait. ClientGone: it goes on, and a client that asks again by itself gets it."""
    try:
        return await jobs.hold(view, hold_s)
    except ClientGone:
        if retry is not None:
            await gateway.queue.orphans.leave(retry.request, view.job.id)
        raise


def _call(sent: dict[str, Any], asked: Create, wanted: Wanted, cancel_after_s: int | None) -> Call:
    if asked.input.get("image"):
        raise InvalidField("image", Words("given"), NO_PICTURES)
    given = checked(Input, asked.input)
    echo: dict[str, Any] = {
        "model": wanted.model,
        "version": wanted.version,
        "array": wanted.published.array,
        "input": asked.input,
        "ignored": predictions.ignored(given, asked.input),
        "cancel_after_s": cancel_after_s,
        "deployment": wanted.deployment,
        "webhook_events_filter": asked.webhook_events_filter,
    }
    return Call(
        dialect="replicate",
        sent=[sent, cancel_after_s],
        asked=given,
        create=predictions.fields_of(given, wanted.card, wanted.published) | {"deadline_s": cancel_after_s},
        names=predictions.names_of(given),
        echo={name: value for name, value in echo.items() if value is not None},
    )


def _webhook(asked: Create) -> Webhook | None:
    if asked.webhook is None:
        return Webhook(url=asked.webhook_completed) if asked.webhook_completed else None
    wanted = EVENTS if asked.webhook_events_filter is None else asked.webhook_events_filter
    return Webhook(url=asked.webhook, events=tuple(dict.fromkeys(EVENTS[name] for name in wanted)))


async def _by_name(owner: str, name: str, gateway: Gateway, *, deployed: bool = False) -> Wanted:
    """The latest version of a model. UnknownModel."""
    model = f"{owner}/{name}"
    card = await card_named(gateway.catalog, model)
    published = published_as(name, card)
    id = version_id(card.name, card.revision, array=published.array)
    return Wanted(card, model, id, published, model if deployed else None)


async def _by_version(text: str, gateway: Gateway) -> Wanted:
    """The model of `id`, `owner/name` or `owner/name:id`. UnknownModel, InvalidField."""
    path, _, id = text.rpartition(":") if ":" in text else (text, "", "") if "/" in text else ("", "", text)
    owner, _, name = path.rpartition("/")
    if path and not id:
        return await _by_name(owner, name, gateway)
    cards = [await card_named(gateway.catalog, path)] if path else list((await gateway.catalog.cards()).values())
    for card, array in product(cards, (False, True)):
        if id == version_id(card.name, card.revision, array=array):
            published = replace(published_as(name, card), array=array)
            return Wanted(card, path or f"darkroom/{card.name}", id, published)
    if id[:8] in VERSIONS and (HEXADECIMAL.fullmatch(id) or len(id) == 8):
        name, published = VERSIONS[id[:8]]
        return Wanted(await card_named(gateway.catalog, path or name), path or f"stability-ai/{name}", id, published)
    known = ", ".join(f"{version_id(card.name, card.revision)} ({card.name})" for card in cards)
    raise InvalidField("version", Shown(text), f"{known or 'none yet'}; or owner/name, for the latest")


def _version(wanted: Wanted) -> dict[str, Any]:
    return predictions.version(wanted.version, wanted.card, wanted.published)


def _cancel_after_s(request: Request) -> int | None:
    """Seconds of the header Cancel-After, such as 90, 30s, 5m or 1h30m. InvalidField."""
    text = request.headers.get("cancel-after", "").strip().lower()
    if not text:
        return None
    match = DURATION.fullmatch(text)
    seconds = sum(int(n or 0) * unit for n, unit in zip(match.groups(), (3600, 60, 1), strict=True)) if match else 0
    if not 5 <= seconds <= 3600:
        raise InvalidField("cancel-after", Shown(text), "5s to 1h, such as 30s, 5m or 1h")
    return seconds


async def _streamed(view: JobView, jobs: Jobs, seen: tuple[int, ...]) -> AsyncGenerator[bytes, None]:
    """The events of a stream after the one of that id; a client that lost its connection goes on where it was.

    Ends early when Redis goes away: the client comes back.
    """
    job, shown, id = view.job, 0, "0-0"
    with suppress(DarkroomError):
        async with aclosing(jobs.events(job.id, id)) as events:
            async for event in events:
                id = event.id
                if event.name != "progress":
                    continue
                text = predictions.progress_log(job, event.data["step"])
                fresh, shown = text[shown:], max(shown, len(text))
                if fresh and _moment(id) > seen:
                    yield format_sse_event(event="logs", data_str=fresh, id=id)
        said = prediction(await jobs.get(job.id), jobs.links)
        for n, (name, data) in enumerate(predictions.last_words(said, shown), 1):
            if _moment(f"{id}-{n}") > seen:
                yield format_sse_event(event=name, data_str=data, id=f"{id}-{n}")


def _moment(id: str) -> tuple[int, ...]:
    """The place of an event of a stream among the others; before all if it is none of ours."""
    return tuple(map(int, id.split("-"))) if MOMENT.fullmatch(id) else ()
