"""The playground: a page to try the models on, at `/`, and its files."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Header, Response
from starlette.exceptions import HTTPException

from app.deps import Gateway, GatewayDep
from app.etags import holds

FOLDER = Path(__file__).parents[1] / "playground"
MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}

# Nothing from elsewhere but pictures of a store that gives them itself, nothing inline, no string that becomes markup
# or code.
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src {pictures}",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
HEADERS = {
    "cross-origin-opener-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cache-control": "no-cache",  # kept, but asked for by its tag each time: a new Darkroom is a new page at once
}

router = APIRouter(include_in_schema=False)


@router.api_route("/", methods=["GET", "HEAD"])
async def page(gateway: GatewayDep, if_none_match: Annotated[str, Header()] = "") -> Response:
    """The page itself."""
    return await _file("index.html", if_none_match, gateway)


@router.api_route("/playground/{name}", methods=["GET", "HEAD"])
async def part(name: str, gateway: GatewayDep, if_none_match: Annotated[str, Header()] = "") -> Response:
    """A script, style or drawing of the page."""
    return await _file(name, if_none_match, gateway)


async def _file(name: str, if_none_match: str, gateway: Gateway) -> Response:
    data = await asyncio.to_thread(_read, name)
    if data is None:
        raise HTTPException(404)
    tag = f'"{hashlib.blake2b(data, digest_size=12).hexdigest()}"'
    pictures = " ".join(("'self'", "data:", *([gateway.store.origin] if gateway.store.origin else [])))
    headers = {**HEADERS, "content-security-policy": POLICY.format(pictures=pictures), "etag": tag}
    if holds(if_none_match, tag):
        return Response(status_code=304, headers=headers)
    return Response(data, headers=headers, media_type=MEDIA_TYPES[Path(name).suffix])


def _read(name: str) -> bytes | None:
    """The bytes of one of the playground's own files; None for any other name."""
    if Path(name).suffix not in MEDIA_TYPES or name not in {file.name for file in FOLDER.iterdir()}:
        return None
    return (FOLDER / name).read_bytes()
