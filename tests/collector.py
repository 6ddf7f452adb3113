"""A collector of OpenTelemetry traces, over OTLP/HTTP as it is."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from tests.processes import wait_until


@dataclass(frozen=True)
class Received:
    """One span, and the service that sent it."""

    service: str
    span: Span

    @property
    def name(self) -> str:
        return self.span.name

    @property
    def id(self) -> str:
        return self.span.span_id.hex()

    @property
    def trace(self) -> str:
        return self.span.trace_id.hex()

    @property
    def parent(self) -> str:
        return self.span.parent_span_id.hex()

    @property
    def attributes(self) -> dict[str, Any]:
        return attributes_of(self.span)


def attributes_of(message: Any) -> dict[str, Any]:
    return {
        pair.key: getattr(pair.value, kind) for pair in message.attributes if (kind := pair.value.WhichOneof("value"))
    }


@dataclass
class Collector:
    """Listens on a loopback port while it is a context; answers once `answering` is set."""

    spans: list[Received] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    answering: threading.Event = field(default_factory=threading.Event)
    asked: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Self:
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                collector.asked.set()
                collector.answering.wait(60)
                collector.take(self.path, body)
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.answering.set()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), name="collector")
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.answering.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def take(self, path: str, body: bytes) -> None:
        assert path == "/v1/traces"
        request = ExportTraceServiceRequest.FromString(body)
        for group in request.resource_spans:
            service = attributes_of(group.resource)["service.name"]
            self.spans += [Received(service, span) for scope in group.scope_spans for span in scope.spans]
        self.bodies.append(body)

    def named(self, name: str) -> Received:
        """The one span of that name, once it is there."""
        wait_until(lambda: any(span.name == name for span in self.spans), 30)
        [found] = [span for span in self.spans if span.name == name]
        return found
