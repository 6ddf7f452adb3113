"""The log: one structured line an event. Never a prompt, never a picture."""

from __future__ import annotations

import sys
from typing import Any, TextIO

import structlog
from structlog.typing import FilteringBoundLogger, Processor

from app.settings import LogFormat

_TIMESTAMP = structlog.processors.TimeStamper(fmt="iso", utc=True)


def make_log(log_format: LogFormat, stream: TextIO | None = None) -> FilteringBoundLogger:
    """A logger that writes lines of JSON, or for people, to `stream` (standard error)."""
    log: FilteringBoundLogger = structlog.wrap_logger(
        structlog.WriteLogger(stream or sys.stderr),
        processors=[structlog.processors.add_log_level, _TIMESTAMP, *_rendered(log_format)],
        wrapper_class=structlog.make_filtering_bound_logger("info"),
    )
    return log


def uvicorn_log_config(log_format: LogFormat) -> dict[str, Any]:
    """The logging configuration under which uvicorn's own lines look like ours."""
    formatter = {
        "()": structlog.stdlib.ProcessorFormatter,
        "foreign_pre_chain": [structlog.stdlib.add_log_level, _TIMESTAMP],
        "processors": [structlog.stdlib.ProcessorFormatter.remove_processors_meta, *_rendered(log_format)],
    }
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"line": formatter},
        "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "line", "stream": "ext://sys.stderr"}},
        "loggers": {"uvicorn": {"handlers": ["stderr"], "level": "INFO", "propagate": False}},
    }


def _rendered(log_format: LogFormat) -> list[Processor]:
    if log_format == "json":
        return [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    # Plain: the pretty kind shows the variables of a traceback, prompts among them
    return [structlog.dev.ConsoleRenderer(colors=False, exception_formatter=structlog.dev.plain_traceback)]
