"""Traces leave only where a collector is named, and a dead collector harms nobody."""

from __future__ import annotations

import io
import json
import socket
from collections.abc import Iterator

import pytest

from app.logs import make_log
from tests.collector import Collector
from tests.processes import wait_until
from worker.contract import telemetry
from worker.contract.errors import CannotStart
from worker.contract.telemetry import Traces

ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"


@pytest.fixture
def lines() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    with Collector() as collector:
        monkeypatch.setenv(ENDPOINT, collector.url)
        yield collector


def connect(lines: io.StringIO) -> Traces:
    traces = telemetry.connect("darkroom-test", make_log("json", lines), instance="w1")
    assert traces is not None
    return traces


@pytest.mark.parametrize("variables", [{}, {ENDPOINT: " "}, {ENDPOINT: "http://x:4318", "OTEL_SDK_DISABLED": "true"}])
def test_no_traces_where_no_collector_is_named_or_they_are_off(
    variables: dict[str, str], monkeypatch: pytest.MonkeyPatch, lines: io.StringIO
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert telemetry.connect("darkroom-test", make_log("json", lines)) is None


def test_spans_arrive_by_themselves_and_the_rest_on_closing(collector: Collector, lines: io.StringIO) -> None:
    traces = connect(lines)
    traces.tracer.start_span("first").end()
    assert collector.named("first").service == "darkroom-test"
    traces.tracer.start_span("last").end()
    traces.close()
    assert [span.name for span in collector.spans] == ["first", "last"]


def test_operator_names_the_service(collector: Collector, monkeypatch: pytest.MonkeyPatch, lines: io.StringIO) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "pictures")
    traces = connect(lines)
    traces.tracer.start_span("one").end()
    traces.close()
    assert collector.named("one").service == "pictures"


def test_protocol_that_is_not_spoken_is_refused_in_words(monkeypatch: pytest.MonkeyPatch, lines: io.StringIO) -> None:
    monkeypatch.setenv(ENDPOINT, "http://127.0.0.1:4317")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    with pytest.raises(CannotStart, match=r"OTEL_EXPORTER_OTLP_PROTOCOL is 'grpc'; allowed: http/protobuf"):
        connect(lines)


def test_collector_that_never_answers_does_not_keep_a_process_from_ending(
    collector: Collector, monkeypatch: pytest.MonkeyPatch, lines: io.StringIO
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "600")
    collector.answering.clear()
    traces = connect(lines)
    traces.tracer.start_span("unheard").end()
    assert collector.asked.wait(30)
    traces.close()
    assert not collector.answering.is_set()
    assert collector.spans == []


def test_collector_that_is_away_is_one_line_in_our_log_however_much_is_lost(
    monkeypatch: pytest.MonkeyPatch, lines: io.StringIO
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setenv(ENDPOINT, f"http://127.0.0.1:{port}")
    traces = connect(lines)
    for _ in range(10_000):  # more than are kept
        traces.tracer.start_span("lost").end()
    wait_until(lambda: bool(lines.getvalue()), 30)
    traces.close()
    said = [json.loads(line) for line in lines.getvalue().splitlines()]
    assert [line["event"] for line in said] == ["traces"]
