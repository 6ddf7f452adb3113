"""The process that calls webhooks: takes messages from the outbox, signs and posts them, tries again, notes it all."""

from __future__ import annotations

import asyncio
import json
import random
import secrets
import signal
import ssl
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import httpcore
import httpx
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server
from pydantic import Field
from structlog.typing import FilteringBoundLogger

from app.dialects import deepinfra
from app.dialects.predictions import prediction
from app.links import Links
from app.logs import make_log
from app.schemas import DeliveryOutcome, Generation, timestamp
from app.settings import GatewaySettings
from app.signing import Signer
from app.webhook_signature import signature_headers, signing_secret
from app.webhook_target import GuardedNetwork, Target, TargetRefused, Targets
from worker.contract.errors import CannotStart, QueueUnavailable, SchemaUnknown, UnknownGeneration
from worker.contract.job import TERMINAL, JobView, Webhook
from worker.contract.outbox import Entry, Outbox
from worker.contract.queue import JobQueue
from worker.contract.variables import unread

POLL_S = 0.25
COUNT_EVERY_S = 5.0
AWAY_S = 1.0
"""How long to leave a Redis alone that does not answer."""

LEASE_MARGIN_S = 5.0
"""Beyond the time of one attempt; a message of a sender that died is sent by another after that."""

MAX_BACKOFF_S = 3600.0
PROGRESS_EVERY_S = 0.5
BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
GONE = 410
"""How a receiver says that it wants to hear no more."""


class WebhookSettings(GatewaySettings):
    """What the sender of webhooks reads from `DARKROOM_*`, on top of what it shares with the gateway."""

    webhook_timeout_s: float = Field(default=10.0, gt=0, le=60, description="seconds that a receiver has to answer")
    webhook_attempts: int = Field(
        default=8, ge=1, le=20, description="times that a message is sent before it is given up"
    )
    webhook_retry_s: float = Field(
        default=5.0,
        gt=0,
        le=3600,
        description="seconds before the second attempt; each later wait is four times as long, an hour at most",
    )
    webhooks_at_once: int = Field(default=128, ge=1, le=1024, description="messages that are being sent at one time")
    webhook_metrics_port: int = Field(default=0, ge=0, le=65_535, description="port of the sender's /metrics; 0: none")
    grace_s: float = Field(default=20.0, ge=0, le=86_400, description="seconds to finish when told to stop")


@dataclass(frozen=True)
class Answer:
    """What came of one attempt."""

    seconds: float
    status: int | None = None  # of HTTP, if there was an answer
    error: str | None = None  # why there was none
    retry_after_s: float = 0.0
    final: bool = False  # no other attempt will do better
    at: float = field(default_factory=time.time)  # Unix seconds of its end

    @property
    def arrived(self) -> bool:
        """Whether the receiver took it."""
        return self.status is not None and 200 <= self.status < 300


class Courier:
    """Posts to where webhooks may go. Redirects are not followed; of an answer, only its head is read."""

    def __init__(
        self,
        targets: Targets,
        timeout_s: float,
        *,
        tls: ssl.SSLContext | None = None,
        network: httpcore.AsyncNetworkBackend | None = None,
    ) -> None:
        self._timeout_s = timeout_s
        tls = tls or httpx.create_ssl_context()
        # No connection is kept: each message goes to an address that was checked for it. None waits until another
        # ends, for that would count as its receiver's time: how many there are at once is the sender's to say
        self._pools = {
            secure: httpcore.AsyncConnectionPool(
                ssl_context=tls,
                max_connections=None,
                max_keepalive_connections=0,
                network_backend=GuardedNetwork(targets, secure=secure, network=network),
            )
            for secure in (True, False)
        }

    async def post(self, url: str, headers: Mapping[str, str], body: bytes) -> Answer:
        """One attempt."""
        started = time.monotonic()
        try:
            async with asyncio.timeout(self._timeout_s):
                pool = self._pools[Target.parse(url).secure]
                async with pool.stream("POST", url, headers=list(headers.items()), content=body) as response:
                    answer = Answer(0.0, response.status, retry_after_s=_retry_after_s(response.headers))
        except (TimeoutError, httpcore.TimeoutException):
            answer = Answer(0.0, error=f"no answer within {self._timeout_s:g} s")
        except TargetRefused as refused:
            answer = Answer(0.0, error=f"not sent: webhooks go to {refused}")
        except (httpcore.NetworkError, httpcore.ProtocolError, OSError) as broken:
            answer = Answer(0.0, error=f"no answer: {str(broken)[:200] or type(broken).__name__}")
        return replace(answer, seconds=round(time.monotonic() - started, 4))

    async def close(self) -> None:
        """Closes what is open."""
        for pool in self._pools.values():
            await pool.aclose()


class SenderMetrics:
    """What Prometheus sees of the sender."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.attempts = Counter(
            "darkroom_webhook_attempts_total",
            "Attempts to call webhooks; outcome: delivered, retry, dead",
            ["event", "outcome"],
            registry=registry,
        )
        self.seconds = Histogram(
            "darkroom_webhook_seconds", "Seconds of an attempt", ["event"], buckets=BUCKETS_S, registry=registry
        )
        self.waiting = Gauge("darkroom_webhook_waiting", "Messages not delivered yet", registry=registry)
        self.overdue = Gauge(
            "darkroom_webhook_overdue_seconds",
            "How long the most overdue message has waited for a sender, in seconds; 0: none is overdue",
            registry=registry,
        )


class Sender:
    """Sends what is due, until told to stop. Any number of senders may run at once."""

    def __init__(
        self,
        settings: WebhookSettings,
        outbox: Outbox,
        queue: JobQueue,
        courier: Courier,
        log: FilteringBoundLogger,
        jitter: Callable[[], float] = lambda: random.uniform(0.8, 1.2),
    ) -> None:
        self._settings, self._outbox, self._queue, self._courier = settings, outbox, queue, courier
        self._log, self._jitter = log, jitter
        self._name = f"sender-{secrets.token_hex(4)}"
        self._secret = b""
        self._counted_at = float("-inf")
        self.metrics = SenderMetrics()

    async def run(self, stopping: asyncio.Event) -> None:
        """Sends until `stopping` is set; then ends what is being sent, within the grace."""
        sending: set[asyncio.Task[None]] = set()
        lease_s = self._settings.webhook_timeout_s + LEASE_MARGIN_S
        while not stopping.is_set():
            room, taken, pause_s = self._settings.webhooks_at_once - len(sending), 0, POLL_S
            try:
                await self._look()
                for entry in await self._outbox.due(self._name, room, lease_s) if room else ():
                    task = asyncio.create_task(self._send(entry))
                    sending.add(task)
                    task.add_done_callback(sending.discard)
                    taken += 1
            except QueueUnavailable as error:
                self._log.warning("redis_away", error=str(error.__cause__))
                pause_s = AWAY_S
            if not taken:
                with suppress(TimeoutError):
                    async with asyncio.timeout(pause_s):
                        await stopping.wait()
        if sending:
            await asyncio.wait(sending, timeout=self._settings.grace_s)
        for task in list(sending):  # their leases run out, and another sender sends them
            task.cancel()
        await asyncio.gather(*sending, return_exceptions=True)

    async def _look(self) -> None:
        """Asks for what all senders share, once, and counts what waits, now and then."""
        if not self._secret:
            self._secret = await self._queue.secret()
        if time.monotonic() - self._counted_at > COUNT_EVERY_S:
            self._counted_at = time.monotonic()
            self.metrics.waiting.set(await self._outbox.waiting())
            self.metrics.overdue.set(await self._outbox.overdue_s())

    async def _send(self, entry: Entry) -> None:
        """One attempt to deliver a message, whatever comes of it."""
        try:
            if view := await self._view(entry):
                await self._tell(entry, view)
        except UnknownGeneration:
            return
        except QueueUnavailable as error:  # it will be sent again, under the same id
            self._log.warning("redis_away", error=str(error.__cause__))
        except Exception:  # once its lease is over it will be, too
            self._log.exception("webhook_unsettled", generation=entry.job_id, webhook_event=entry.event)

    async def _view(self, entry: Entry) -> JobView | None:
        """The job of a message. One that this sender cannot read it leaves to others. UnknownGeneration."""
        about = {"generation": entry.job_id, "webhook_event": entry.event}
        try:
            return await self._queue.view(entry.job_id)
        except (UnknownGeneration, QueueUnavailable):
            raise
        except SchemaUnknown as error:  # while versions change, a newer one is at work beside this
            self._log.warning("webhook_unread", **about, error=str(error))
        except Exception:
            self._log.exception("webhook_unread", **about)
        await self._outbox.leave(entry, self._settings.webhook_retry_s * self._jitter())
        return None

    async def _tell(self, entry: Entry, view: JobView) -> None:
        started, webhook = time.monotonic(), view.job.webhook
        if webhook is None:  # its record was replaced
            nobody = Answer(0.0, error="not sent: its job has no webhook now", final=True)
            return await self._settle(entry, nobody, view.job.request_id)
        if entry.event == "progress" and view.status in TERMINAL:
            return  # the end took this out
        answer = await self._attempt(entry, view, webhook)
        if entry.event == "progress":  # as long as this one is not settled there will be no other
            await asyncio.sleep(PROGRESS_EVERY_S - (time.monotonic() - started))
        await self._settle(entry, answer, view.job.request_id)

    async def _attempt(self, entry: Entry, view: JobView, webhook: Webhook) -> Answer:
        try:
            return await self._post(entry, view, webhook)
        except Exception:
            self._log.exception("webhook_not_sent", **_about(entry, view.job.request_id))
            return Answer(0.0, error="not sent: something failed on our side")

    async def _post(self, entry: Entry, view: JobView, webhook: Webhook) -> Answer:
        body = self._body(entry, view)
        headers = {
            "content-type": "application/json",
            "user-agent": "darkroom-webhooks",
            **signature_headers(signing_secret(self._secret, view.job.owner), entry.id, int(time.time()), body),
        }
        if view.job.trace:
            headers["traceparent"] = view.job.trace
        return await self._courier.post(webhook.url, headers, body)

    def _body(self, entry: Entry, view: JobView) -> bytes:
        settings = self._settings
        base_url = str(settings.public_url or f"http://{settings.host}:{settings.port}")
        # Signed even where keys are off: whoever fetches pictures there is not asked for a signature
        links = Links(view.job.echo.get("base_url", base_url).rstrip("/"), Signer(self._secret))
        return json.dumps(message(entry, as_of(entry, view), links), separators=(",", ":")).encode()

    async def _settle(self, entry: Entry, answer: Answer, request_id: str) -> None:
        outcome = self._outcome(entry, answer)
        delivery: dict[str, Any] = {"event": entry.event, "at": answer.at - answer.seconds, "attempt": entry.attempt}
        delivery |= {"status": answer.status} if answer.error is None else {"error": answer.error}
        delivery |= {"seconds": answer.seconds, "outcome": outcome}
        match outcome:
            case "delivered":
                await self._outbox.done(entry, delivery)
            case "retry":
                delay_s = self._delay_s(entry, answer)
                await self._outbox.retry(entry, delivery | {"next_at": answer.at + delay_s}, delay_s)
            case "dead":
                await self._outbox.dead(entry, delivery)
        self.metrics.attempts.labels(entry.event, outcome).inc()
        self.metrics.seconds.labels(entry.event).observe(answer.seconds)
        told = {name: value for name, value in delivery.items() if name not in ("event", "at")}
        self._log.info("webhook", **_about(entry, request_id), **told)

    def _outcome(self, entry: Entry, answer: Answer) -> DeliveryOutcome:
        if answer.arrived:
            return "delivered"
        # Of progress there will be news
        last = entry.attempt >= self._settings.webhook_attempts or entry.event == "progress"
        return "dead" if last or answer.final or answer.status == GONE else "retry"

    def _delay_s(self, entry: Entry, answer: Answer) -> float:
        """How long to wait after this attempt: ever longer, never all at the same moment, as long as asked for."""
        backoff_s = min(self._settings.webhook_retry_s * 4.0 ** (entry.attempt - 1), MAX_BACKOFF_S)
        return max(backoff_s * self._jitter(), min(answer.retry_after_s, MAX_BACKOFF_S))


def message(entry: Entry, view: JobView, links: Links) -> dict[str, Any]:
    """What a webhook is told, in the words in which its owner asked."""
    match view.job.dialect:
        case "replicate":
            return prediction(view, links)
        case "deepinfra":
            return deepinfra.webhook_body(view, links)
        case _:
            return {
                "type": f"generation.{entry.event}",
                "timestamp": timestamp(entry.at),
                "data": Generation.of(view, links).model_dump(mode="json", by_alias=True),
            }


def as_of(entry: Entry, view: JobView) -> JobView:
    """The job as it was when it started, for the event that says so; for others, as it is now."""
    if entry.event != "started":
        return view
    return replace(view, status="running", position=None, progress=None, ended_at=None, result=None)


def _about(entry: Entry, request_id: str) -> dict[str, str]:
    """What each line about a message says of it; the request is the one that made the job."""
    return {"request_id": request_id, "generation": entry.job_id, "webhook_event": entry.event}


def serve(settings: WebhookSettings) -> None:
    """Sends until SIGTERM or SIGINT; a second one ends it at once, and nothing is lost by that. CannotStart."""
    asyncio.run(_serve(settings))


async def _serve(settings: WebhookSettings) -> None:
    log = make_log(settings.log_format)
    stopping, loop = asyncio.Event(), asyncio.get_running_loop()
    outbox, queue = Outbox.connect(settings), JobQueue.connect(settings)
    courier = Courier(Targets(settings.webhook_targets), settings.webhook_timeout_s)
    sender = Sender(settings, outbox, queue, courier, log)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, _stop, stopping, number)
    for told in unread():
        log.warning("variable_unread", told=told)
    try:
        if settings.webhook_metrics_port:
            _serve_metrics(settings, sender.metrics.registry)
        log.info("sending_webhooks")
        await sender.run(stopping)
    finally:
        await courier.close()
        await outbox.close()
        await queue.close()


def _serve_metrics(settings: WebhookSettings, registry: CollectorRegistry) -> None:
    host, port = settings.host, settings.webhook_metrics_port
    try:
        start_http_server(port, host, registry)
    except OSError as error:
        where, why = f"{host} port {port}", error.strerror or error
        raise CannotStart(
            f"cannot serve /metrics on {where} ({why}): choose another DARKROOM_WEBHOOK_METRICS_PORT, or 0 for none"
        ) from None


def _stop(stopping: asyncio.Event, number: signal.Signals) -> None:
    if stopping.is_set():
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)
    stopping.set()


def _retry_after_s(headers: list[tuple[bytes, bytes]]) -> float:
    """Seconds that the receiver asks to wait, if it says so in seconds."""
    for name, value in headers:
        if name.lower() == b"retry-after" and value.isdigit() and len(value) < 10:
            return float(value)
    return 0.0
