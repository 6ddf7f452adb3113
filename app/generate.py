"""`darkroom generate`: one request, followed to its end, saved."""

from __future__ import annotations

import math
import os
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from app.client import Client, Generation, Refused, Unreachable
from worker.contract.job import TERMINAL

SUFFIXES = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}

_POLL_S = 0.25
_PATIENCE_S = 30.0
"""How long a server that accepted the job may be away before we give up following it."""


class GenerateFailed(Exception):
    """No picture; says why in one line."""


class Canceled(Exception):
    """The user ended it."""


@dataclass(frozen=True)
class GenerateRequest:
    """What the command line asks for."""

    prompt: str
    model: str | None = None
    every_model: bool = False  # one picture, or set of pictures, of each loaded model
    format: str | None = None
    output: Path | None = None
    options: dict[str, Any] = field(default_factory=dict)  # fields of the HTTP request, as given


def generate_pictures(client: Client, request: GenerateRequest) -> list[Path]:
    """Posts the request, shows its progress, saves the pictures and says where; KeyboardInterrupt cancels the job.

    Of several models, one after the other; the first one's picture has the name that was asked for, the others' names
    have their model's added: demo.png, demo-turbo.png.
    """
    _require_output(request.output)  # before any work is done
    _format_of(request)
    _require_finite("--guidance", request.options.get("guidance_scale", 0.0))
    first, *others = _models(client, request)
    paths = _generate(client, request, first)
    for model in others:
        paths += _generate(client, replace(request, output=_beside(request.output, first, model)), model)
    return paths


def _models(client: Client, request: GenerateRequest) -> list[str]:
    """The models to ask, at least one."""
    if not request.every_model:
        return [request.model or _choose_model(client)]
    if request.model:
        raise GenerateFailed(f"--every-model and --model {request.model} contradict each other")
    loaded = sorted(str(model["name"]) for model in client.models() if model["loaded"])
    return loaded or [_choose_model(client)]


def _beside(output: Path | None, first: str, model: str) -> Path | None:
    """Where the picture of another model goes."""
    if output is None or output.is_dir():
        return output
    return output.with_stem(f"{output.stem}-{model.removeprefix(f'{first}-')}")


def _generate(client: Client, request: GenerateRequest, model: str) -> list[Path]:
    body = {"model": model, "prompt": request.prompt, **request.options}
    if format := _format_of(request):
        body["output_format"] = format
    try:
        job_id = client.submit(body)["id"]
    except UnicodeEncodeError:
        raise GenerateFailed("the prompt is not text in the terminal's encoding; UTF-8 is expected") from None
    try:
        generation = _follow(client, job_id)
    except KeyboardInterrupt:
        raise Canceled(_cancel(client, job_id)) from None
    if generation["status"] != "succeeded":
        raise GenerateFailed(_why(generation))
    paths = [_save(client, generation, n, request.output) for n in range(len(generation["images"]))]
    _tell(generation, paths)
    return paths


def _choose_model(client: Client) -> str:
    models = client.models()
    if not models:
        raise GenerateFailed(f"{client.url} has no model yet: no worker has started there")
    chosen = min(models, key=lambda model: (not model["loaded"], model["name"]))
    if not chosen["loaded"]:
        typer.echo(f"no worker holds {chosen['name']} now; the job waits for one", err=True)
    return str(chosen["name"])


def _follow(client: Client, job_id: str) -> Generation:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    lost_at: float | None = None
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("queued", total=None)
        while True:
            try:
                generation, lost_at = client.view(job_id), None
            except (Unreachable, Refused) as error:
                lost_at = lost_at or time.monotonic()
                if isinstance(error, Refused) and error.status < 500:
                    raise
                if time.monotonic() - lost_at > _PATIENCE_S:
                    raise GenerateFailed(f"{error}; the job goes on as {client.url}/v1/generations/{job_id}") from None
            else:
                if generation["status"] in TERMINAL:
                    return generation
                _show(progress, task, generation)
            time.sleep(_POLL_S)


def _show(progress: Progress, task: TaskID, generation: Generation) -> None:
    if generation["status"] == "queued":
        ahead = generation["queue_position"]
        progress.update(task, description=f"queued, {ahead} ahead" if ahead else "queued, next")
        return
    done = generation["progress"] or {}
    progress.update(task, description="running", completed=done.get("step", 0), total=done.get("steps"))


def _cancel(client: Client, job_id: str) -> str:
    try:
        status = client.cancel(job_id)["status"]
    except (Unreachable, Refused) as error:
        return f"{job_id} could not be canceled: {error}"
    return f"{job_id} ended first: it is {status}" if status in ("succeeded", "failed") else f"{job_id} canceled"


def _why(generation: Generation) -> str:
    if generation["status"] == "canceled":
        return f"generation {generation['id']} was canceled by someone else"
    error = generation["error"] or {"code": "unknown", "message": "the server gave no reason"}
    return f"generation {generation['id']} failed: {error['message']} ({error['code']})"


def _save(client: Client, generation: Generation, n: int, output: Path | None) -> Path:
    image = generation["images"][n]
    suffix = next(suffix for suffix, format in SUFFIXES.items() if format == image["format"])
    path = output or Path()
    if path.is_dir():
        path = path / f"{generation['id']}{suffix}"
    if len(generation["images"]) > 1:
        path = path.with_stem(f"{path.stem}-{n}")
    try:
        path.write_bytes(client.picture(generation["id"], n))
    except OSError as error:
        why = f"the picture could not be saved to {path}: {error.strerror}"
        raise GenerateFailed(f"{why}; it is kept at {image['url']}") from None
    return path


def _tell(generation: Generation, paths: list[Path]) -> None:
    for warning in generation["warnings"]:
        typer.echo(f"warning: {warning}", err=True)
    typer.echo(f"id       {generation['id']}")
    typer.echo(f"model    {generation['model']}")
    typer.echo(f"time     {generation['timings'].get('total', 0):.1f} s")
    for image, path in zip(generation["images"], paths, strict=True):
        typer.echo(f"picture  {path}  (seed {image['seed']}, {image['width']}x{image['height']})")
    sys.stdout.flush()


def _require_output(output: Path | None) -> None:
    """Refuses what no picture can be written to."""
    path = output or Path()
    try:
        path.stat()
    except FileNotFoundError:
        path = path.parent
        if not path.is_dir():
            raise GenerateFailed(f"--output is {str(output)!r}: there is no folder {str(path)!r}") from None
    except OSError as error:
        raise GenerateFailed(f"--output is {str(output)!r} ({error.strerror}): name another file or folder") from None
    if not os.access(path, os.W_OK):
        raise GenerateFailed(f"{path.absolute()} cannot be written to: name another file or folder with --output")


def _require_finite(option: str, number: float) -> None:
    if not math.isfinite(number):
        raise GenerateFailed(f"{option} is {number}; allowed: a finite number")


def _format_of(request: GenerateRequest) -> str | None:
    """As --format says, or as --output ends."""
    suffix = "" if request.output is None or request.output.is_dir() else request.output.suffix.lower()
    implied = SUFFIXES.get(suffix)
    if suffix and not implied:
        raise GenerateFailed(f"--output ends with {suffix!r}; allowed: {', '.join(SUFFIXES)}")
    if request.format and implied and request.format != implied:
        raise GenerateFailed(f"--format is {request.format!r}, but --output ends with {suffix!r}")
    return request.format or implied
