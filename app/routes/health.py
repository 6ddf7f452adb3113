"""Health: for probes and Prometheus."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST

from app.deps import Gateway, GatewayDep
from app.refusals import note_cause
from app.schemas import Alive, Readiness
from worker.contract.errors import QueueUnavailable, StoreUnavailable

PROBE_TIMEOUT_S = 2.0

router = APIRouter(tags=["health"])


@router.head("/healthz", include_in_schema=False)
@router.get("/healthz", summary="Is the process alive?")
async def alive() -> Alive:
    """Answers as long as the process does; looks at nothing else, so that a broken Redis restarts no gateway."""
    return Alive(status="ok")


@router.head("/readyz", include_in_schema=False)
@router.get(
    "/readyz",
    summary="Can it do its work?",
    responses={503: {"model": Readiness, "description": "Redis or the store is away, or it is shutting down."}},
)
async def ready(gateway: GatewayDep, request: Request, response: Response) -> Readiness:
    """Ready while Redis and the store answer and the gateway is not shutting down; workers are told, not asked for."""
    (redis, workers), store = await asyncio.gather(_redis(gateway, request), _store(gateway, request))
    draining = gateway.draining.is_set()
    is_ready = redis == store == "ok" and not draining
    if not is_ready:
        response.status_code = 503
    response.headers["cache-control"] = "no-store"
    return Readiness(
        status="ready" if is_ready else "not_ready", draining=draining, redis=redis, store=store, workers=workers
    )


@router.get(
    "/metrics",
    summary="Prometheus metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
async def metrics(gateway: GatewayDep) -> Response:
    """The gateway's counters, and the queue as it is now. Answers in time even when Redis does not."""
    return Response(await gateway.metrics.render(gateway.queue), headers={"content-type": CONTENT_TYPE_LATEST})


async def _redis(gateway: Gateway, request: Request) -> tuple[str, dict[str, int]]:
    try:
        async with asyncio.timeout(PROBE_TIMEOUT_S):
            await gateway.queue.ping()
            return "ok", await gateway.queue.workers()
    except QueueUnavailable as error:
        note_cause(error, request.scope)
    except TimeoutError:
        request.state.cause = f"no answer within {PROBE_TIMEOUT_S:g} s"
    return "not reachable", {}


async def _store(gateway: Gateway, request: Request) -> str:
    try:
        async with asyncio.timeout(PROBE_TIMEOUT_S):
            await asyncio.to_thread(gateway.store.check)
    except StoreUnavailable as error:
        note_cause(error, request.scope)
        return str(error)
    except TimeoutError:
        return f"no answer within {PROBE_TIMEOUT_S:g} s"
    return "ok"
