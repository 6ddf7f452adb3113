"""What every request passes: its id, log line and metrics, the answer to what nobody caught, the bounds of its body."""

from __future__ import annotations

import asyncio
import re
import secrets
import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from structlog.typing import FilteringBoundLogger

from app.errors import BodyTooLarge, BodyTooSlow, internal_error, refusal
from app.metrics import Metrics
from worker.contract.errors import DarkroomError

REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
CREATE_ROUTE = "/v1/generations"
QUIET_ROUTES = frozenset({"/healthz", "/readyz", "/metrics"})
CLIENT_GONE = 499
DISCARD_BYTES = 1_048_576


class RequestContext:
    """Gives each request an id, logs and counts it, and answers 500 to what nobody caught."""

    def __init__(self, app: ASGIApp, metrics: Metrics, log: FilteringBoundLogger) -> None:
        self._app, self._metrics, self._log = app, metrics, log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        asked = Headers(scope=scope).get("x-request-id", "")
        request_id = asked if REQUEST_ID.fullmatch(asked) else f"req_{secrets.token_hex(8)}"
        scope.setdefault("state", {})["request_id"] = request_id
        started, status = time.perf_counter(), CLIENT_GONE

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception:
            self._log.exception("request_failed", request_id=request_id, route=_route(scope))
            if status == CLIENT_GONE:
                await internal_error(scope)(scope, receive, send_with_id)
        finally:
            self._record(scope, status, time.perf_counter() - started)

    def _record(self, scope: Scope, status: int, seconds: float) -> None:
        state, route = scope["state"], _route(scope)
        method = scope["method"] if scope["method"] in METHODS else "other"
        self._metrics.observe(route=route, method=method, status=status, seconds=seconds)
        error = state.get("error_code", "")
        if route == CREATE_ROUTE and method == "POST" and status != CLIENT_GONE:
            outcome = "accepted" if status < 300 else "rejected"
            self._metrics.generations.labels(state.get("model", "unknown"), outcome, error).inc()
        facts = {name: state[name] for name in ("generation", "model", "error_code", "cause") if name in state}
        quiet = route in QUIET_ROUTES and status < 500
        write = self._log.debug if quiet else self._log.info if status < 500 else self._log.warning
        write(
            "request",
            request_id=state["request_id"],
            method=method,
            route=route,
            status=status,
            seconds=round(seconds, 4),
            **facts,
        )


class BodyLimit:
    """Reads the body before the app does, at most so many bytes and so many seconds."""

    def __init__(self, app: ASGIApp, max_bytes: int, timeout_s: float) -> None:
        self._app, self._max_bytes, self._timeout_s = app, max_bytes, timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        headers = Headers(scope=scope) if scope["type"] == "http" else Headers()
        if "content-length" not in headers and "transfer-encoding" not in headers:
            return await self._app(scope, receive, send)
        too_large, body = BodyTooLarge(self._max_bytes), bytearray()
        if self._announced_too_large(headers):
            return await _refuse(too_large, scope, receive, send)
        try:
            async with asyncio.timeout(self._timeout_s):
                whole = await self._read(receive, body)
        except TimeoutError:
            error = too_large if len(body) > self._max_bytes else BodyTooSlow(self._timeout_s)
            return await _refuse(error, scope, receive, send)
        if not whole:
            return None  # the client went away
        if len(body) > self._max_bytes:
            return await _refuse(too_large, scope, receive, send)
        unread = True

        async def replay() -> Message:
            nonlocal unread
            if not unread:
                return await receive()
            unread = False
            return {"type": "http.request", "body": bytes(body), "more_body": False}

        return await self._app(scope, replay, send)

    def _announced_too_large(self, headers: Headers) -> bool:
        """Whether the client asks first if it may send a body that it may not."""
        declared = headers.get("content-length", "0")
        return "expect" in headers and (len(declared) > 18 or int(declared) > self._max_bytes)

    async def _read(self, receive: Receive, body: bytearray) -> bool:
        """Reads into `body` until it ends; False if the client went away.

        Reads some way past the limit: a client that is still sending when the connection closes never sees the answer.
        """
        seen, more = 0, True
        while more and seen <= self._max_bytes + DISCARD_BYTES:
            message = await receive()
            if message["type"] == "http.disconnect":
                return False
            chunk = message.get("body", b"")
            seen += len(chunk)
            if len(body) <= self._max_bytes:
                body += chunk
            more = message.get("more_body", False)
        return True


async def _refuse(error: DarkroomError, scope: Scope, receive: Receive, send: Send) -> None:
    response = refusal(error, scope)
    response.headers["connection"] = "close"  # what follows on this connection is the rest of the body
    await response(scope, receive, send)


def _route(scope: Scope) -> str:
    """The template of the route that served; bounded, unlike paths."""
    if "endpoint" not in scope:  # refused before the router saw it, or no route of ours
        return CREATE_ROUTE if scope["path"] == CREATE_ROUTE else "unmatched"
    return str(getattr(scope.get("route"), "path", scope["path"]))  # a plain route has no parameters
