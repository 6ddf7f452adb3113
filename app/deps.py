"""What the routes ask for, as nouns."""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends, Header, Path, Request
from structlog.typing import FilteringBoundLogger

from app.errors import UnsupportedMediaType, shortened
from app.limits import Catalog
from app.metrics import Metrics
from app.schemas import MAX_WAIT_S
from app.settings import GatewaySettings
from worker.contract.errors import UnknownGeneration
from worker.contract.queue import JobQueue
from worker.contract.store import PictureStore

JOB_ID = re.compile(r"gen_[0-9a-f]{31}")
WAIT_PREFERENCE = re.compile(r'wait\s*=\s*(?:"(\d{1,9})"|(\d{1,9}))\s*(?:;.*)?', re.IGNORECASE | re.ASCII)


@dataclass(frozen=True)
class Gateway:
    """What one gateway process holds."""

    settings: GatewaySettings
    queue: JobQueue
    store: PictureStore
    catalog: Catalog
    metrics: Metrics
    log: FilteringBoundLogger
    draining: asyncio.Event = field(default_factory=asyncio.Event)  # set: not ready, and nothing is held any more


def _gateway(request: Request) -> Gateway:
    gateway: Gateway = request.app.state.gateway
    return gateway


def _base_url(request: Request) -> str:
    public_url = request.app.state.gateway.settings.public_url
    return str(public_url or request.base_url).rstrip("/")


def _job_id(job_id: Annotated[str, Path(alias="id", description="Id of a generation.")]) -> str:
    if not JOB_ID.fullmatch(job_id):
        raise UnknownGeneration(shortened(job_id))
    return job_id


def _wait_s(
    prefer: Annotated[
        list[str] | None,
        Header(description=f"`wait=N` holds the answer until the job ends, {MAX_WAIT_S} seconds at most (RFC 7240)."),
    ] = None,
) -> int | None:
    """Seconds that the client prefers to wait; the first `wait` counts, what is malformed does not (RFC 7240)."""
    for preference in ",".join(prefer or []).split(","):
        if match := WAIT_PREFERENCE.fullmatch(preference.strip()):
            return min(int(match[1] or match[2]), MAX_WAIT_S)
    return None


def _json_only(request: Request) -> None:
    declared = request.headers.get("content-type")
    kind = (declared or "").partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        raise UnsupportedMediaType(declared)


GatewayDep = Annotated[Gateway, Depends(_gateway)]
BaseUrl = Annotated[str, Depends(_base_url)]
JobId = Annotated[str, Depends(_job_id)]
WaitSeconds = Annotated[int | None, Depends(_wait_s)]
JsonOnly = Depends(_json_only)
