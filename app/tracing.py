"""A span for each request of the API. Imported only where traces are sent: see worker.contract.telemetry."""

from __future__ import annotations

from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer
from opentelemetry.trace.propagation import set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.middleware import CLIENT_GONE, METHODS, QUIET_ROUTES

UNTRACED = QUIET_ROUTES | {"", "/", "/playground/{name}", "/openapi.json"}
"""Templates of routes that are not of the API; of "" are paths that nobody serves."""

FACTS = ("request_id", "generation", "model", "dialect")
"""What a route notes of its request that a span repeats; no key, no prompt."""

W3C = TraceContextTextMapPropagator()


class Tracing:
    """Spans the requests of API routes, each a child of what its `traceparent` names, and the parent of its job.

    The route is known only once it has served: a span that turns out to be none of the API's is never ended, and what
    is not ended is not sent.
    """

    def __init__(self, app: ASGIApp, tracer: Tracer) -> None:
        self._app, self._tracer = app, tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request; inside RequestContext, which gives it its id."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        span = self._tracer.start_span("request", W3C.extract(dict(Headers(scope=scope))), kind=SpanKind.SERVER)
        carrier: dict[str, str] = {}
        W3C.inject(carrier, set_span_in_context(span))
        scope.setdefault("state", {})["trace"] = carrier.get("traceparent", "")
        status = CLIENT_GONE

        async def send_and_look(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, send_and_look)
        except Exception as error:
            if status == CLIENT_GONE:
                status = 500  # as LastResort will answer
            span.set_attribute("error.type", type(error).__name__)
            raise
        finally:
            _end(span, scope, status)


def _end(span: Span, scope: Scope, status: int) -> None:
    route = str(getattr(scope.get("route"), "path", ""))
    if route in UNTRACED:
        return
    method, state = scope["method"], scope["state"]
    method = method if method in METHODS else "_OTHER"
    span.update_name(f"{method} {route}")
    attributes = {"http.request.method": method, "http.route": route, "http.response.status_code": status}
    span.set_attributes(attributes | {f"darkroom.{fact}": str(state[fact]) for fact in FACTS if fact in state})
    if "error_code" in state:
        span.set_attribute("error.type", state["error_code"])
    if status >= 500:
        span.set_status(Status(StatusCode.ERROR))
    span.end()
