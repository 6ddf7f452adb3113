"""A span for each request of the API, and the context that its job takes along."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import AsyncIterator

import httpx
import pytest
from fastapi import FastAPI
from opentelemetry.proto.trace.v1.trace_pb2 import Status

from app.logs import make_log
from app.main import create_app
from app.settings import GatewaySettings
from tests.app.fake_worker import FakeWorker
from tests.collector import Collector

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
BODY = {"model": "tiny", "prompt": "a secret garden"}


@pytest.fixture
async def collector(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Collector]:
    with Collector() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
        yield collector


@pytest.fixture
async def app(collector: Collector, settings: GatewaySettings, worker: FakeWorker) -> AsyncIterator[FastAPI]:
    """A gateway that sends traces."""
    app = create_app(settings, log=make_log("json", io.StringIO()))
    async with app.router.lifespan_context(app):
        yield app


def end(app: FastAPI) -> None:
    """Returns once all spans so far are with the collector."""
    app.state.gateway.traces.close()


async def test_request_is_a_child_of_its_traceparent_and_the_parent_of_its_job(
    app: FastAPI, client: httpx.AsyncClient, collector: Collector, worker: FakeWorker
) -> None:
    worker.go_on.clear()
    headers = {"traceparent": PARENT, "x-request-id": "req_7", "authorization": "Bearer dr_secret"}
    answer = await client.post("/v1/generations", json=BODY, headers=headers)
    assert answer.status_code == 202, answer.text
    view = await app.state.gateway.queue.view(answer.json()["id"])
    end(app)
    span = collector.named("POST /v1/generations")
    assert (span.trace, span.parent) == (PARENT.split("-")[1], PARENT.split("-")[2])
    assert view.job.trace == f"00-{span.trace}-{span.id}-01"
    assert span.attributes == {
        "http.request.method": "POST",
        "http.route": "/v1/generations",
        "http.response.status_code": 202,
        "darkroom.request_id": "req_7",
        "darkroom.generation": answer.json()["id"],
        "darkroom.model": "tiny",
        "darkroom.dialect": "native",
    }
    assert not any(b"secret" in body for body in collector.bodies)
    worker.go_on.set()


async def test_request_without_traceparent_begins_a_trace(
    app: FastAPI, client: httpx.AsyncClient, collector: Collector
) -> None:
    await client.get("/v1/models")
    end(app)
    assert collector.named("GET /v1/models").parent == ""


async def test_refused_request_says_why(app: FastAPI, client: httpx.AsyncClient, collector: Collector) -> None:
    await client.get("/v1/generations/gen_0000000000000000000000000000000")
    end(app)
    span = collector.named("GET /v1/generations/{id}")
    assert span.attributes["http.response.status_code"] == 404
    assert span.attributes["error.type"] == "not_found"


async def test_request_that_nobody_caught_is_an_error(
    app: FastAPI, client: httpx.AsyncClient, collector: Collector
) -> None:
    async def broken() -> None:
        raise RuntimeError("a secret")

    app.add_api_route("/v0/broken", broken)
    answer = await client.get("/v0/broken")
    assert answer.status_code == 500, answer.text
    end(app)
    span = collector.named("GET /v0/broken")
    assert span.span.status.code == Status.STATUS_CODE_ERROR
    assert span.attributes["http.response.status_code"] == 500
    assert span.attributes["error.type"] == "RuntimeError"
    assert not any(b"secret" in body for body in collector.bodies)


async def test_only_the_api_is_traced(app: FastAPI, client: httpx.AsyncClient, collector: Collector) -> None:
    for path in ("/healthz", "/metrics", "/", "/playground/nothing.js", "/openapi.json", "/no/such/path"):
        await client.get(path)
    await client.get("/v1/models")
    end(app)
    assert [span.name for span in collector.spans] == ["GET /v1/models"]


async def test_parent_that_is_not_sampled_samples_nothing_and_says_so_to_the_worker(
    app: FastAPI, client: httpx.AsyncClient, collector: Collector
) -> None:
    headers = {"traceparent": PARENT.removesuffix("01") + "00"}
    answer = await client.post("/v1/generations", json=BODY, headers=headers)
    view = await app.state.gateway.queue.view(answer.json()["id"])
    end(app)
    assert collector.spans == []
    assert view.job.trace.endswith("-00")
    assert view.job.trace.split("-")[1] == PARENT.split("-")[1]


def test_nothing_that_sends_traces_is_imported_where_none_are_sent() -> None:
    code = """
import sys
from app.main import create_app
assert create_app().state.gateway.traces is None
print(*(m for m in sys.modules if m in ("app.tracing", "torch") or m.startswith("opentelemetry.exporter")))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


def test_gateway_without_the_packages_for_the_traces_asked_for_refuses_to_start() -> None:
    code = "import sys; sys.modules['opentelemetry.exporter'] = None; from app.cli import main; main()"
    env = os.environ | {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318"}
    argv = [sys.executable, "-c", code, "gateway", "--port", "0"]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "pip install 'darkroom[otel]'" in done.stderr
    assert "Traceback" not in done.stderr
