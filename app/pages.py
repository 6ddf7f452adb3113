"""Which web pages may call: with API keys off, a browser on this machine is all that stands between them and us."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from app.errors import ForeignPage
from app.refusals import refusal
from app.settings import GatewaySettings, is_loopback

READING = frozenset({"GET", "HEAD", "OPTIONS"})
"""Methods that change nothing; what they answer is hidden from foreign pages by the browser."""


class PageGuard:
    """Refuses what a browser sends for a page of somebody else's. For a gateway whose callers need no API key.

    Plain forms reach any address without asking first (cross-site request forgery), and a name that its owner lets
    stand for 127.0.0.1 makes his page one of ours (DNS rebinding). Programs send no Origin, and so pass.
    """

    def __init__(self, app: ASGIApp, settings: GatewaySettings) -> None:
        self._app = app
        self._origins = settings.origins
        self._public = settings.public_url.host if settings.public_url else None
        self._checks_host = is_loopback(settings.host)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        if scope["type"] == "http" and (error := self._objection(scope["method"], Headers(scope=scope))):
            return await refusal(error, scope)(scope, receive, send)
        return await self._app(scope, receive, send)

    def _objection(self, method: str, headers: Headers) -> ForeignPage | None:
        host, origin = headers.get("host", ""), headers.get("origin")
        if self._checks_host and not self._is_ours(host):
            return ForeignPage("host", host)
        if method in READING or origin is None or origin in self._origins or "*" in self._origins:
            return None
        _, _, place = origin.partition("://")
        return None if place and (place == host or _name(place) == self._public) else ForeignPage("origin", origin)

    def _is_ours(self, host: str) -> bool:
        """Whether nobody else can have made this name stand for us: no name at all, localhost, or our public one."""
        name = _name(host)
        return name in ("", "localhost", self._public) or name.endswith(".localhost") or _is_address(name)


def _name(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return host


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
