"""The examples of the OpenAPI: requests, answers and refusals."""

from __future__ import annotations

from typing import Any

REQUESTS: list[Any] = [
    {"model": "sd3.5-large", "prompt": "a red circle on a blue background"},
    {
        "model": "sd3.5-medium",
        "prompt": "a lighthouse at dusk, oil on canvas",
        "negative_prompt": "people",
        "width": 1280,
        "height": 768,
        "steps": 40,
        "guidance_scale": 4.5,
        "seed": 7,
        "num_images": 2,
        "output_format": "webp",
    },
]

_ID = "gen_019ab2c3d4e5f60718293a4b5c6d7e8"
_AT = "2026-01-15T12:00:00Z"
_URLS = {
    "self": f"http://127.0.0.1:8000/v1/generations/{_ID}",
    "cancel": f"http://127.0.0.1:8000/v1/generations/{_ID}/cancel",
    "events": f"http://127.0.0.1:8000/v1/generations/{_ID}/events",
}
_PARAMS = {
    "prompt": "a red circle on a blue background",
    "negative_prompt": "",
    "width": 1024,
    "height": 1024,
    "steps": 28,
    "guidance_scale": 4.5,
    "seed": 7,
    "sampler": "euler",
    "num_images": 1,
    "output_format": "png",
    "output_quality": 90,
    "metadata": "full",
    "deterministic": False,
    "priority": "normal",
}
QUEUED: dict[str, Any] = {
    "id": _ID,
    "status": "queued",
    "model": "sd3.5-large",
    "revision": "a1b2c3d4",
    "created_at": _AT,
    "started_at": None,
    "ended_at": None,
    "deadline": "2026-01-22T12:00:00Z",
    "expires_at": None,
    "queue_position": 0,
    "progress": None,
    "cancel_requested": False,
    "params": _PARAMS,
    "seeds": [7],
    "images": [],
    "fingerprint": None,
    "warnings": [],
    "timings": {},
    "error": None,
    "webhook": None,
    "urls": _URLS,
}
SUCCEEDED: dict[str, Any] = QUEUED | {
    "status": "succeeded",
    "started_at": "2026-01-15T12:00:00.010000Z",
    "ended_at": "2026-01-15T12:00:04.510000Z",
    "expires_at": "2026-01-16T12:00:04.510000Z",
    "queue_position": None,
    "progress": {"step": 28, "steps": 28},
    "images": [
        {
            "url": f"http://127.0.0.1:8000/v1/generations/{_ID}/images/0",
            "seed": 7,
            "width": 1024,
            "height": 1024,
            "format": "png",
            "bytes": 1_402_113,
            "filtered": None,
        }
    ],
    "fingerprint": "fp_3c0f6a1d9e8b7254",
    "timings": {"queue": 0.01, "text_encode": 0.05, "noise": 0.001, "denoise": 4.2, "vae_decode": 0.1, "total": 4.51},
}

EVENTS = """event: queued
data: {"queue_position":0}
id: 1768478400000-0

event: progress
data: {"step":14,"steps":28}
id: 1768478402000-0

"""

MODEL: dict[str, Any] = {
    "name": "sd3.5-large",
    "description": "Stable Diffusion 3.5 Large",
    "variant": "large",
    "revision": "a1b2c3d4",
    "parameters": 8_056_627_520,
    "defaults": {"width": 1024, "height": 1024, "steps": 28, "guidance_scale": 4.5, "sampler": "euler"},
    "limits": {
        "min_pixels": 262_144,
        "max_pixels": 2_097_152,
        "min_side": 64,
        "max_side": 3072,
        "side_multiple": 16,
        "max_steps": 100,
        "max_guidance_scale": 20.0,
        "max_prompt_chars": 10_000,
        "max_num_images": 4,
    },
    "negative_prompt": True,
    "trained_pixels": 1_048_576,
    "aliases": [],
    "loaded": True,
    "workers": 1,
}

READY: dict[str, Any] = {
    "status": "ready",
    "draining": False,
    "redis": "ok",
    "store": "ok",
    "workers": {"sd3.5-large": 1},
}

REFUSALS: dict[int, tuple[str, str, str, str | None]] = {
    400: ("The body is not JSON.", "invalid_json", "the body is not valid JSON: Expecting value at character 10", None),
    401: (
        "No API key, or none that is known, where keys are on.",
        "unauthorized",
        "this server asks for an API key: send it as `Authorization: Bearer dr_...` or as `X-API-Key: dr_...`",
        None,
    ),
    403: (
        "The API key lacks a scope, or the signature of the url is not ours.",
        "forbidden",
        "this needs the scope generate; the API key has read",
        None,
    ),
    404: (
        "No such generation, picture or model.",
        "not_found",
        f"no generation '{_ID}': it was never accepted here, or its record has expired",
        None,
    ),
    408: ("The body came too slowly.", "body_too_slow", "the body did not arrive within 10 s", None),
    410: (
        "The pictures have expired.",
        "expired",
        f"the pictures of generation '{_ID}' expired at {_AT} and were deleted: this server keeps pictures no longer",
        None,
    ),
    413: ("The body is too large.", "body_too_large", "the body is larger than the 65536 bytes allowed", None),
    415: (
        "The body is not declared as JSON, or it is compressed.",
        "unsupported_media_type",
        'content-type is "text/plain"; allowed: application/json',
        None,
    ),
    422: (
        "A field is wrong.",
        "invalid_field",
        "width is 1000; allowed: a multiple of 16 from 64 to 3072, such as 1008",
        "width",
    ),
    429: (
        "Too many jobs wait, or too many requests were made; see `Retry-After`.",
        "queue_full",
        "1000 jobs already wait for 'sd3.5-large'; try again in 30 s",
        None,
    ),
    503: (
        "Redis or the picture store is away; see `Retry-After`.",
        "queue_unavailable",
        "the queue is not reachable right now; try again in a moment",
        None,
    ),
}
"""By status: description, code, message, field."""
