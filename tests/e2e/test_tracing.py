"""One trace from the request through the queue to the worker, over real processes."""

from __future__ import annotations

import sys
from collections.abc import Callable

import httpx
import pytest

from tests.collector import Collector
from tests.e2e.conftest import Up

pytestmark = [pytest.mark.e2e, pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")]

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


def test_request_queue_and_work_are_one_trace(start_up: Callable[..., Up], model: str) -> None:
    with Collector() as collector:
        up = start_up(OTEL_EXPORTER_OTLP_ENDPOINT=collector.url)
        up.wait_until_said("Darkroom is ready")
        body = {"model": model, "prompt": "a secret garden", "steps": 3}
        headers = {"prefer": "wait=60", "traceparent": f"00-{TRACE}-{PARENT}-01"}
        answer = httpx.post(f"{up.url}/v1/generations", json=body, headers=headers, timeout=70)
        assert answer.json()["status"] == "succeeded", answer.text
        assert up.stop() == 0

        request, generation = collector.named("POST /v1/generations"), collector.named("generation")
        assert (request.service, request.trace, request.parent) == ("darkroom-gateway", TRACE, PARENT)
        assert (generation.service, generation.trace, generation.parent) == ("darkroom-worker", TRACE, request.id)
        assert generation.attributes["darkroom.generation"] == answer.json()["id"]
        for name in ("queue", "text_encode", "denoise", "vae_decode", "store"):
            span = collector.named(name)
            assert (span.service, span.trace, span.parent) == ("darkroom-worker", TRACE, generation.id)
        assert [event.name for event in collector.named("denoise").span.events] == ["step"] * 3
        assert not any(b"secret" in body for body in collector.bodies)
