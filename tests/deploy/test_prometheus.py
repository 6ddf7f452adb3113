"""A real Prometheus scrapes a real Darkroom at work: every query of the dashboard and of the alerts has an answer.

Gateway, worker with the demo model on the CPU, sender of webhooks and Valkey are the processes that `darkroom up` runs.
"""

from __future__ import annotations

import math
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest

from tests.deploy.prometheus import (
    NOT_ON_A_CPU,
    Prometheus,
    alert_rules,
    free_port,
    names_in,
    panel_queries,
    running_prometheus,
    tool,
)
from tests.e2e.conftest import Up, children_of
from tests.processes import wait_until

pytestmark = [pytest.mark.deploy, pytest.mark.timeout(600)]

START_S = 300.0
"""More than it takes: the other tests of deployment may be building images beside it."""

MODEL = "demo"
ROUTINE = {"model": MODEL, "prompt": "a red circle", "steps": 4}
LONG = {"model": MODEL, "prompt": "a red circle", "steps": 100, "num_images": 4, "width": 512, "height": 512}
MANY = [query for query in panel_queries() if not names_in(query[1]) & NOT_ON_A_CPU]


class Receiver(BaseHTTPRequestHandler):
    """Takes every webhook."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@dataclass(frozen=True)
class Observed:
    """A stack at work, and the Prometheus that sees it."""

    up: Up
    prometheus: Prometheus
    hook: str

    def post(self, path: str, body: dict[str, Any], **headers: str) -> httpx.Response:
        return httpx.post(f"{self.up.url}{path}", json=body, headers=headers, timeout=100)

    def status(self, job_id: str) -> str:
        return str(httpx.get(f"{self.up.url}/v1/generations/{job_id}", timeout=10).json()["status"])

    def count(self, query: str) -> float:
        return sum(self.prometheus.values(query))

    def work(self) -> None:
        """Jobs that succeed, fail, are canceled and are refused; one webhook for each that succeeds."""
        for seed in range(3):
            body = ROUTINE | {"seed": seed, "webhook": {"url": self.hook}}
            assert self.post("/v1/generations", body, prefer="wait=60").json()["status"] == "succeeded"
        late = self.post("/v1/generations", LONG | {"deadline_s": 1}, prefer="wait=30").json()
        assert (late["status"], late["error"]["code"]) == ("failed", "deadline_exceeded")
        canceled = self.post("/v1/generations", LONG).json()["id"]
        wait_until(lambda: self.status(canceled) == "running")
        self.post(f"/v1/generations/{canceled}/cancel", {})
        wait_until(lambda: self.status(canceled) == "canceled")
        assert self.post("/v1/generations", ROUTINE | {"steps": 0}).status_code == 422
        held = {"prompt": "a red circle", "num_inference_steps": 100, "width": 512, "height": 512}
        assert self.post(f"/v1/inference/{MODEL}", held).status_code == 504  # DARKROOM_HOLD_S is over by then

    def replace_worker(self) -> None:
        """Kills the worker's process, and returns once another has taken its place and Prometheus knows."""
        (process,) = children_of(self.up.pid("worker"))
        os.kill(process, signal.SIGKILL)
        wait_until(lambda: self.count('darkroom_worker_restarts_total{reason="killed"}') == 1, 30)
        wait_until(lambda: self.count("darkroom_worker_ready") == 1, START_S)


@pytest.fixture(scope="module")
def observed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Observed]:
    """Twice the same work, so that every counter was seen to grow; a worker process dies in between."""
    tool("prometheus")
    folder = tmp_path_factory.mktemp("observed")
    receiver = ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    threading.Thread(target=receiver.serve_forever, args=(0.05,), daemon=True).start()
    worker, webhooks = free_port(), free_port()
    env = {
        "DARKROOM_METRICS_PORT": str(worker),
        "DARKROOM_WEBHOOK_METRICS_PORT": str(webhooks),
        "DARKROOM_WEBHOOK_ALLOW": "127.0.0.1",
        "DARKROOM_HOLD_S": "1",
    }
    up = Up(folder, MODEL, **env)
    ports = {"darkroom-gateway": up.port, "darkroom-worker": worker, "darkroom-webhooks": webhooks}
    try:
        with running_prometheus(folder, {job: f"127.0.0.1:{port}" for job, port in ports.items()}) as prometheus:
            observed = Observed(up, prometheus, f"http://127.0.0.1:{receiver.server_port}/hook")
            wait_until(lambda: up.said("Darkroom is ready") or up.process.poll() is not None, START_S)
            assert up.said("Darkroom is ready"), up.output.read_text()
            wait_until(lambda: set(prometheus.targets().values()) == {"up"})
            observed.work()
            seen = 'darkroom_requests_total{status="504"} >= 1 and on () darkroom_jobs_total{outcome="failed"} >= 1'
            wait_until(lambda: bool(prometheus.query(seen)))
            observed.replace_worker()
            observed.work()
            wait_until(lambda: observed.count("sum(darkroom_webhook_attempts_total)") == 6)
            wait_until(lambda: observed.count('sum(darkroom_jobs_total{outcome="succeeded"})') == 6)
            yield observed
    finally:
        up.stop()
        receiver.shutdown()
        receiver.server_close()


@pytest.mark.parametrize(("title", "query"), MANY, ids=[title for title, _ in MANY])
def test_panel_has_data(observed: Observed, title: str, query: str) -> None:
    def has_data() -> bool:
        return any(not math.isnan(value) for value in observed.prometheus.values(query))

    wait_until(has_data, 10)


def test_alert_rules_are_evaluated_on_metrics_that_are_there(observed: Observed) -> None:
    wait_until(lambda: all(rule["health"] == "ok" for rule in observed.prometheus.rules()), 30)
    assert {rule["name"] for rule in observed.prometheus.rules()} == set(alert_rules())
    for name, rule in alert_rules().items():
        for metric in names_in(rule["expr"]) - NOT_ON_A_CPU:
            assert observed.prometheus.query(f"count({metric})"), f"{name}: no {metric}"


def test_metrics_survive_the_worker_process_that_counted_them(observed: Observed) -> None:
    assert observed.count('darkroom_jobs_total{outcome="succeeded"}') == 6  # three of each process
    assert observed.count("darkroom_model_load_seconds_count") == 2


def test_redis_and_the_workers_count_the_same(observed: Observed) -> None:
    def ended(metric: str) -> dict[str, float]:
        found = observed.prometheus.query(f"sum by (outcome) ({metric})")
        return {sample["metric"]["outcome"]: float(sample["value"][1]) for sample in found}

    # Each is scraped by itself, so one may be a second behind
    wait_until(lambda: ended("darkroom_generations_ended_total") == ended("darkroom_jobs_total"), 20)
    late = 'darkroom_generations_ended_total{outcome="failed", reason="deadline_exceeded"}'
    assert observed.count(late) >= 2


def test_no_label_tells_of_a_job_a_prompt_or_a_caller(observed: Observed) -> None:
    series = observed.prometheus.query('{__name__=~"darkroom_.*"}')
    labels = {label for sample in series for label in sample["metric"]}
    assert labels <= {
        *("__name__", "instance", "job", "le"),
        *("model", "priority", "outcome", "reason", "dialect", "stage", "megapixels"),
        *("route", "method", "status", "event"),
    }
    assert "a red circle" not in str(series)
    assert "gen_" not in str(series)


def test_a_darkroom_that_is_gone_is_about_to_alert(observed: Observed) -> None:
    assert observed.up.stop() == 0
    expected = {"DarkroomGatewayDown", "DarkroomTargetDown", "DarkroomWebhookSenderDown"}

    def pending() -> set[str]:
        return {rule["name"] for rule in observed.prometheus.rules() if rule["state"] == "pending"}

    wait_until(lambda: expected <= pending(), 30)
