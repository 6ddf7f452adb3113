"""DeepInfra's inference API; its OpenAI path is app/dialects/openai.py's second base url."""

from __future__ import annotations

from base64 import b64encode
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Request, Response
from pydantic import Field
from starlette.responses import JSONResponse

from app.deps import GatewayDep, JobsDep
from app.dialects.body import NO_PICTURES, Asked, checked, folded, read_json
from app.dialects.call import Call, accept
from app.dialects.models import card_named
from app.dialects.retries import retry_of, told_once
from app.dialects.sizes import of_ratio
from app.dialects.synchronous import finish
from app.errors import Shown
from app.jobs import Jobs
from app.links import Links
from app.refusals import Refusal
from worker.contract.cards import ModelCard
from worker.contract.errors import InvalidField
from worker.contract.job import MEDIA_TYPES, JobView, Webhook

PREFIXES = ("/v1/inference",)

THEIR_NAMES = {"steps": "num_inference_steps"}
"""What our fields are called here."""

router = APIRouter(include_in_schema=False)


class TextToImage(Asked):
    """A request for pictures. Its numbers may be strings, as Vercel's client sends width and height."""

    prompt: str = Field(min_length=1, description="text of 1 to 10,000 characters")
    negative_prompt: str = Field("", description="text of at most 10,000 characters")
    num_images: int = Field(1, ge=1, le=4, description="a whole number from 1 to 4")
    num_inference_steps: int | None = Field(None, ge=1, description="a whole number, at least 1")
    aspect_ratio: Literal["1:1", "16:9", "21:9", "3:2", "2:3", "4:5", "5:4", "9:16", "9:21"] | None = Field(
        None, description="1:1, 16:9, 21:9, 3:2, 2:3, 4:5, 5:4, 9:16, 9:21"
    )
    width: int | None = Field(None, ge=1, description="pixels, a multiple of 16")
    height: int | None = Field(None, ge=1, description="pixels, a multiple of 16")
    guidance_scale: float | None = Field(None, ge=0, le=20, description="a number from 0 to 20")
    seed: int | None = Field(None, ge=0, lt=2**64, description="a whole number from 0 to 18446744073709551615")
    webhook: str | None = Field(None, max_length=2048, description="a url of at most 2,048 characters")
    image: None = Field(None, description=NO_PICTURES)
    strength: None = Field(None, description=NO_PICTURES)


@router.post("/v1/inference/{model:path}")
async def inference(
    model: Annotated[str, Path()], request: Request, jobs: JobsDep, gateway: GatewayDep
) -> dict[str, Any]:
    """The pictures as data urls; with a webhook, at once that the job is queued, and the same object there later."""
    body = await read_json(request)
    asked = checked(TextToImage, body)
    call = _call(body, asked, await card_named(gateway.catalog, model))
    if asked.webhook is not None:
        return await answer(await accept(call, jobs, request, webhook=Webhook(url=asked.webhook)), jobs)
    retry = await retry_of(request, jobs)
    with told_once(retry):
        return await answer(await finish(call, jobs, gateway, request, retry), jobs)


def render(said: Refusal) -> Response:
    """DeepInfra's error object, as FastAPI words it."""
    return JSONResponse({"detail": {"error": said.message}}, said.status, said.headers)


async def answer(view: JobView, jobs: Jobs) -> dict[str, Any]:
    """The result object of a job as it is now, with its pictures if it has succeeded."""
    pictures = [await jobs.picture(view, n) for n in range(view.job.num_images)] if view.status == "succeeded" else []
    return result(view, [_data_url(data, MEDIA_TYPES[picture.format]) for data, picture in pictures])


def webhook_body(view: JobView, links: Links) -> dict[str, Any]:
    """The result object as a webhook is told: with the urls of the pictures, not with megabytes of them."""
    made = view.job.num_images if view.status == "succeeded" else 0
    return result(view, [links.image(view, n) for n in range(made)])


def result(view: JobView, images: list[str]) -> dict[str, Any]:
    """The result object of a job, its images as urls. Detected: blurred; False also where no filter is on."""
    seconds = 0.0 if view.started_at is None or view.ended_at is None else view.ended_at - view.started_at
    failure = view.result.failure if view.result else None
    pictures = view.result.pictures if view.result else ()
    status = {
        "status": "failed" if view.status == "canceled" else view.status,
        "runtime_ms": round(seconds * 1000),
        "cost": 0.0,
        "tokens_generated": 0,
        "tokens_input": 0,
    }
    said: dict[str, Any] = {"error": failure.message} if failure else {}
    if view.warnings:
        said["warnings"] = view.warnings
    return {
        "images": images,
        "nsfw_content_detected": [bool(picture.filtered) for picture in pictures[: len(images)]],
        "seed": view.job.params.seed,
        "request_id": view.job.id,
        "inference_status": status,
    } | said


def _call(sent: dict[str, Any], asked: TextToImage, card: ModelCard) -> Call:
    create: dict[str, Any] = {
        "model": card.name,
        "prompt": asked.prompt,
        "negative_prompt": asked.negative_prompt,
        "num_images": asked.num_images,
        "steps": asked.num_inference_steps,
        "guidance_scale": asked.guidance_scale,
        "seed": folded(asked.seed),
        **_size(asked, card),
    }
    return Call(dialect="deepinfra", sent=sent, asked=asked, create=create, names=THEIR_NAMES)


def _size(asked: TextToImage, card: ModelCard) -> dict[str, Any]:
    if asked.aspect_ratio is None:
        return {"width": asked.width, "height": asked.height}
    if asked.width is not None or asked.height is not None:
        raise InvalidField("aspect_ratio", Shown(asked.aspect_ratio), "nothing beside width or height")
    return of_ratio(asked.aspect_ratio, card)


def _data_url(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{b64encode(data).decode()}"
