"""The log: one structured line an event. Never a prompt, never a picture."""

from __future__ import annotations

import sys
from typing import Any, TextIO

import structlog
from structlog.typing import FilteringBoundLogger, Processor

from app.settings import LogFormat


def make_log(log_format: LogFormat, stream: TextIO | None = None) -> FilteringBoundLogger:
    """A logger that writes lines of JSON, or for people, to `stream` (standard error)."""
    log: FilteringBoundLogger = structlog.wrap_logger(
        structlog.WriteLogger(stream or sys.stderr),
        processors=[structlog.processors.add_log_level, *_common(), _renderer(log_format)],
        wrapper_class=structlog.make_filtering_bound_logger("info"),
    )
    return log


def uvicorn_log_config(log_format: LogFormat) -> dict[str, Any]:
    """The logging configuration under which uvicorn's own lines look like ours."""
    formatter = {
        "()": structlog.stdlib.ProcessorFormatter,
        "foreign_pre_chain": [structlog.stdlib.add_log_level, *_common()],
        "processors": [structlog.stdlib.ProcessorFormatter.remove_processors_meta, _renderer(log_format)],
    }
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"line": formatter},
        "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "line", "stream": "ext://sys.stderr"}},
        "loggers": {"uvicorn": {"handlers": ["stderr"], "level": "INFO", "propagate": False}},
    }


def _common() -> list[Processor]:
    return [structlog.processors.TimeStamper(fmt="iso", utc=True), structlog.processors.format_exc_info]


def _renderer(log_format: LogFormat) -> Processor:
    if log_format == "json":
        return structlog.processors.JSONRenderer()
    return structlog.dev.ConsoleRenderer(colors=False)
