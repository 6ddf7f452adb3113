"""Traces to an OpenTelemetry collector, where one is named. Where none is, nothing of OpenTelemetry is imported."""

from __future__ import annotations

import logging
import os
import threading
import time
from importlib.metadata import version
from typing import TYPE_CHECKING

from structlog.typing import FilteringBoundLogger

from worker.contract.errors import CannotStart

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
TIMEOUTS = ("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "OTEL_EXPORTER_OTLP_TIMEOUT")
PROTOCOL = "http/protobuf"

SEND_EVERY_S = 1.0
SEND_TIMEOUT_S = 3.0
"""Of one batch, tries again included, unless the environment says otherwise."""

CLOSE_S = 2.0
COMPLAIN_EVERY_S = 60.0


class Traces:
    """Spans on their way to the collector, sent in batches by a thread of their own; those too many are dropped."""

    def __init__(self, provider: TracerProvider, complaints: Complaints) -> None:
        self._provider, self._complaints = provider, complaints
        self.tracer = provider.get_tracer("darkroom")
        self._closing: threading.Thread | None = None

    def close(self) -> None:
        """Sends what is left, for at most CLOSE_S: a dead collector holds nobody up."""
        if not self._closing:
            self._closing = threading.Thread(target=self._provider.shutdown, name="last-traces", daemon=True)
            self._closing.start()
        self._closing.join(CLOSE_S)
        self._complaints.close()


def connect(service: str, log: FilteringBoundLogger, *, instance: str = "") -> Traces | None:
    """The traces of this process, if the environment names a collector. CannotStart.

    service : what it is called unless OTEL_SERVICE_NAME says otherwise
    instance : which of several such processes it is
    """
    if not is_on():
        return None
    protocol = _first(*PROTOCOLS) or PROTOCOL
    if protocol != PROTOCOL:
        raise CannotStart(f"{' or '.join(PROTOCOLS)} is {protocol!r}; allowed: {PROTOCOL}, mostly on port 4318")
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        message = f"{' or '.join(ENDPOINTS)} is set, and OpenTelemetry is not installed: pip install 'darkroom[otel]'"
        raise CannotStart(message) from error
    complaints = Complaints(log)
    ours = {"service.name": service, "service.version": version("darkroom"), "service.instance.id": instance}
    provider = TracerProvider(
        resource=Resource({name: value for name, value in ours.items() if value}).merge(
            OTELResourceDetector().detect()
        ),
        shutdown_on_exit=False,  # which knows no bound
    )
    exporter = OTLPSpanExporter(timeout=None if _first(*TIMEOUTS) else SEND_TIMEOUT_S)
    delay_ms = None if _first("OTEL_BSP_SCHEDULE_DELAY") else 1000 * SEND_EVERY_S
    provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=delay_ms))
    return Traces(provider, complaints)


def is_on() -> bool:
    """Whether a collector is named, and OpenTelemetry is not switched off."""
    return bool(_first(*ENDPOINTS)) and _first("OTEL_SDK_DISABLED").lower() != "true"


class Complaints(logging.Handler):
    """What OpenTelemetry has to say, in our log, at most once a minute: a collector may be away for days."""

    def __init__(self, log: FilteringBoundLogger) -> None:
        super().__init__(logging.WARNING)
        self._log, self._last = log, float("-inf")
        self._logger = logging.getLogger("opentelemetry")
        self._logger.addHandler(self)
        self._logger.propagate = False

    def emit(self, record: logging.LogRecord) -> None:
        """One line of ours for one of its."""
        now = time.monotonic()
        if now - self._last >= COMPLAIN_EVERY_S:
            self._last = now
            self._log.warning("traces", said=record.getMessage())

    def close(self) -> None:
        """Listens no more."""
        self._logger.removeHandler(self)
        super().close()


def _first(*names: str) -> str:
    """The first of these variables that is set; OpenTelemetry's own, which its library reads itself."""
    return next((value for name in names if (value := os.environ.get(name, "").strip())), "")
