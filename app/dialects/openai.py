"""OpenAI's Images API, at a base url of its own and at the one of DeepInfra: generations, streaming, models."""

from __future__ import annotations

import asyncio
import json
import math
import time
from base64 import b64encode
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from typing import Annotated, Any, Literal

from anyio import CancelScope
from fastapi import APIRouter, Path, Request, Response
from fastapi.sse import format_sse_event
from pydantic import Field
from starlette.responses import JSONResponse

from app.deps import CallerDep, Gateway, GatewayDep, JobsDep
from app.dialects.body import Asked, checked, folded, in_their_words, read_json
from app.dialects.call import Call, accept, comes_back
from app.dialects.models import card_named, default_card, find_card
from app.dialects.partials import jpeg_size, partial_pictures
from app.dialects.retries import retry_of, told_once
from app.dialects.sizes import fitted
from app.dialects.synchronous import finish, succeeded
from app.errors import NotServed, Shown
from app.jobs import Jobs, finished_picture
from app.refusals import Refusal, status_of
from app.sse import EventStream
from model.params import Sampler
from worker.contract.cards import ModelCard
from worker.contract.errors import DarkroomError, InvalidField
from worker.contract.job import TERMINAL, JobView

PREFIXES = ("/openai/v1", "/v1/openai", "/v1/images")
"""The second is DeepInfra's; the third is for clients of other servers, whose base url ends in /v1."""

DEEPINFRA = "/v1/openai/"

SIZES = ("width", "height", "aspect_ratio")
"""Our fields that OpenAI's `size` stands for."""

Quality = Literal["auto", "low", "medium", "high", "xhigh", "max", "standard", "hd"]
STEPS: dict[Quality, float] = {"low": 0.5, "high": 1.5, "hd": 1.5, "xhigh": 2, "max": 3}
"""Steps by quality, in units of the model's default."""

SAID: dict[Quality, str] = {"auto": "medium", "standard": "medium", "hd": "high"}
"""What an answer calls a quality that answers do not know."""

FEW_STEPS = 4
"""Low quality does not go below so many steps: fewer make no picture."""

VENDORS_SIZES = frozenset({"256x256", "512x512", "1024x1024", "1024x1536", "1536x1024", "1024x1792", "1792x1024"})
"""What clients offer without knowing the model: the nearest size is made. All others are made exactly, or refused."""

URL_MODELS = ("dall-e-2", "dall-e-3")
"""Who asks for these reads urls, unless it says otherwise; everybody else reads base64."""

RETRYABLE = frozenset({429, 503})
DONE = frozenset({"store_unavailable"})
"""A client may try again after these statuses, for nothing was accepted; but not after these codes."""

UNMETERED = {
    "input_tokens": 0,
    "output_tokens": 0,
    "total_tokens": 0,
    "input_tokens_details": {"text_tokens": 0, "image_tokens": 0},
}
"""What clients of GPT Image models read: nothing here is sold by the token."""

STATUS = {422: 400}
CODES = {"unknown_model": "model_not_found", "unauthorized": "invalid_api_key", "invalid_field": "invalid_value"}
TYPES = {429: "rate_limit_error"}

router = APIRouter(include_in_schema=False)


class ImageGenerate(Asked):
    """A request for pictures. The fields after `partial_images` are not OpenAI's: `extra_body` carries them."""

    prompt: str = Field(min_length=1, description="text of 1 to 10,000 characters")
    model: str = Field("", description="text")
    n: int = Field(1, ge=1, le=10, description="a whole number from 1 to 4")
    size: str = Field(
        "auto",
        pattern=r"^(auto|[1-9][0-9]{1,3}x[1-9][0-9]{1,3})$",
        description='"auto", or width and height as "1024x768"',
    )
    quality: Quality = Field("auto", description="auto, low, medium, high, xhigh, max, standard, hd")
    response_format: Literal["url", "b64_json"] | None = Field(None, description="url, b64_json")
    output_format: Literal["png", "jpeg", "webp"] = Field("png", description="png, jpeg, webp")
    output_compression: int = Field(100, ge=0, le=100, description="a whole number from 0 to 100")
    background: Literal["opaque", "auto"] = Field("auto", description="opaque, auto; the model paints every pixel")
    stream: bool = Field(False, description="true, false")
    partial_images: int = Field(0, ge=0, le=3, description="a whole number from 0 to 3")
    negative_prompt: str = Field("", description="text of at most 10,000 characters")
    seed: int | None = Field(None, ge=0, lt=2**64, description="a whole number from 0 to 18446744073709551615")
    steps: int | None = Field(None, ge=1, description="a whole number, at least 1")
    num_inference_steps: int | None = Field(None, ge=1, description="a whole number, at least 1")
    guidance_scale: float | None = Field(None, ge=0, description="a number, at least 0")
    cfg_scale: float | None = Field(None, ge=0, description="a number, at least 0; the same as guidance_scale")
    width: int | None = Field(None, ge=1, description="pixels, a multiple of 16")
    height: int | None = Field(None, ge=1, description="pixels, a multiple of 16")
    aspect_ratio: str | None = Field(None, max_length=32, description="two whole numbers, such as 16:9")
    sampler: Sampler | None = Field(None, description="euler, dpmpp_2m")
    deterministic: bool = Field(False, description="true, false")


@router.post("/openai/v1/images/generations")
@router.post("/v1/openai/images/generations")
@router.post("/v1/images/generations")
async def generate(request: Request, jobs: JobsDep, gateway: GatewayDep) -> Response:
    """Pictures, in JSON once they are made, or in events as they are."""
    body = await read_json(request)
    asked = checked(ImageGenerate, body)
    card = await _card(request, asked.model, gateway)
    call = _call(body, asked, card)
    if asked.stream:
        view = await accept(call, jobs, request, hold_s=gateway.settings.hold_s)
        events = _events(view, jobs, gateway, asked, leave=comes_back(request))
        return EventStream(events, asyncio.Event())  # ends by itself, with an error
    retry = await retry_of(request, jobs)
    with told_once(retry):
        view = await finish(call, jobs, gateway, request, retry)
        return JSONResponse(await _answer(view, jobs, asked))


@router.post("/openai/v1/images/edits")
@router.post("/openai/v1/images/variations")
@router.post("/v1/openai/images/edits")
@router.post("/v1/openai/images/variations")
@router.post("/v1/images/edits")
@router.post("/v1/images/variations")
async def from_pictures(request: Request, _caller: CallerDep) -> Response:
    """What starts from pictures."""
    raise NotServed(f"images/{request.url.path.rpartition('/')[2]}", "images/generations; pictures from text only")


@router.get("/openai/v1/models")
@router.get("/v1/openai/models")
async def list_models(gateway: GatewayDep, _caller: CallerDep) -> dict[str, Any]:
    """Every model that a worker has ever offered."""
    return {"object": "list", "data": [_model(name) for name in sorted(await gateway.catalog.cards())]}


@router.get("/openai/v1/models/{name:path}")
@router.get("/v1/openai/models/{name:path}")
async def get_model(name: Annotated[str, Path()], gateway: GatewayDep, _caller: CallerDep) -> dict[str, Any]:
    """One model, by any name that it answers to."""
    await card_named(gateway.catalog, name)
    return _model(name)


def render(said: Refusal) -> Response:
    """OpenAI's error object. The client tries again only where nothing was accepted, so that no work is done twice."""
    status = STATUS.get(said.status, said.status)
    error = {
        "message": said.message,
        "type": TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error"),
        "param": said.field,
        "code": CODES.get(said.code, said.code),
    }
    again = (status in RETRYABLE or "retry-after" in said.headers) and said.code not in DONE
    return JSONResponse({"error": error}, status, {**said.headers, "x-should-retry": "true" if again else "false"})


async def _card(request: Request, model: str, gateway: Gateway) -> ModelCard:
    """The card of a model; of the default one for names such as OpenAI's own, but not at DeepInfra's path."""
    if model and request.url.path.startswith(DEEPINFRA):
        return await card_named(gateway.catalog, model)
    card = find_card(await gateway.catalog.cards(), model)
    return card or await default_card(gateway.catalog, gateway.queue, gateway.settings.default_model)


def _call(sent: dict[str, Any], asked: ImageGenerate, card: ModelCard) -> Call:
    steps = asked.steps or asked.num_inference_steps
    create: dict[str, Any] = {
        "model": card.name,
        "prompt": asked.prompt,
        "negative_prompt": asked.negative_prompt,
        "steps": _steps(asked.quality, card) if steps is None else steps,
        "guidance_scale": asked.cfg_scale if asked.guidance_scale is None else asked.guidance_scale,
        "seed": folded(asked.seed),
        "sampler": asked.sampler,
        "deterministic": asked.deterministic,
        "num_images": asked.n,
        "output_format": asked.output_format,
        "output_quality": max(1, asked.output_compression),
        **_size(asked, card),
    }
    return Call(dialect="openai", sent=sent, asked=asked, create=create, names=_names(asked))


def _names(asked: ImageGenerate) -> dict[str, str]:
    """Our field names to those that the client used."""
    names = {"num_images": "n", "output_quality": "output_compression"}
    if asked.size != "auto":
        names |= dict.fromkeys(SIZES, "size")
    if asked.steps is None:
        names["steps"] = "num_inference_steps"
    if asked.guidance_scale is None:
        names["guidance_scale"] = "cfg_scale"
    return names


def _size(asked: ImageGenerate, card: ModelCard) -> dict[str, Any]:
    given = {name: value for name in SIZES if (value := getattr(asked, name)) is not None}
    if asked.size == "auto":
        return given
    if given:
        raise InvalidField("size", Shown(asked.size), f"nothing beside {' or '.join(given)}")
    width, height = map(int, asked.size.split("x"))
    if asked.size in VENDORS_SIZES:
        try:
            width, height = fitted(width, height, card)
        except InvalidField as error:
            raise in_their_words(error, _names(asked), asked) from error
    return {"width": width, "height": height}


def _steps(quality: Quality, card: ModelCard) -> int | None:
    if quality not in STEPS:
        return None
    usual = card.defaults.steps
    return min(max(math.ceil(usual * STEPS[quality]), min(usual, FEW_STEPS)), card.limits.max_steps)


async def _answer(view: JobView, jobs: Jobs, asked: ImageGenerate) -> dict[str, Any]:
    wanted = asked.response_format or ("url" if asked.model in URL_MODELS else "b64_json")
    data = []
    for n, seed in enumerate(view.job.seeds):
        picture = jobs.links.image(view, n) if wanted == "url" else b64encode((await jobs.picture(view, n))[0]).decode()
        data.append({wanted: picture, "seed": seed, "filtered": finished_picture(view, n).filtered})
    said = {"created": int(view.ended_at or time.time()), "data": data} | _made(view, asked) | {"usage": UNMETERED}
    return said | ({"warnings": view.warnings} if view.warnings else {})


async def _events(
    view: JobView, jobs: Jobs, gateway: Gateway, asked: ImageGenerate, *, leave: bool
) -> AsyncGenerator[bytes, None]:
    """The stream of a job: partial images, then each picture, or an error.

    The job is canceled when the client goes away, unless it is one to `leave`.
    """
    job_id, index = view.job.id, 0
    try:
        async with aclosing(partial_pictures(view, gateway, asked.partial_images)) as partials:
            async for preview in partials:
                width, height = jpeg_size(preview)
                small = {"partial_image_index": index, "size": f"{width}x{height}", "output_format": "jpeg"}
                yield _event("partial_image", preview, _made(view, asked) | small)
                index += 1
        view = succeeded(await jobs.get(job_id))
        for n in range(view.job.num_images):
            data, picture = await jobs.picture(view, n)
            ours = {"seed": picture.seed, "filtered": picture.filtered}
            yield _event("completed", data, _made(view, asked) | ours | {"usage": UNMETERED})
    except DarkroomError as error:
        said = Refusal(status_of(error), error.code, str(error), error.field)
        yield format_sse_event(event="error", data_str=bytes(render(said).body).decode())
    finally:
        if view.status not in TERMINAL and not leave:
            with CancelScope(shield=True), suppress(DarkroomError):
                await gateway.queue.cancel(job_id)


def _event(name: str, picture: bytes, facts: dict[str, Any]) -> bytes:
    kind = f"image_generation.{name}"
    data = {"type": kind, "b64_json": b64encode(picture).decode(), "created_at": int(time.time())} | facts
    return format_sse_event(event=kind, data_str=json.dumps(data))


def _made(view: JobView, asked: ImageGenerate) -> dict[str, Any]:
    """What answers and events tell of the pictures."""
    return {
        "model": view.job.model,
        "size": f"{view.job.params.width}x{view.job.params.height}",
        "quality": SAID.get(asked.quality, asked.quality),
        "output_format": view.job.output.format,
        "background": "opaque",
    }


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "darkroom"}
