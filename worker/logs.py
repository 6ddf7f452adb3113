"""The worker's log: a line of JSON an event, on standard error."""

from __future__ import annotations

import sys

import structlog

from worker.contract.job import Job


def configure() -> None:
    """For the whole process."""
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
    )


def about(job: Job) -> dict[str, str]:
    """What each line about a job says of it: the gateway's lines have the same two ids."""
    return {"request_id": job.request_id, "job": job.id}
