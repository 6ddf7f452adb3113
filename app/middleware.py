"""What every request passes: its id, log line and metrics; the answer to what nobody caught; the bounds of its body."""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from structlog.typing import FilteringBoundLogger

from app.errors import BodyTooLarge, BodyTooSlow, EncodedBody, TooManyLargeBodies
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
LARGE_BODIES = 16
"""Bodies over the usual limit, as forms may have, that are in memory at once: who has no key may send them too."""


class RequestContext:
    """Gives each request an id, logs and counts it."""

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


class LastResort:
    """Answers 500 to what nobody caught, and logs it."""

    def __init__(self, app: ASGIApp, log: FilteringBoundLogger) -> None:
        self._app, self._log = app, log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        answering = False

        async def noting_send(message: Message) -> None:
            nonlocal answering
            answering = True
            await send(message)

        try:
            await self._app(scope, receive, noting_send)
        except Exception:
            self._log.exception("request_failed", request_id=scope["state"]["request_id"], route=_route(scope))
            if not answering:
                await internal_error(scope)(scope, receive, send)


class BodyLimit:
    """Reads the body before the app does: so many bytes, in so many seconds; forms may be larger, a few at once."""

    def __init__(self, app: ASGIApp, max_bytes: int, max_multipart_bytes: int, timeout_s: float) -> None:
        self._app, self._timeout_s = app, timeout_s
        self._max_bytes, self._max_multipart_bytes = max_bytes, max_multipart_bytes
        self._large = 0  # bodies over max_bytes that are in memory

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        headers = Headers(scope=scope) if scope["type"] == "http" else Headers()
        if "content-length" not in headers and "transfer-encoding" not in headers:
            return await self._app(scope, receive, send)
        body = bytearray()
        try:
            try:
                whole = await self._receive(body, headers, receive)
            except DarkroomError as error:
                return await _refuse(error, scope, receive, send)
            if whole:  # else the client went away
                await self._app(scope, _replaying(body, receive), send)
        finally:
            self._large -= len(body) > self._max_bytes

    async def _receive(self, body: bytearray, headers: Headers, receive: Receive) -> bool:
        """Reads into `body`, unless it is refused for its size, time or encoding; False if the client went away."""
        form = headers.get("content-type", "").lower().startswith("multipart/")
        most = self._max_multipart_bytes if form else self._max_bytes
        if _announced_too_large(headers, most):
            raise BodyTooLarge(most)
        try:
            async with asyncio.timeout(self._timeout_s):
                whole = await self._read(receive, body, most)
        except TimeoutError:
            raise BodyTooLarge(most) if len(body) > most else BodyTooSlow(self._timeout_s) from None
        if whole and len(body) > most:
            raise BodyTooLarge(most)
        encoding = headers.get("content-encoding", "").strip()
        if encoding.lower() not in ("", "identity"):
            raise EncodedBody(encoding)
        return whole

    async def _read(self, receive: Receive, body: bytearray, most: int) -> bool:
        """Reads into `body` until it ends; False if the client went away.

        Reads some way past what is kept: a client that is still sending when the connection closes never sees the
        answer.
        """
        seen, more, fits = 0, True, True
        while more and seen <= most + DISCARD_BYTES:
            message = await receive()
            if message["type"] == "http.disconnect":
                return False
            chunk = message.get("body", b"")
            seen += len(chunk)
            fits = fits and self._has_room(len(body), len(chunk))
            if fits and len(body) <= most:
                body += chunk
            more = message.get("more_body", False)
        if not fits:
            raise TooManyLargeBodies(LARGE_BODIES)
        return True

    def _has_room(self, size: int, more: int) -> bool:
        """Whether a body may grow by so many bytes; if that makes it a large one, it is counted."""
        if not size <= self._max_bytes < size + more:
            return True
        if self._large == LARGE_BODIES:
            return False
        self._large += 1
        return True


def _replaying(body: bytearray, receive: Receive) -> Receive:
    """Receives a body that was read before, and then what else comes."""
    unread = True

    async def replay() -> Message:
        nonlocal unread
        if not unread:
            return await receive()
        unread = False
        return {"type": "http.request", "body": bytes(body), "more_body": False}

    return replay


def _announced_too_large(headers: Headers, most: int) -> bool:
    """Whether the client asks first if it may send a body that it may not."""
    declared = headers.get("content-length", "0")
    return "expect" in headers and (len(declared) > 18 or int(declared) > most)


async def _refuse(error: DarkroomError, scope: Scope, receive: Receive, send: Send) -> None:
    response = refusal(error, scope)
    response.headers["connection"] = "close"  # what follows on this connection is the rest of the body
    await response(scope, receive, send)


def _route(scope: Scope) -> str:
    """The template of the route that served; bounded, unlike paths."""
    if "endpoint" not in scope:  # refused before the router saw it, or no route of ours
        return CREATE_ROUTE if scope["path"] == CREATE_ROUTE else "unmatched"
    return str(getattr(scope.get("route"), "path", scope["path"]))  # a plain route has no parameters
