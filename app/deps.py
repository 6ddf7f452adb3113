"""What the routes ask for, as nouns."""

from __future__ import annotations

import asyncio
import re
import time
from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends, Header, Path, Query, Request
from fastapi.dependencies.utils import get_flat_params
from fastapi.exceptions import RequestValidationError
from fastapi.params import Query as QueryParameter
from structlog.typing import FilteringBoundLogger

from app.auth import ALL_SCOPES, Caller, Doorkeeper
from app.errors import BadSignature, LinkExpired, UnsupportedMediaType, shortened
from app.idempotency import HEADER as IDEMPOTENCY_KEY
from app.jobs import Jobs
from app.limits import Catalog
from app.links import Links
from app.metrics import Metrics
from app.schemas import MAX_WAIT_S
from app.settings import GatewaySettings
from app.signing import Signing
from app.webhook_target import Targets
from worker.contract.errors import UnknownGeneration
from worker.contract.job import JOB_ID
from worker.contract.queue import JobQueue
from worker.contract.store import PictureStore
from worker.contract.telemetry import Traces

WAIT_PREFERENCE = re.compile(r'wait\s*(?:=\s*(?:"(\d{1,9})"|(\d{1,9}))\s*)?(?:;.*)?', re.IGNORECASE | re.ASCII)


@dataclass(frozen=True)
class Gateway:
    """What one gateway process holds."""

    settings: GatewaySettings
    queue: JobQueue
    store: PictureStore
    catalog: Catalog
    metrics: Metrics
    log: FilteringBoundLogger
    door: Doorkeeper
    signing: Signing
    targets: Targets  # where webhooks may go
    traces: Traces | None = None  # None: not sent
    draining: asyncio.Event = field(default_factory=asyncio.Event)  # set: not ready, and nothing is held any more


async def _gateway(request: Request) -> Gateway:  # as all below asynchronous: others are run in threads, at a price
    gateway: Gateway = request.app.state.gateway
    return gateway


def _base_url(request: Request) -> str:
    public_url = request.app.state.gateway.settings.public_url
    return str(public_url or request.base_url).rstrip("/")


async def _job_id(job_id: Annotated[str, Path(alias="id", description="Id of a generation.")]) -> str:
    if not JOB_ID.fullmatch(job_id):
        raise UnknownGeneration(shortened(job_id))
    return job_id


async def _wait_s(
    request: Request,
    _prefer: Annotated[
        str | None,
        Header(
            alias="prefer",
            description=f"`wait=N` holds the answer until the job ends, {MAX_WAIT_S} seconds at most (RFC 7240).",
        ),
    ] = None,
) -> int | None:
    """Seconds that the client prefers to wait."""
    return preferred_wait_s(request)


def preferred_wait_s(request: Request, *, unsaid: int | None = None) -> int | None:
    """Seconds of the first `Prefer: wait=N`, MAX_WAIT_S at most; what is malformed does not count (RFC 7240).

    unsaid: of a `wait` that does not say how long
    """
    for preference in ",".join(request.headers.getlist("prefer")).split(","):
        if match := WAIT_PREFERENCE.fullmatch(preference.strip()):
            said = match[1] or match[2]
            if said or unsaid is not None:
                return min(int(said or unsaid or 0), MAX_WAIT_S)
    return None


async def _json_only(request: Request) -> None:
    declared = request.headers.get("content-type")
    kind = (declared or "").partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        raise UnsupportedMediaType(declared)


async def _known_query(request: Request) -> None:
    """Refuses what the route does not read of a query, as the body's unknown fields are."""
    if not request.query_params:
        return
    parameters = get_flat_params(request.scope["route"].dependant)
    known = [one.alias for one in parameters if isinstance(one.field_info, QueryParameter)]
    problem = {"type": "extra_forbidden", "ctx": {"allowed": known}}
    unknown = [(name, value) for name, value in request.query_params.items() if name not in known]
    if unknown:
        raise RequestValidationError([problem | {"loc": ("query", name), "input": value} for name, value in unknown])


GatewayDep = Annotated[Gateway, Depends(_gateway)]
SIGNED = Caller("", "signed url", ALL_SCOPES)
"""Whoever holds a url that we signed: the signature says what they may see."""


async def _caller(request: Request, gateway: GatewayDep) -> Caller:
    """Who asks, known by their key and counted against its rate. Unauthorized, RateLimited, QueueUnavailable."""
    request.state.caller = caller = await gateway.door.caller(request.headers)
    request.state.rate_limit = limit = await gateway.door.spend(caller)
    if limit:
        limit.require_room()
    return caller


KnownCaller = Depends(_caller)
CallerDep = Annotated[Caller, KnownCaller]


async def _links(request: Request, gateway: GatewayDep) -> Links:
    signer = await gateway.signing.signer() if gateway.settings.keys_on else None
    return Links(_base_url(request), signer)


LinksDep = Annotated[Links, Depends(_links)]


async def _jobs(caller: CallerDep, gateway: GatewayDep, links: LinksDep, request: Request) -> Jobs:
    return Jobs(gateway, caller, request, links)


async def _jobs_or_signed(
    request: Request,
    gateway: GatewayDep,
    links: LinksDep,
    expires: Annotated[int | None, Query(description="Of a signed url: Unix seconds.")] = None,
    signature: Annotated[str | None, Query(description="Of a signed url, which needs no API key.")] = None,
) -> Jobs:
    """As the holder of a url that we signed, who may see what it stands for, or as a caller. BadSignature."""
    if signature is None:
        return Jobs(gateway, await _caller(request, gateway), request, links)
    signer = await gateway.signing.signer()
    if expires is None or not signer.signed(request.scope["path"], expires, signature):
        raise BadSignature
    if expires <= time.time():
        raise LinkExpired(expires)
    return Jobs(gateway, SIGNED, request, links)


JobsDep = Annotated[Jobs, Depends(_jobs)]
JobsOrSigned = Annotated[Jobs, Depends(_jobs_or_signed)]
IdempotencyKey = Annotated[
    str | None,
    Header(
        alias=IDEMPOTENCY_KEY,
        description="1 to 255 visible ASCII characters: the same key and body again make no second job for 24 hours.",
    ),
]
JobId = Annotated[str, Depends(_job_id)]
WaitSeconds = Annotated[int | None, Depends(_wait_s)]
JsonOnly = Depends(_json_only)
KnownQuery = Depends(_known_query)
