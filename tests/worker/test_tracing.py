"""What a job did, as spans: made of what the engine measures, sent once the job is over."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from tests.worker.fake_pipeline import Bench
from tests.worker.jobs import make_job
from worker.contract.job import Failure, Job
from worker.intake import Claim
from worker.task import Task
from worker.tracing import MAX_EVENTS, JobTracing

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Site:
    """An engine whose jobs are traced, and the spans so far."""

    def __init__(self) -> None:
        self.bench, self._sent = Bench(), InMemorySpanExporter()
        provider = TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(self._sent))
        self.tracing = JobTracing(provider.get_tracer("test"))

    def submit(self, job: Job) -> Task:
        task = Task(job, timeline=self.tracing.follow(job))
        self.bench.engine.submit(task)
        return task

    def end(self, task: Task, outcome: str = "succeeded") -> None:
        timeline = task.timeline
        assert timeline is not None
        claim = Claim(task.job, "e", timeline.claimed / 1e9, 0.0)
        storing = max([timeline.claimed, *(stage.ended for stage in timeline.stages.values())])
        self.tracing.ended(claim, task, outcome, storing)

    def run(self, job: Job) -> None:
        task = self.submit(job)
        self.bench.drain()
        self.end(task)

    @property
    def spans(self) -> dict[str, ReadableSpan]:
        """By name, with their own names once: a job has one of each."""
        sent = self._sent.get_finished_spans()
        assert len({span.name for span in sent}) == len(sent)
        return {span.name: span for span in sent}


@pytest.fixture
def site() -> Site:
    return Site()


def traced_job(flags: str = "01", **asked: Any) -> Job:
    return replace(make_job(**asked), trace=f"00-{TRACE}-{PARENT}-{flags}", request_id="req_7", owner="key_7")


def span_times(span: ReadableSpan) -> tuple[int, int]:
    assert span.start_time is not None
    assert span.end_time is not None
    return span.start_time, span.end_time


def test_job_is_a_child_of_its_request_and_the_parent_of_what_was_done_for_it(site: Site) -> None:
    site.run(traced_job())
    generation = site.spans["generation"]
    assert f"{generation.context.trace_id:032x}" == TRACE
    assert generation.parent is not None
    assert f"{generation.parent.span_id:016x}" == PARENT
    inside = {name: span for name, span in site.spans.items() if name != "generation"}
    assert list(inside) == ["queue", "text_encode", "denoise", "vae_decode", "store"]
    for span in inside.values():
        assert span.parent is not None
        assert span.parent.span_id == generation.context.span_id
        assert span.context.trace_id == generation.context.trace_id


def test_spans_follow_each_other_inside_the_generation(site: Site) -> None:
    job = traced_job()
    site.run(replace(job, created_at=job.created_at - 5))
    begins, ends = span_times(site.spans["generation"])
    assert begins == int((job.created_at - 5) * 1e9)
    before = begins
    for name in ("queue", "text_encode", "denoise", "vae_decode", "store"):
        start, end = span_times(site.spans[name])
        assert before - 200_000_000 <= start <= end <= ends  # the engine's clock here is not the wall's
        before = end


def test_job_made_by_a_clock_ahead_of_ours_has_not_waited_less_than_nothing(site: Site) -> None:
    job = traced_job()
    site.run(replace(job, created_at=job.created_at + 100))
    start, end = span_times(site.spans["queue"])
    assert start == end
    assert span_times(site.spans["generation"])[0] == start


def test_generation_says_what_was_made_but_neither_prompt_nor_owner(site: Site) -> None:
    job = traced_job(prompt="a secret garden", negative_prompt="secret people", num_images=2, steps=3)
    site.run(job)
    generation = site.spans["generation"]
    assert dict(generation.attributes or {}) == {
        "darkroom.generation": job.id,
        "darkroom.request_id": "req_7",
        "darkroom.model": "tiny",
        "darkroom.width": 64,
        "darkroom.height": 64,
        "darkroom.steps": 3,
        "darkroom.num_images": 2,
        "darkroom.priority": "normal",
        "darkroom.outcome": "succeeded",
    }
    told = " ".join(span.to_json() for span in site.spans.values())
    assert "secret" not in told
    assert "key_7" not in told


def test_denoise_tells_the_rows_of_its_batches_and_each_step(site: Site) -> None:
    task = site.submit(traced_job(steps=4))
    site.bench.submit(steps=4, seed=100)  # rides along, and is not traced
    site.bench.drain()
    site.end(task)
    denoise = site.spans["denoise"]
    attributes = dict(denoise.attributes or {})
    assert attributes.pop("darkroom.busy_s") == pytest.approx(0.4)
    assert attributes == {
        "darkroom.batches": 4,
        "darkroom.steps": 4,
        "darkroom.rows_mean": 4.0,
        "darkroom.rows_max": 4,
    }
    assert [event.attributes for event in denoise.events] == [
        {"darkroom.step": step, "darkroom.rows": 4} for step in (1, 2, 3, 4)
    ]


def test_long_job_has_no_more_events_than_are_readable(site: Site) -> None:
    site.run(traced_job(steps=100, num_images=4))
    events = site.spans["denoise"].events
    assert 50 <= len(events) <= MAX_EVENTS
    assert dict(events[-1].attributes or {})["darkroom.step"] == 400


def test_failed_job_says_with_what_code_and_nothing_was_stored(site: Site) -> None:
    task = Task(traced_job(), timeline=site.tracing.follow(make_job()))
    task.outcome, task.failure = "failed", Failure(code="out_of_memory", message="a secret")
    site.end(task, "failed")
    generation = site.spans["generation"]
    assert generation.status.status_code is StatusCode.ERROR
    assert dict(generation.attributes or {})["error.type"] == "out_of_memory"
    assert list(site.spans) == ["queue", "generation"]
    assert "secret" not in generation.to_json()


def test_request_that_is_not_sampled_has_no_spans_here_either(site: Site) -> None:
    site.run(traced_job(flags="00"))
    assert site.spans == {}


def test_job_without_a_traced_request_is_a_trace_of_its_own(site: Site) -> None:
    site.run(make_job())
    assert site.spans["generation"].parent is None


def test_task_that_is_not_followed_costs_and_sends_nothing(site: Site) -> None:
    task = site.bench.submit()
    site.bench.drain()
    site.tracing.ended(Claim(task.job, "e", 0.0, 0.0), task, "succeeded", 0)
    assert task.timeline is None
    assert site.spans == {}
