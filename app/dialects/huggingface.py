"""Hugging Face's raw inference: one prompt posted to a model's url, answered with the bytes of one picture."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Request, Response
from pydantic import Field
from starlette.responses import JSONResponse

from app.deps import GatewayDep, JobsDep
from app.dialects.body import NO_PICTURES, Asked, checked, folded, read_json
from app.dialects.call import Call, warnings_header
from app.dialects.models import card_named
from app.dialects.synchronous import finish
from app.errors import Shown, Words, shortened
from app.refusals import Refusal
from model.params import Sampler
from worker.contract.cards import ModelCard
from worker.contract.errors import InvalidField
from worker.contract.job import MEDIA_TYPES, OutputFormat

PREFIXES = ("/huggingface",)

THEIR_NAMES = {"prompt": "inputs", "steps": "num_inference_steps", "sampler": "scheduler"}
"""What our fields are called here."""

SCHEDULERS: dict[str, Sampler] = {
    "euler": "euler",
    "EulerDiscreteScheduler": "euler",
    "FlowMatchEulerDiscreteScheduler": "euler",
    "dpmpp_2m": "dpmpp_2m",
    "DPMSolverMultistepScheduler": "dpmpp_2m",
}
"""Our samplers by the names that diffusers has for them, and by our own."""

PICTURES = (b"\x89PNG", b"\xff\xd8\xff", b"RIFF", b"GIF8")
PICTURES_IN_BASE64 = ("iVBORw0KGgo", "/9j/", "UklGR", "R0lGOD")
"""How PNG, JPEG, WebP and GIF begin: clients send one as the body, and beside parameters in place of the prompt."""

router = APIRouter(include_in_schema=False)


class TextToImage(Asked):
    """A prompt and its parameters, in one. Clients send only what their user said, so all others are refused."""

    inputs: str = Field(min_length=1, description="text of 1 to 10,000 characters")
    negative_prompt: str = Field("", description="text of at most 10,000 characters")
    width: int | None = Field(None, ge=1, description="pixels, a multiple of 16")
    height: int | None = Field(None, ge=1, description="pixels, a multiple of 16")
    num_inference_steps: int | None = Field(None, ge=1, description="a whole number, at least 1")
    guidance_scale: float | None = Field(None, ge=0, description="a number, at least 0")
    scheduler: (
        Literal[
            "euler",
            "EulerDiscreteScheduler",
            "FlowMatchEulerDiscreteScheduler",
            "dpmpp_2m",
            "DPMSolverMultistepScheduler",
        ]
        | None
    ) = Field(None, description=", ".join(SCHEDULERS))
    seed: int | None = Field(None, ge=0, lt=2**64, description="a whole number from 0 to 18446744073709551615")
    num_images_per_prompt: Literal[1] = Field(1, description="1: the answer is one picture")
    output_format: OutputFormat | None = Field(None, description="png, jpeg, webp")


@router.post("/huggingface/{model:path}")
async def text_to_image(
    model: Annotated[str, Path()], request: Request, jobs: JobsDep, gateway: GatewayDep
) -> Response:
    """The picture, in the first format of `Accept` that we write, else PNG."""
    if (await request.body()).startswith(PICTURES):
        raise InvalidField("inputs", Words("a picture"), NO_PICTURES)
    body = await read_json(request)
    if str(body.get("inputs")).startswith(PICTURES_IN_BASE64):
        raise InvalidField("inputs", Words("a picture"), NO_PICTURES)
    parameters = body.get("parameters") or {}
    if not isinstance(parameters, dict):
        raise InvalidField("parameters", Shown(parameters), "a JSON object")
    for name, value in parameters.items():
        if name not in TextToImage.model_fields and value is not None:
            raise InvalidField(shortened(name), Shown(value), f"none; parameters served: {', '.join(PARAMETERS)}")
    asked = checked(TextToImage, parameters | {"inputs": body.get("inputs")})
    call = _call(body, asked, await card_named(gateway.catalog, model), _accepted(request.headers.get("accept", "")))
    view = await finish(call, jobs, gateway, request)
    data, picture = await jobs.picture(view, 0)
    facts = {"x-seed": str(picture.seed), "x-filtered": json.dumps(picture.filtered)} | warnings_header(view)
    return Response(data, headers={"content-type": MEDIA_TYPES[picture.format]} | facts)


def render(said: Refusal) -> Response:
    """What huggingface_hub looks for: the text under `error`."""
    return JSONResponse({"error": said.message, "error_type": said.code}, said.status, said.headers)


def _call(sent: dict[str, Any], asked: TextToImage, card: ModelCard, accepted: OutputFormat) -> Call:
    create: dict[str, Any] = {
        "model": card.name,
        "prompt": asked.inputs,
        "negative_prompt": asked.negative_prompt,
        "width": asked.width,
        "height": asked.height,
        "steps": asked.num_inference_steps,
        "guidance_scale": asked.guidance_scale,
        "sampler": None if asked.scheduler is None else SCHEDULERS[asked.scheduler],
        "seed": folded(asked.seed),
        "output_format": asked.output_format or accepted,
    }
    return Call(dialect="huggingface", sent=[sent, accepted], asked=asked, create=create, names=THEIR_NAMES)


def _accepted(accept: str) -> OutputFormat:
    kinds = [part.partition(";")[0].strip().lower() for part in accept.split(",")]
    return next((name for kind in kinds for name, ours in MEDIA_TYPES.items() if kind == ours), "png")


PARAMETERS = [name for name in TextToImage.model_fields if name != "inputs"]
