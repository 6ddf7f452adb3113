"""A generation in Replicate's words: what a prediction's input asks for, and a prediction as its owner sees it."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from app.dialects.body import Asked, folded
from app.dialects.sizes import of_ratio
from app.links import Links
from app.schemas import timestamp
from worker.contract.cards import ModelCard
from worker.contract.job import DEADLINE_EXCEEDED, Job, JobView, WebhookEvent

LOG_LINES = 50
"""Lines of progress that the logs of a prediction hold at most."""

BAR = 10
UNKNOWN_TIME = "1970-01-01T00:00:00Z"
COG_VERSION = "0.9.0"
"""From 0.3.9 on, clients believe the schema about what the output is."""

STATUS = {"queued": "starting", "running": "processing"}
EVENTS: dict[str, WebhookEvent] = {
    "start": "started",
    "output": "completed",  # pictures come all at once, at the end
    "logs": "progress",
    "completed": "completed",
}
"""Replicate's filters of webhook events, and what they are here."""

AspectRatio = Literal["1:1", "16:9", "21:9", "3:2", "2:3", "4:5", "5:4", "3:4", "4:3", "9:16", "9:21"]


@dataclass(frozen=True)
class Published:
    """A Stable Diffusion 3.5 model as Replicate offers it."""

    variant: str  # of the card whose defaults these are
    array: bool = False  # the output is a list of urls, not one
    cfg: float | None = None
    steps: int | None = None


LARGE = Published("large", cfg=5)
PUBLISHED = {
    "stable-diffusion-3.5-large": LARGE,
    "stable-diffusion-3.5-large-turbo": Published("large-turbo", cfg=1),
    "stable-diffusion-3.5-medium": Published("medium", array=True, cfg=5, steps=40),
}
VERSIONS = {
    "feb36d70": ("stable-diffusion-3.5-large", LARGE),
    "e6c4657f": ("stable-diffusion-3.5-large", Published("large", array=True, cfg=3.5, steps=35)),
    "c86a3e64": ("stable-diffusion-3.5-large-turbo", PUBLISHED["stable-diffusion-3.5-large-turbo"]),
    "382c0389": ("stable-diffusion-3.5-medium", PUBLISHED["stable-diffusion-3.5-medium"]),
}
"""Replicate's own versions, by the beginnings of their ids."""


def published_as(name: str, card: ModelCard) -> Published:
    """What a model is taken for that is asked for by this name; by any other, what its card says it is."""
    kin = (published for published in PUBLISHED.values() if published.variant == card.variant)
    return PUBLISHED.get(name) or next(kin, Published(card.variant))


class Input(Asked):
    """The input of a prediction. What it does not name is passed over, and the logs say so."""

    prompt: str = Field(min_length=1, description="text of 1 to 10,000 characters")
    negative_prompt: str = Field("", description="text of at most 10,000 characters")
    aspect_ratio: AspectRatio | None = Field(
        None, description="1:1, 16:9, 21:9, 3:2, 2:3, 4:5, 5:4, 3:4, 4:3, 9:16, 9:21"
    )
    cfg: float | None = Field(None, ge=0, description="a number from 0 to 20")
    steps: int | None = Field(None, ge=1, description="a whole number from 1 to 100")
    seed: int | None = Field(None, description="a whole number; left out: random")
    num_outputs: int = Field(1, ge=1, description="a whole number from 1 to 4")
    output_format: Literal["webp", "jpg", "jpeg", "png"] = Field("webp", description="webp, jpg, png")
    output_quality: int = Field(90, ge=0, le=100, description="a whole number from 0 to 100; not for png")
    prompt_strength: float | None = Field(None, description="a number; has a meaning beside an image only")
    # What other models there are asked with, and libraries that serve many vendors send
    guidance_scale: float | None = Field(None, ge=0, description="a number from 0 to 20; the same as cfg")
    num_inference_steps: int | None = Field(None, ge=1, description="a whole number; the same as steps")
    width: int | None = Field(None, ge=1, description="a multiple of 16")
    height: int | None = Field(None, ge=1, description="a multiple of 16")
    size: str | None = Field(
        None, pattern=r"^[1-9][0-9]{1,3}x[1-9][0-9]{1,3}$", description="width and height, as in 1024x1024"
    )


def fields_of(asked: Input, card: ModelCard, published: Published) -> dict[str, Any]:
    """The fields of GenerationCreate that an input stands for; None: not said."""
    defaults = published if published.variant == card.variant else Published(card.variant)
    width, height = map(int, asked.size.split("x")) if asked.size else (asked.width, asked.height)
    return {
        "model": card.name,
        "prompt": asked.prompt,
        "negative_prompt": asked.negative_prompt,
        **({"width": width, "height": height} if width or height else of_ratio(asked.aspect_ratio or "1:1", card)),
        "steps": first_of(asked.steps, asked.num_inference_steps, defaults.steps),
        "guidance_scale": first_of(asked.cfg, asked.guidance_scale, defaults.cfg),
        "seed": folded(asked.seed),
        "num_images": asked.num_outputs,
        "output_format": "jpeg" if asked.output_format == "jpg" else asked.output_format,
        "output_quality": max(1, asked.output_quality),
    }


def ignored(asked: Input, sent: dict[str, Any]) -> list[str]:
    """What was sent in vain: what no model here has, and a shape beside a size."""
    unknown = {name[:40] for name, value in sent.items() if value} - set(Input.model_fields)
    beside = asked.aspect_ratio and (asked.size or asked.width or asked.height)
    return sorted(unknown)[:20] + (["aspect_ratio beside a size"] if beside else [])


def names_of(asked: Input) -> dict[str, str]:
    """Our field names to those that the client used."""
    return {
        "num_images": "num_outputs",
        "guidance_scale": "cfg" if asked.guidance_scale is None else "guidance_scale",
        "steps": "steps" if asked.num_inference_steps is None else "num_inference_steps",
        **({"width": "size", "height": "size"} if asked.size else {}),
    }


def first_of(*values: Any) -> Any:
    """The first that is not None."""
    return next((value for value in values if value is not None), None)


def version_id(model: str, revision: str, *, array: bool = False) -> str:
    """What stands for the version of a model: 64 hexadecimal digits, others when the weights are.

    array: of one whose output is a list; clients send the id alone, and it must say that too
    """
    return hashlib.sha256(f"{model}\0{revision}{'[]' * array}".encode()).hexdigest()


def prediction(view: JobView, links: Links) -> dict[str, Any]:
    """Replicate's prediction object of any of our jobs."""
    job, echo = view.job, view.job.echo
    path = f"/v1/predictions/{job.id}"
    url = links.base_url + path
    status, failure = status_of(view), view.result.failure if view.result else None
    said = {
        "id": job.id,
        "model": echo.get("model", f"darkroom/{job.model}"),
        "version": echo.get("version", version_id(job.model, job.revision)),
        "status": status,
        "input": echo.get("input", {"prompt": job.params.prompt, "seed": job.params.seed}),
        "output": _output(view, links),
        "logs": logs(view),
        "error": failure.message if failure and status == "failed" else None,
        "source": "api",
        "data_removed": _removed(view),
        "metrics": _metrics(view),
        "created_at": _time(job.created_at),
        "started_at": _time(view.started_at),
        "completed_at": _time(view.ended_at),
        "urls": {"get": url, "cancel": f"{url}/cancel", "stream": links.signed(f"{path}/stream", int(job.deadline))},
    }
    if job.webhook:
        said["webhook"] = job.webhook.url
    for name in ("webhook_events_filter", "deployment"):
        if name in echo:
            said[name] = echo[name]
    if "cancel_after_s" in echo:
        said["deadline"] = _time(job.deadline)
    return said


def status_of(view: JobView) -> str:
    """Replicate's status: starting, processing, succeeded, failed, canceled.

    A prediction that ran into its own `Cancel-After` is canceled, also where Replicate says `aborted`: its Python
    client cannot read that word.
    """
    failure = view.result.failure if view.result else None
    if failure and failure.code == DEADLINE_EXCEEDED and "cancel_after_s" in view.job.echo:
        return "canceled"
    return STATUS.get(view.status, view.status)


def logs(view: JobView) -> str:
    """What there is to say so far: only ever longer, for clients show what was added."""
    step = view.progress.step if view.progress else 0
    text = progress_log(view.job, step)
    text += "".join(f"Warning: {warning}\n" for warning in view.warnings[len(view.job.warnings) :])
    failure = view.result.failure if view.result else None
    return f"{text}Canceled: {failure.message}\n" if failure and status_of(view) == "canceled" else text


def progress_log(job: Job, step: int) -> str:
    """The logs once so many steps are done: what was noticed at first, then progress as tqdm writes it."""
    ignored = job.echo.get("ignored", [])
    lines = [f"Using seed: {job.params.seed}"]
    lines += [f"Warning: this model has no input {name}; it was ignored" for name in ignored]
    lines += [f"Warning: {warning}" for warning in job.warnings]
    stride = -(-job.steps // LOG_LINES)
    done = [n for n in range(1, min(step, job.steps) + 1) if n % stride == 0 or n == job.steps]
    return "".join(f"{line}\n" for line in lines + [_bar(n, job.steps) for n in done])


def last_words(said: dict[str, Any], shown: int) -> list[tuple[str, str]]:
    """Names and data of the events that end the stream of a prediction, of whose logs so many characters were shown."""
    urls = said["output"] or []
    words = [("logs", said["logs"][shown:])] if said["logs"][shown:] else []
    words += [("output", url) for url in ([urls] if isinstance(urls, str) else urls)]
    match said["status"]:
        case "failed":
            return [*words, ("error", str(said["error"])), ("done", '{"reason": "error"}')]
        case "canceled":
            return [*words, ("done", '{"reason": "canceled"}')]
        case _:
            return [*words, ("done", "{}")]


def model(card: ModelCard, owner: str, name: str, latest: dict[str, Any], links: Links) -> dict[str, Any]:
    """Replicate's model object; `latest` is its version's."""
    return {
        "url": f"{links.base_url}/v1/models/{owner}/{name}",
        "owner": owner,
        "name": name,
        "description": card.description,
        "visibility": "public",
        "github_url": None,
        "paper_url": None,
        "license_url": None,
        "run_count": 0,  # clients want a number; we do not count by model
        "cover_image_url": None,
        "default_example": None,
        "latest_version": latest,
    }


def version(id: str, card: ModelCard, published: Published) -> dict[str, Any]:
    """Replicate's version object, with what goes in and what comes out as OpenAPI."""
    properties = Input.model_json_schema()["properties"]
    for order, schema in enumerate(properties.values()):
        schema["x-order"] = order
    uri = {"type": "string", "format": "uri"}
    return {
        "id": id,
        "created_at": UNKNOWN_TIME,
        "cog_version": COG_VERSION,
        "openapi_schema": {
            "openapi": "3.0.2",
            "info": {"title": card.name, "version": card.revision},
            "paths": {},
            "components": {
                "schemas": {
                    "Input": {"type": "object", "title": "Input", "required": ["prompt"], "properties": properties},
                    "Output": {"title": "Output", **({"type": "array", "items": uri} if published.array else uri)},
                }
            },
        },
    }


def _output(view: JobView, links: Links) -> str | list[str] | None:
    if view.status != "succeeded" or view.result is None or _removed(view):
        return None
    urls = [links.image(view, n) for n in range(len(view.result.pictures))]
    return urls if view.job.echo.get("array", False) or len(urls) > 1 else urls[0]


def _removed(view: JobView) -> bool:
    return view.result is not None and view.result.has_expired(time.time())


def _metrics(view: JobView) -> dict[str, float]:
    if view.ended_at is None:
        return {}
    metrics = {"total_time": view.ended_at - view.job.created_at}
    if view.started_at is not None:
        metrics["predict_time"] = view.ended_at - view.started_at
    return {name: round(max(0.0, seconds), 6) for name, seconds in metrics.items()}


def _bar(step: int, steps: int) -> str:
    """Such as ` 50%|#####     | 14/28`, which clients read a prediction's progress from."""
    filled = BAR * step // steps
    return f"{100 * step // steps:3d}%|{'#' * filled}{' ' * (BAR - filled)}| {step}/{steps}"


def _time(unix_s: float | None) -> str | None:
    return None if unix_s is None else timestamp(unix_s)
