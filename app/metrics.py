"""What Prometheus sees of the gateway. Names and buckets are public: dashboards stand on them."""

from __future__ import annotations

import asyncio

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from worker.contract.errors import QueueUnavailable
from worker.contract.queue import JobQueue

REQUEST_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60, 120, 300)
SCRAPE_TIMEOUT_S = 1.0


class Metrics:
    """The gateway's own registry; one an app."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter(
            "darkroom_requests_total", "HTTP requests answered", ["route", "method", "status"], registry=registry
        )
        self.request_seconds = Histogram(
            "darkroom_request_seconds",
            "Seconds from a request's first byte to its answer's last, a held one's wait included",
            ["route", "method"],
            buckets=REQUEST_BUCKETS_S,
            registry=registry,
        )
        self.generations = Counter(
            "darkroom_generations_total",
            "Generations asked for: accepted, rejected, or replayed for an idempotency key; reason is the error code",
            ["model", "dialect", "outcome", "reason"],
            registry=registry,
        )
        self.jobs_expired = Counter(
            "darkroom_jobs_expired_total", "Jobs whose pictures were deleted when their time was up", registry=registry
        )
        self.pictures_swept = Counter("darkroom_pictures_swept_total", "Expired pictures deleted", registry=registry)
        self.queue_up = Gauge("darkroom_queue_up", "1 if Redis answered this scrape", registry=registry)
        self.queue_depth = Gauge(
            "darkroom_queue_depth", "Jobs that wait, none that run", ["model", "priority"], registry=registry
        )
        self.queue_seconds = Gauge(
            "darkroom_queue_seconds",
            "Seconds of work queued and running, by the measured speed of the model; absent where none was measured",
            ["model"],
            registry=registry,
        )
        self.model_workers = Gauge(
            "darkroom_model_workers", "Live workers that hold the model", ["model"], registry=registry
        )

    def observe(self, *, route: str, method: str, status: int, seconds: float) -> None:
        """Counts one answered request."""
        self.requests.labels(route, method, str(status)).inc()
        self.request_seconds.labels(route, method).observe(seconds)

    async def render(self, queue: JobQueue) -> bytes:
        """The exposition text, with the queue as it is now; without it if Redis does not answer in time."""
        try:
            async with asyncio.timeout(SCRAPE_TIMEOUT_S):
                depth, workers, cards = await queue.depth(), await queue.workers(), await queue.cards()
                outstanding = await queue.outstanding()
        except (QueueUnavailable, TimeoutError):
            depth, workers, cards, outstanding, up = {}, {}, {}, {}, 0
        else:
            up = 1
        self.queue_up.set(up)
        self.queue_depth.clear()
        self.queue_seconds.clear()
        self.model_workers.clear()
        for (model, priority), waiting in depth.items():
            self.queue_depth.labels(model, priority).set(waiting)
        for model, seconds in outstanding.items():
            if seconds is not None:
                self.queue_seconds.labels(model).set(seconds)
        for model in cards:
            self.model_workers.labels(model).set(workers.get(model, 0))
        return generate_latest(self.registry)
