"""Pixels to the bytes of a PNG, JPEG or WebP, with what made them in the file's own text."""

from __future__ import annotations

import io
import json
from dataclasses import asdict

from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from worker.contract.job import Job

EXIF_IFD, USER_COMMENT = 0x8769, 0x9286
MAX_COMMENT_BYTES = 65_000
"""A JPEG's EXIF is at most 64 KiB in all."""


def encode(pixels: Tensor, job: Job, n: int, *, filtered: bool | None = None) -> bytes:
    """Picture `n` of a job as a file.

    pixels : shape = (h, w, 3), uint8, on the CPU
    filtered : see Picture.filtered
    """
    image = Image.fromarray(pixels.numpy(), mode=None)
    file = io.BytesIO()
    options: dict[str, object] = {}
    if job.output.format == "png":
        options["compress_level"] = 4
        if job.output.metadata == "full":
            options["pnginfo"] = _png_text(job, n, filtered)
    else:
        options["quality"] = job.output.quality
        if job.output.metadata == "full":
            options["exif"] = _exif(job, n, filtered)
    image.save(file, format=job.output.format, **options)
    return file.getvalue()


def parameters(job: Job, n: int, filtered: bool | None = None) -> str:
    """What made picture `n`, in the form that image browsers for diffusion pictures read."""
    p = job.params.nth(n)
    lines = [p.prompt]
    if p.negative_prompt:
        lines.append(f"Negative prompt: {p.negative_prompt}")
    lines.append(
        f"Steps: {p.steps}, Sampler: {p.sampler}, CFG scale: {p.guidance_scale:g}, Seed: {p.seed}, "
        f"Size: {p.width}x{p.height}, Model: {job.model}, Model hash: {job.revision}"
        + (", Safety filter: blurred" if filtered else "")
    )
    return "\n".join(lines)


def _png_text(job: Job, n: int, filtered: bool | None) -> PngInfo:
    text = PngInfo()
    text.add_itxt("parameters", parameters(job, n, filtered))
    made_by = {"model": job.model, "revision": job.revision, **asdict(job.params.nth(n))}
    if filtered is not None:
        made_by["filtered"] = filtered
    text.add_itxt("darkroom", json.dumps(made_by, ensure_ascii=False))
    return text


def _exif(job: Job, n: int, filtered: bool | None) -> Image.Exif:
    exif = Image.Exif()
    exif[EXIF_IFD] = {USER_COMMENT: b"UNICODE\0" + _comment(parameters(job, n, filtered))}
    return exif


def _comment(text: str) -> bytes:
    """The text in UTF-16, cut inside the prompts if that is too long."""
    data = text.encode("utf-16-be", errors="replace")
    return data if len(data) <= MAX_COMMENT_BYTES else _comment(f"{text[:15_000]} ... {text[-1_000:]}")
