"""What Prometheus sees of the gateway. Names and buckets are public: dashboards stand on them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from worker.contract.errors import QueueUnavailable
from worker.contract.load import ASSUMED_SPEED, Survey
from worker.contract.queue import JobQueue
from worker.contract.store import PictureStore

REQUEST_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60, 120, 300)
SCRAPE_TIMEOUT_S = 1.0
STORE_TIMEOUT_S = 5.0


class Metrics:
    """The gateway's own registry; one an app."""

    def __init__(self, *, queue_bound: int = 0, store_timeout_s: float = STORE_TIMEOUT_S) -> None:
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
        Gauge(
            "darkroom_queue_bound",
            "Jobs that may wait per model and priority; beyond them new ones are refused",
            registry=registry,
        ).set(queue_bound)
        self.queue_oldest_age = Gauge(
            "darkroom_queue_oldest_age_seconds",
            "How long the job waits that has waited longest; 0 where none waits",
            ["model", "priority"],
            registry=registry,
        )
        self.queue_seconds = Gauge(
            "darkroom_queue_seconds",
            "Seconds of work queued and running, by the speed of the live workers; by that of one, as last measured, "
            f"where none lives; by {ASSUMED_SPEED:g} megapixel-steps a second where none was ever measured",
            ["model"],
            registry=registry,
        )
        self.store_up = Gauge(
            "darkroom_store_up", "1 if the picture store answered when it was last asked", registry=registry
        )
        self._store_timeout_s = store_timeout_s
        self._store_answer: asyncio.Future[None] | None = None  # that we wait for
        self.model_workers = Gauge(
            "darkroom_model_workers", "Live workers that hold the model", ["model"], registry=registry
        )

        self._from_redis = FromRedis()
        registry.register(self._from_redis)

    def observe(self, *, route: str, method: str, status: int, seconds: float) -> None:
        """Counts one answered request."""
        self.requests.labels(route, method, str(status)).inc()
        self.request_seconds.labels(route, method).observe(seconds)

    async def check_store(self, store: PictureStore) -> None:
        """Notes whether the store answers. One that is silent is asked no second time meanwhile. StoreUnavailable."""
        if self._store_answer is None:
            self._store_answer = asyncio.ensure_future(asyncio.to_thread(store.check))
        done, _ = await asyncio.wait([self._store_answer], timeout=self._store_timeout_s)
        if not done:
            self.store_up.set(0)
            return
        answer, self._store_answer = self._store_answer, None
        self.store_up.set(0 if answer.exception() else 1)
        answer.result()

    async def render(self, queue: JobQueue) -> bytes:
        """The exposition text, with the queue as it is now; without it if Redis does not answer in time."""
        survey = None
        try:
            async with asyncio.timeout(SCRAPE_TIMEOUT_S):
                survey = await queue.survey()
        except (QueueUnavailable, TimeoutError):
            pass
        for gauge in (self.queue_depth, self.queue_oldest_age, self.queue_seconds, self.model_workers):
            gauge.clear()
        self.queue_up.set(0 if survey is None else 1)
        self._from_redis.survey = survey
        if survey:
            self._show(survey)
        return generate_latest(self.registry)

    def _show(self, survey: Survey) -> None:
        for (model, priority), waiting in survey.waiting.items():
            self.queue_depth.labels(model, priority).set(waiting)
            self.queue_oldest_age.labels(model, priority).set(survey.oldest_s[model, priority])
        for model in survey.models:
            self.queue_seconds.labels(model).set(survey.load.outstanding_s(model))
            self.model_workers.labels(model).set(survey.workers(model))


class FromRedis(Collector):
    """What Redis tells of itself, and counts for all gateways: what one of them counts ends with it."""

    survey: Survey | None = None

    def collect(self) -> Iterable[Metric]:
        """As of the survey; without one, nothing has a value."""
        ended = CounterMetricFamily(
            "darkroom_generations_ended",
            "Generations ended, as Redis counts them for all gateways; reason is the code of a failure",
            labels=["model", "outcome", "reason"],
        )
        dropped = CounterMetricFamily(
            "darkroom_records_dropped",
            "Records of ended jobs that went before their time, as Redis was nearly full; counted for all gateways",
        )
        memory = GaugeMetricFamily("darkroom_redis_memory_bytes", "Memory that Redis uses")
        limit = GaugeMetricFamily(
            "darkroom_redis_memory_limit_bytes", "Memory that Redis may use; 0: nothing bounds it"
        )
        if self.survey:
            for labels, count in self.survey.ended.items():
                ended.add_metric(labels, count)
            dropped.add_metric([], self.survey.dropped)
            for family, size in zip((memory, limit), self.survey.memory, strict=True):
                family.add_metric([], size)
        yield from (ended, dropped, memory, limit)
