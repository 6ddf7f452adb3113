"""The gateway process: builds the app, runs its background work, serves it."""

from __future__ import annotations

import asyncio
import signal
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from types import FrameType

import uvicorn
from fastapi import FastAPI, Security
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from starlette.exceptions import HTTPException
from structlog.typing import FilteringBoundLogger

from app import refusals
from app.auth import KEY_SCHEME, Doorkeeper
from app.connection import IDLE_S, PunctualProtocol
from app.deps import Gateway
from app.dialects import deepinfra, huggingface, openai, replicate, stability
from app.limits import Catalog
from app.logs import make_log, uvicorn_log_config
from app.metrics import Metrics
from app.middleware import BodyLimit, LastResort, RequestContext
from app.pages import PageGuard
from app.routes import events, generations, health, images, models, playground, webhooks
from app.schemas import ANY_REFUSAL, DESCRIPTION, TAGS
from app.settings import GatewaySettings
from app.signing import Signing
from app.validation import on_validation_error
from app.webhook_target import Targets
from worker.contract import telemetry
from worker.contract.errors import DarkroomError
from worker.contract.queue import JobQueue
from worker.contract.store import PictureStore, open_store
from worker.contract.telemetry import Traces
from worker.contract.variables import unread

DIALECTS = (stability, replicate, openai, deepinfra, huggingface)
"""The vendors' contracts; each has `router`, `PREFIXES` of its paths, and `render` for refusals there."""

SWEEP_GRACE_S = 60
"""Pictures are stored a moment before their job ends, and live from its end."""

EXPIRE_EVERY_S = 10
EXPIRE_LEASE_S = 60
"""How long others leave alone a job whose pictures one gateway deletes."""

REAP_EVERY_S = 2
CHECK_STORE_EVERY_S = 10
CLOSE_TIMEOUT_S = 10

EXPOSED_HEADERS = (
    "finish-reason", "idempotency-replayed", "location", "preference-applied", "ratelimit", "ratelimit-policy",
    "retry-after", "seed", "x-filtered", "x-request-id", "x-seed", "x-should-retry", "x-warnings",
)  # fmt: skip
"""What scripts of other origins may read of an answer."""


def create_app(
    settings: GatewaySettings | None = None,
    queue: JobQueue | None = None,
    store: PictureStore | None = None,
    log: FilteringBoundLogger | None = None,
    targets: Targets | None = None,
    traces: Traces | None = None,
) -> FastAPI:
    """The gateway as an ASGI app. What is not given is made from the settings; those, from the environment."""
    settings = settings or GatewaySettings()
    owns_queue = queue is None
    log = log or make_log(settings.log_format)
    queue = queue or JobQueue.connect(settings)
    gateway = Gateway(
        settings=settings,
        queue=queue,
        store=store or open_store(settings, log),
        catalog=Catalog(queue.cards),
        metrics=Metrics(queue_bound=settings.queue_bound),
        log=log,
        targets=targets or Targets(settings.webhook_targets),
        door=Doorkeeper.connect(settings),
        signing=Signing(queue.secret),
        traces=traces or telemetry.connect("darkroom-gateway", log),
    )
    app = FastAPI(
        title="Darkroom",
        version=_version(),
        description=DESCRIPTION,
        openapi_tags=TAGS,
        responses=ANY_REFUSAL,
        lifespan=_lifespan,
        # Both pages load their script from a CDN; Darkroom works without the Internet
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.gateway, app.state.owns_queue = gateway, owns_queue
    _add_routes(app, settings)
    app.add_exception_handler(DarkroomError, refusals.on_darkroom_error)
    app.add_exception_handler(HTTPException, refusals.on_http_exception)
    app.add_exception_handler(RequestValidationError, on_validation_error)
    _add_middleware(app, gateway)
    return app


def _add_routes(app: FastAPI, settings: GatewaySettings) -> None:
    """Ours and the vendors', and how refusals read on each's paths."""
    app.state.shapes = {"": refusals.native}
    key = [Security(KEY_SCHEME)] if settings.keys_on else []  # tells the OpenAPI; each route asks by its CallerDep
    for router in (generations.router, images.router, events.router, models.router, webhooks.router):
        app.include_router(router, dependencies=key)
    for router in (health.router, playground.router):
        app.include_router(router)
    for dialect in DIALECTS:
        app.include_router(dialect.router, dependencies=key)
        app.state.shapes |= dict.fromkeys(dialect.PREFIXES, dialect.render)


def _add_middleware(app: FastAPI, gateway: Gateway) -> None:
    """What every request passes; the one added last runs first."""
    settings = gateway.settings
    app.add_middleware(
        BodyLimit,
        max_bytes=settings.max_body_bytes,
        max_multipart_bytes=settings.max_multipart_bytes,
        timeout_s=settings.body_timeout_s,
    )
    if not settings.keys_on:
        app.add_middleware(PageGuard, settings=settings)
    if gateway.traces:
        from app.tracing import Tracing  # with it comes OpenTelemetry

        app.add_middleware(Tracing, tracer=gateway.traces.tracer)
    app.add_middleware(LastResort, log=gateway.log)
    if settings.origins:  # outside all that refuses, so that pages can read every refusal, our own failures too
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.origins,
            allow_methods=["GET", "HEAD", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=EXPOSED_HEADERS,
        )
    app.add_middleware(RequestContext, metrics=gateway.metrics, log=gateway.log)


def serve(settings: GatewaySettings) -> None:
    """Serves until SIGTERM or SIGINT: then not ready, held answers given, `drain_s` later closed."""
    app = create_app(settings)
    for told in unread():
        app.state.gateway.log.warning("variable_unread", told=told)
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=PunctualProtocol,
        log_config=uvicorn_log_config(settings.log_format),
        access_log=False,
        server_header=False,
        ws="none",
        timeout_keep_alive=IDLE_S,
        timeout_graceful_shutdown=CLOSE_TIMEOUT_S,
        forwarded_allow_ips=settings.trusted_proxies,
    )
    with suppress(KeyboardInterrupt):
        GatewayServer(config, app.state.gateway).run()


class GatewayServer(uvicorn.Server):
    """A server that drains before it closes."""

    def __init__(self, config: uvicorn.Config, gateway: Gateway) -> None:
        super().__init__(config)
        self._gateway = gateway
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Remembers the loop, which a signal's handler must reach."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        """The first signal drains; a second one closes at once."""
        if self._loop is None or self._gateway.draining.is_set():
            self.force_exit = self.should_exit and sig == signal.SIGINT
            self.should_exit = True
        else:
            self._loop.call_soon_threadsafe(self._drain)

    def _drain(self) -> None:
        self._gateway.draining.set()
        assert self._loop is not None
        self._loop.call_later(self._gateway.settings.drain_s, self._close)

    def _close(self) -> None:
        self.should_exit = True


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    gateway: Gateway = app.state.gateway
    chores = [
        asyncio.create_task(_every(gateway.settings.sweep_every_s, _sweep_pictures, gateway)),
        asyncio.create_task(_every(EXPIRE_EVERY_S, _expire_pictures, gateway)),
        asyncio.create_task(_every(REAP_EVERY_S, _reap, gateway)),
        asyncio.create_task(_every(CHECK_STORE_EVERY_S, _check_store, gateway)),
    ]
    try:
        yield
    finally:
        gateway.draining.set()
        await asyncio.gather(*chores)
        await gateway.door.close()
        if app.state.owns_queue:
            await gateway.queue.close()
        if gateway.traces:
            await asyncio.to_thread(gateway.traces.close)


async def _every(seconds: float, work: Callable[[Gateway], Awaitable[None]], gateway: Gateway) -> None:
    """Does the work now and every so many seconds, whatever happens to it, until the gateway drains.

    Not ended by cancelling: before Python 3.12 `asyncio.wait_for`, with which redis-py sends, may swallow that.
    """
    while not gateway.draining.is_set():
        try:
            await work(gateway)
        except DarkroomError as error:
            cause = {"cause": refusals.cause_of(error)} if error.__cause__ else {}
            gateway.log.warning("chore_failed", chore=work.__name__, error=str(error), **cause)
        except Exception:
            gateway.log.exception("chore_failed", chore=work.__name__)
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await gateway.draining.wait()


async def _expire_pictures(gateway: Gateway) -> None:
    """Deletes the pictures of jobs whose time is up. Those that it cannot delete come again after their lease."""
    failures: list[Exception] = []
    end = time.monotonic() + EXPIRE_LEASE_S  # by then those come, and would keep this from telling of its failures
    while time.monotonic() < end and (expired := await gateway.queue.expired_pictures(EXPIRE_LEASE_S)):
        try:
            await asyncio.to_thread(gateway.store.delete_prefix, expired.job_id)
        except Exception as error:  # whatever it is, it must not keep the pictures of others
            failures.append(error)
        else:
            if await gateway.queue.pictures_deleted(expired):
                gateway.metrics.jobs_expired.inc()
        if gateway.draining.is_set():
            break
    if failures:
        raise failures[0]


async def _sweep_pictures(gateway: Gateway) -> None:
    """Deletes pictures that are older than any may be: those that no job tells of."""
    older_than_s = gateway.settings.picture_lifetime_s + SWEEP_GRACE_S
    gateway.metrics.pictures_swept.inc(await asyncio.to_thread(gateway.store.sweep, older_than_s))


async def _reap(gateway: Gateway) -> None:
    """Fails jobs past their deadline that nobody looks at, and gives the jobs of dead workers to others."""
    await gateway.queue.reap()


async def _check_store(gateway: Gateway) -> None:
    """Notes for Prometheus whether the store answers: a scrape does not wait for it."""
    await gateway.metrics.check_store(gateway.store)


def _version() -> str:
    try:
        return version("darkroom")
    except PackageNotFoundError:
        return "0+unpackaged"
