"""Stability's REST API v2beta: stable-image/generate and results.

One picture a call, asked for by a form, answered as bytes or, to who accepts JSON, in JSON.
"""

from __future__ import annotations

import hashlib
import re
from base64 import b64encode
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Request, Response
from pydantic import Field, field_validator
from starlette.responses import JSONResponse

from app.deps import CallerDep, GatewayDep, JobsDep
from app.dialects.body import NO_PICTURES, Asked, Form, checked, read_form
from app.dialects.call import Call, accept, warnings_header
from app.dialects.models import OUR_NAMES, card_named
from app.dialects.sizes import of_ratio
from app.dialects.synchronous import finish, succeeded
from app.errors import NotServed, Shown, Words
from app.jobs import Jobs
from app.refusals import Refusal
from worker.contract.cards import ModelCard
from worker.contract.errors import InvalidField, UnknownModel
from worker.contract.job import MEDIA_TYPES, TERMINAL, JobView

PREFIXES = ("/v2beta",)

DEFAULT_MODEL = "sd3.5-large"
THEIR_NAMES = {"guidance_scale": "cfg_scale"}
"""What our fields are called here."""

AspectRatio = Literal["21:9", "16:9", "3:2", "5:4", "1:1", "4:5", "2:3", "9:16", "9:21"]

CFG_SCALE = {"large": 4.0, "medium": 4.0, "large-turbo": 1.0}
"""Stability's own defaults, by what follows `sd3.5-`; other models have theirs."""

STYLES = {
    "3d-model": "3D model, rendered",
    "analog-film": "analog film photograph, film grain",
    "anime": "anime style",
    "cinematic": "cinematic film still, dramatic lighting",
    "comic-book": "comic book illustration",
    "digital-art": "digital art",
    "enhance": "highly detailed, high quality",
    "fantasy-art": "fantasy art",
    "isometric": "isometric view",
    "line-art": "line art drawing",
    "low-poly": "low poly 3D art",
    "modeling-compound": "modeling clay sculpture",
    "neon-punk": "neon punk style, vivid neon lights",
    "origami": "origami, folded paper",
    "photographic": "photograph, realistic",
    "pixel-art": "pixel art",
    "tile-texture": "seamless tile texture",
}
"""The words that a style_preset adds to the prompt."""

STATUS = {415: 400, 422: 400}
"""What is said here with another status than elsewhere."""

NAMES = {
    400: "bad_request",
    401: "unauthorized",
    403: "forbidden",
    404: "not_found",
    413: "payload_too_large",
    429: "rate_limit_exceeded",
    500: "internal_error",
}

OUR_REQUEST_ID = re.compile(r"(req_)?[0-9a-f]{16,32}", re.ASCII)

router = APIRouter(include_in_schema=False)


class StableImage(Asked):
    """The form of a picture. Parts that it does not name are passed over."""

    prompt: str = Field(min_length=1, max_length=10_000, description="text of 1 to 10,000 characters")
    negative_prompt: str = Field("", max_length=10_000, description="text of at most 10,000 characters")
    mode: Literal["text-to-image"] = Field(
        "text-to-image", description='"text-to-image"; pictures from pictures are not served yet'
    )
    aspect_ratio: AspectRatio = Field("1:1", description="21:9, 16:9, 3:2, 5:4, 1:1, 4:5, 2:3, 9:16, 9:21")
    model: str | None = Field(None, max_length=128, description="text of at most 128 characters")
    seed: int = Field(0, ge=0, le=4_294_967_294, description="a whole number from 0 to 4294967294; 0: random")
    output_format: Literal["png", "jpeg", "webp"] = Field("png", description="png, jpeg, webp")
    style_preset: str | None = Field(None, description=", ".join(STYLES))
    cfg_scale: float | None = Field(None, ge=1, le=10, description="a number from 1 to 10")

    @field_validator("style_preset")
    @classmethod
    def _known_style(cls, style: str | None) -> str | None:
        if style is not None and style not in STYLES:
            raise ValueError("unknown")
        return style


@router.post("/v2beta/stable-image/generate/{service}")
async def generate(service: Annotated[str, Path()], request: Request, jobs: JobsDep, gateway: GatewayDep) -> Response:
    """One picture. `sd3` takes the name of a model; `core` and `ultra` are answered by Stable Diffusion 3.5 Large."""
    if service not in ("sd3", "core", "ultra"):
        raise NotServed(f"stable-image/generate/{service}", "sd3, core, ultra")
    form = await read_form(request)
    if "image" in form.files or "image" in form.text or "strength" in form.text:
        raise InvalidField("image", Words("given"), NO_PICTURES)
    asked = checked(StableImage, form.text)
    named = asked.model if service == "sd3" and asked.model else DEFAULT_MODEL
    try:
        card = await card_named(gateway.catalog, named)
    except UnknownModel as error:
        raise InvalidField("model", Shown(named), str(error).partition("; ")[2]) from error
    call = _call(form, asked, card, named)
    if "respond-async" in request.headers.get("prefer", "").lower():
        view = await accept(call, jobs, request)
        return JSONResponse({"id": view.job.id}, headers={"preference-applied": "respond-async"})
    return await _answer(await finish(call, jobs, gateway, request), jobs, request)


@router.get("/v2beta/results/{id}")
async def result(job_id: Annotated[str, Path(alias="id")], request: Request, jobs: JobsDep) -> Response:
    """The picture of one of the caller's generations, or that it is still being made."""
    view = await jobs.get(job_id)
    if view.status not in TERMINAL:
        return JSONResponse({"id": job_id, "status": "in-progress"}, 202)
    return await _answer(succeeded(view), jobs, request)


@router.api_route("/v2beta/{service:path}", methods=["GET", "POST"])
async def other(service: Annotated[str, Path()], _caller: CallerDep) -> Response:
    """What Stability serves and we do not: upscaling, edits, control, 3D, video."""
    raise NotServed(service, "stable-image/generate/sd3, results/{id}")


def render(said: Refusal) -> Response:
    """Stability's error object."""
    status = STATUS.get(said.status, said.status)
    if said.code == "unknown_model":
        status = 400
    name = NAMES.get(status) or said.code
    message = f"{said.field}: {said.message.removeprefix(said.field).strip()}" if said.field else said.message
    error_id = name if status == 429 else _error_id(said.request_id)  # that name is its id there, too
    return JSONResponse({"id": error_id, "name": name, "errors": [message]}, status, said.headers)


def _error_id(request_id: str) -> str:
    """32 hexadecimal digits, as theirs are.

    Of an id that we gave the request they are its own digits behind zeros, so that our log knows them.
    """
    if OUR_REQUEST_ID.fullmatch(request_id):
        return request_id.removeprefix("req_").zfill(32)
    return hashlib.sha256(request_id.encode()).hexdigest()[:32]


def _usual_cfg_scale(named: str, card: ModelCard) -> float | None:
    """Stability's, of a model that is what Stability calls so; None: the model's own."""
    theirs = OUR_NAMES.get(named, named).removeprefix("sd3.5-")
    return CFG_SCALE.get(theirs) if card.variant == theirs else None


def _call(form: Form, asked: StableImage, card: ModelCard, named: str) -> Call:
    prompt = asked.prompt if asked.style_preset is None else f"{asked.prompt}, {STYLES[asked.style_preset]}"
    create: dict[str, Any] = {
        "model": card.name,
        "prompt": prompt,
        "negative_prompt": asked.negative_prompt,
        **of_ratio(asked.aspect_ratio, card),
        "seed": asked.seed or None,
        "output_format": asked.output_format,
        "guidance_scale": _usual_cfg_scale(named, card) if asked.cfg_scale is None else asked.cfg_scale,
    }
    return Call(
        dialect="stability", sent=[form.text, sorted(form.files)], asked=asked, create=create, names=THEIR_NAMES
    )


async def _answer(view: JobView, jobs: Jobs, request: Request) -> Response:
    """The picture: JSON where the client accepts it under any of its names, else bytes."""
    data, picture = await jobs.picture(view, 0)
    kind = MEDIA_TYPES[picture.format]
    reason = "CONTENT_FILTERED" if picture.filtered else "SUCCESS"
    if "application/json" in request.headers.get("accept", "").lower():
        body = {"image": b64encode(data).decode(), "seed": picture.seed, "finish_reason": reason}
        return JSONResponse(body, headers={"content-type": f"application/json; type={kind}"} | warnings_header(view))
    facts = {"finish-reason": reason, "seed": str(picture.seed)} | warnings_header(view)
    return Response(data, headers={"content-type": kind} | facts)
