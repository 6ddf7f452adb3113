"""What every request passes: its id, log line and metrics, the answer to what nobody caught, the bounds of its body."""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from structlog.typing import FilteringBoundLogger

from app.errors import BodyTooLarge, BodyTooSlow
from app.metrics import Metrics
from app.refusals import internal_error, refusal
from worker.contract.errors import DarkroomError

REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
CREATE_ROUTE = "/v1/generations"
CREATE = (CREATE_ROUTE, "POST")
QUIET_ROUTES = frozenset({"/healthz", "/readyz", "/metrics"})
FACTS = ("generation", "model", "dialect", "error_code", "cause")
"""What a route notes of its request that the log repeats."""

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
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                if limit := scope["state"].get("rate_limit"):
                    headers.update(limit.headers())
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
        self._count_generation(state, route, method, status)
        facts = {name: state[name] for name in FACTS if name in state}
        if (caller := state.get("caller")) and caller.id:
            facts["key"] = caller.id
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

    def _count_generation(self, state: dict[str, Any], route: str, method: str, status: int) -> None:
        """Counts what asked for pictures; vendors' bodies too broken to tell are only among the requests."""
        model, dialect, reason = state.get("model", "unknown"), state.get("dialect", "native"), ""
        if "generation" in state:
            outcome = "replayed" if state["replayed"] else "accepted"
        elif status >= 400 and status != CLIENT_GONE and (state.get("asked") or (route, method) == CREATE):
            outcome, reason = "rejected", state.get("error_code", "")
        else:
            return
        self._metrics.generations.labels(model, dialect, outcome, reason).inc()


class BodyLimit:
    """Reads the body before the app does, at most so many bytes and so many seconds; forms may be larger."""

    def __init__(self, app: ASGIApp, max_bytes: int, max_multipart_bytes: int, timeout_s: float) -> None:
        self._app, self._timeout_s = app, timeout_s
        self._max_bytes, self._max_multipart_bytes = max_bytes, max_multipart_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        headers = Headers(scope=scope) if scope["type"] == "http" else Headers()
        if "content-length" not in headers and "transfer-encoding" not in headers:
            return await self._app(scope, receive, send)
        form = headers.get("content-type", "").lower().startswith("multipart/")
        most = self._max_multipart_bytes if form else self._max_bytes
        too_large, body = BodyTooLarge(most), bytearray()
        if _announced_too_large(headers, most):
            return await _refuse(too_large, scope, receive, send)
        try:
            async with asyncio.timeout(self._timeout_s):
                whole = await _read(receive, body, most)
        except TimeoutError:
            error = too_large if len(body) > most else BodyTooSlow(self._timeout_s)
            return await _refuse(error, scope, receive, send)
        if not whole:
            return None  # the client went away
        if len(body) > most:
            return await _refuse(too_large, scope, receive, send)
        unread = True

        async def replay() -> Message:
            nonlocal unread
            if not unread:
                return await receive()
            unread = False
            return {"type": "http.request", "body": bytes(body), "more_body": False}

        return await self._app(scope, replay, send)


def _announced_too_large(headers: Headers, most: int) -> bool:
    """Whether the client asks first if it may send a body that it may not."""
    declared = headers.get("content-length", "0")
    return "expect" in headers and (len(declared) > 18 or int(declared) > most)


async def _read(receive: Receive, body: bytearray, most: int) -> bool:
    """Reads into `body` until it ends; False if the client went away.

    Reads some way past the limit: a client that is still sending when the connection closes never sees the answer.
    """
    seen, more = 0, True
    while more and seen <= most + DISCARD_BYTES:
        message = await receive()
        if message["type"] == "http.disconnect":
            return False
        chunk = message.get("body", b"")
        seen += len(chunk)
        if len(body) <= most:
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
