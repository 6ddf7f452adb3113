"""What a worker answers over HTTP, from its first moment on: metrics for Prometheus, and probes.

One port for all processes of a supervisor, which loads no model and waits for none. `/healthz` asks whether to start
all anew, and so never means busy; `/readyz` asks whether all models are loaded.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import AF_INET, AF_INET6
from socketserver import TCPServer
from typing import Any

import structlog
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from worker.contract.errors import CannotStart
from worker.metrics import Counted
from worker.status import STUCK_S
from worker.supervisor import Slot, Supervisor

log = structlog.get_logger()

REQUEST_S = 10.0
"""A client that takes longer to say what it wants is not heard."""

JSON = "application/json"


class Probes:
    """Answers for one supervisor and its processes; from any thread."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor
        self._registry = CollectorRegistry()
        self._registry.register(Counted([slot.folder for slot in supervisor.slots if slot.folder]))
        self._registry.register(Processes(supervisor))

    def answer(self, path: str) -> tuple[int, str, bytes]:
        """HTTP status, content type and body."""
        match path:
            case "/metrics":
                return 200, CONTENT_TYPE_LATEST, generate_latest(self._registry)
            case "/healthz":
                stuck = self._stuck()
                return _told(503 if stuck else 200, {"status": "stuck" if stuck else "ok", "stuck": stuck})
            case "/readyz":
                awaited = self._stuck() + self._awaited()
                return _told(
                    503 if awaited else 200, {"status": "not_ready" if awaited else "ready"} | self._at(awaited)
                )
        return _told(404, {"status": "not_found", "allowed": ["/metrics", "/healthz", "/readyz"]})

    def _at(self, awaited: list[str]) -> dict[str, Any]:
        return {"awaited": awaited, "processes": len(self._supervisor.slots), "jobs": self._supervisor.jobs()}

    def _stuck(self) -> list[str]:
        """What has not moved for too long, though a process that stands still is killed and started again."""
        silent_s = time.monotonic() - self._supervisor.turns.last
        stuck = {"the supervisor": silent_s} if silent_s > STUCK_S else {}
        for name, slot in self._named():
            if (status := slot.status()) and (seconds := status.stuck_s()):
                stuck[name] = seconds
        return [f"{name} has not moved for {seconds:.0f} s" for name, seconds in stuck.items()]

    def _awaited(self) -> list[str]:
        if self._supervisor.is_leaving:
            return ["nothing: this worker is leaving"]
        said = ((name, slot, slot.status()) for name, slot in self._named())
        return [f"{name} {_doing(slot, status.state if status else None)}" for name, slot, status in said
                if not status or status.state != "ready"]  # fmt: skip

    def _named(self) -> list[tuple[str, Slot]]:
        return [(f"process {n}", slot) for n, slot in enumerate(self._supervisor.slots)]


def _doing(slot: Slot, state: str | None) -> str:
    if state is None:
        return "loads its models" if slot.child else "is about to be started"
    return {"connecting": "has its models, and waits for Redis", "draining": "is leaving"}[state]


def _told(status: int, body: dict[str, Any]) -> tuple[int, str, bytes]:
    return status, JSON, json.dumps(body).encode() + b"\n"


class Processes(Collector):
    """What a supervisor knows of its processes, for Prometheus."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor

    def collect(self) -> Iterable[Metric]:
        """How many there are and are ready, and how often they were started again."""
        slots = self._supervisor.slots
        said = [status for slot in slots if (status := slot.status())]
        ready = sum(status.state == "ready" for status in said)
        yield GaugeMetricFamily("darkroom_worker_processes", "Processes that there should be", value=len(slots))
        yield GaugeMetricFamily("darkroom_worker_ready", "Processes that have their models and serve", value=ready)
        restarts = CounterMetricFamily(
            "darkroom_worker_restarts",
            "Processes started again: killed by a signal, crashed with an error, or hung",
            labels=["reason"],
        )
        for reason, count in self._supervisor.restarts.items():
            restarts.add_metric([reason], count)
        yield restarts


class Handler(BaseHTTPRequestHandler):
    """GET and HEAD of what `probes` answers."""

    protocol_version = "HTTP/1.1"
    server_version, sys_version = "darkroom", ""
    timeout = REQUEST_S

    def __init__(self, probes: Probes, *args: Any) -> None:
        self._probes = probes
        super().__init__(*args)

    def do_GET(self) -> None:
        """One answer."""
        status, content_type, body = self._probes.answer(self.path.partition("?")[0])
        self.send_response(status)
        self.send_header("content-type", content_type)
        self.send_header("content-length", str(len(body)))
        self.send_header("cache-control", "no-store")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: probes come every few seconds."""


class Server(ThreadingHTTPServer):
    """A thread for each connection; none of them holds up the end."""

    daemon_threads = True

    def server_bind(self) -> None:
        """As its base, which also asks the DNS for a name that nobody needs, and may wait long for it."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002
        """Logs what is no client that went away."""
        if not isinstance(sys.exception(), OSError):
            log.exception("a probe was not answered")


@contextmanager
def serving(supervisor: Supervisor, host: str, port: int) -> Iterator[str]:
    """Answers on that address meanwhile; gives its url. CannotStart."""
    family = AF_INET6 if ":" in host else AF_INET
    kind = type("Server", (Server,), {"address_family": family})
    try:
        server = kind((host, port), partial(Handler, Probes(supervisor)))
    except OSError as error:
        where, why = f"{host} port {port}", error.strerror or error
        raise CannotStart(
            f"cannot serve /metrics on {where} ({why}): choose another DARKROOM_METRICS_PORT, or 0 for none"
        ) from None
    thread = threading.Thread(target=server.serve_forever, name="probes", daemon=True)
    thread.start()
    try:
        yield f"http://{'[' + host + ']' if family == AF_INET6 else host}:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
