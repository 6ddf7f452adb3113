"""What is asked for again, with a key or by a client's own habit, is made once."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import redis

from app.settings import GatewaySettings
from tests.app.dialects.conftest import Live
from tests.app.dialects.painter import Painter
from tests.processes import wait_until
from worker.contract.errors import QueueUnavailable
from worker.contract.job import Failure, JobView
from worker.contract.queue import JobQueue

PROMPT = "a red circle"
OPENAI, DEEPINFRA = "/openai/v1/images/generations", "/v1/inference/tiny"
REPLICATE, STABILITY = "/v1/predictions", "/v2beta/stable-image/generate/sd3"
FORM = {"prompt": (None, PROMPT), "model": (None, "tiny")}
HELD: dict[str, tuple[str, dict[str, Any]]] = {
    "openai": (OPENAI, {"json": {"model": "tiny", "prompt": PROMPT}}),
    "openai's stream": (OPENAI, {"json": {"model": "tiny", "prompt": PROMPT, "stream": True}}),
    "deepinfra": (DEEPINFRA, {"json": {"prompt": PROMPT}}),
    "huggingface": ("/huggingface/tiny", {"json": {"inputs": PROMPT}}),
    "stability": (STABILITY, {"files": FORM}),
}
KEY = {"idempotency-key": "once"}
AI_SDK = {"user-agent": "ai/6.0.1 ai-sdk/deepinfra/2.0.1 ai-sdk/provider-utils/4.0.1 runtime/node.js/v22.1.0"}


class Caller:
    """Asks gateways, in threads of its own where it is not to be waited for."""

    def __init__(self) -> None:
        self._client = httpx.Client(trust_env=False, timeout=20)
        self._threads = ThreadPoolExecutor(4)

    def post(self, live: Live, path: str, headers: dict[str, str] | None = None, **request: Any) -> httpx.Response:
        return self._client.post(live.url + path, headers=headers, **request)

    def begin(self, *args: Any, **request: Any) -> Future[httpx.Response]:
        return self._threads.submit(self.post, *args, **request)

    def close(self) -> None:
        self._threads.shutdown()
        self._client.close()


@pytest.fixture
def caller() -> Iterator[Caller]:
    caller = Caller()
    yield caller
    caller.close()


class Failover(JobQueue):
    """A Redis that is away for the first looks at a job; then the worker goes on."""

    away: int
    worker: Painter

    async def view(self, job_id: str) -> JobView:
        if self.away:
            self.away -= 1
            raise QueueUnavailable
        self.worker.go_on.set()
        return await super().view(job_id)


def failover(settings: GatewaySettings, worker: Painter, away: int) -> Failover:
    """A queue that is away for so many looks at a job of a worker that stands still meanwhile."""
    queue = Failover.connect(settings)
    queue.away, queue.worker = away, worker
    worker.go_on.clear()
    return queue


def drained(caller: Caller, live: Live, worker: Painter, path: str, **request: Any) -> httpx.Response:
    """What a gateway answers that drains while it holds this."""
    asking = caller.begin(live, path, **request)
    wait_until(lambda: bool(worker.running))
    live.drain()
    return asking.result(10)


def orphans(settings: GatewaySettings) -> int:
    """How many requests have jobs that their client lost."""
    with redis.Redis.from_url(str(settings.redis_url)) as client:
        return len(list(client.scan_iter("darkroom:orphans:*")))


@pytest.mark.parametrize("dialect", HELD)
def test_job_with_a_key_goes_on_while_its_gateway_drains(
    settings: GatewaySettings, worker: Painter, caller: Caller, dialect: str
) -> None:
    path, request = HELD[dialect]
    worker.go_on.clear()
    with Live(settings) as one, Live(settings) as other:
        answer = drained(caller, one, worker, path, headers=KEY, **request)
        assert "shutting down" in answer.text
        assert answer.status_code == (200 if "stream" in dialect else 503)
        worker.go_on.set()
        again = caller.post(other, path, headers=KEY, **request)
        assert again.status_code == 200
        assert "error" not in again.text[:100]
        assert [job["status"] for job in other.jobs()] == ["succeeded"]


@pytest.mark.parametrize("dialect", [name for name in HELD if "stream" not in name])
def test_job_with_a_key_goes_on_when_its_time_is_up(
    settings: GatewaySettings, worker: Painter, caller: Caller, dialect: str
) -> None:
    path, request = HELD[dialect]
    worker.go_on.clear()
    with Live(settings.model_copy(update={"hold_s": 1.0})) as live:
        answer = caller.post(live, path, headers=KEY, **request)
        assert (answer.status_code, answer.headers["retry-after"]) == (504, "1")
        assert "ask again with the same Idempotency-Key" in answer.text
        assert answer.headers.get("x-should-retry", "true") == "true"
        worker.go_on.set()
        assert caller.post(live, path, headers=KEY, **request).status_code == 200
        assert [job["status"] for job in live.jobs()] == ["succeeded"]


HOOK = "https://93.184.215.14/hook"
VERSIONS = {"version": "darkroom/tiny", "input": {"prompt": PROMPT}}


@pytest.mark.parametrize(
    ("path", "first", "other"),
    [
        (OPENAI, {"json": {"prompt": PROMPT}}, {"json": {"prompt": PROMPT, "style": "vivid"}}),
        (DEEPINFRA, {"json": {"prompt": PROMPT}}, {"json": {"prompt": PROMPT, "unknown": 1}}),
        (DEEPINFRA, {"json": {"prompt": PROMPT}}, {"json": {"prompt": PROMPT, "webhook": HOOK}}),
        ("/huggingface/tiny", {"json": {"inputs": PROMPT}}, {"json": {"inputs": PROMPT, "options": {"x": 1}}}),
        (STABILITY, {"files": FORM}, {"files": FORM | {"none": (None, "x")}}),
        (REPLICATE, {"json": VERSIONS}, {"json": VERSIONS | {"version": "stability-ai/tiny"}}),
        (REPLICATE, {"json": VERSIONS}, {"json": VERSIONS | {"input": {"prompt": PROMPT, "unknown": 1}}}),
        (REPLICATE, {"json": VERSIONS}, {"json": VERSIONS | {"webhook": HOOK}}),
        (REPLICATE, {"json": VERSIONS}, {"json": VERSIONS | {"webhook_events_filter": ["start"]}}),
    ],
)
def test_key_with_another_body_is_refused(
    alone: Live, caller: Caller, path: str, first: dict[str, Any], other: dict[str, Any]
) -> None:
    key = KEY | {"prefer": "wait=10"}
    assert caller.post(alone, path, headers=key, **first).status_code in {200, 201}
    refused = caller.post(alone, path, headers=key, **other)
    assert refused.status_code == (400 if path in (STABILITY, OPENAI) else 422)
    assert "was used with another request" in refused.text
    assert caller.post(alone, path, headers=key, **first).status_code in {200, 201}
    assert len(alone.jobs()) == 1


def test_key_with_the_same_body_in_other_order_is_the_same_request(alone: Live, caller: Caller) -> None:
    bodies = ('{"prompt": "x", "num_images": 1, "webhook": null}', '{"webhook":null,"num_images":1,"prompt":"x"}')
    answers = [caller.post(alone, DEEPINFRA, headers=KEY, content=body) for body in bodies]
    assert answers[0].json() == answers[1].json()


def test_key_stands_for_the_body_though_other_models_are_held_by_then(
    settings: GatewaySettings, worker: Painter, caller: Caller
) -> None:
    body = {"json": {"prompt": PROMPT}}
    choices = [settings.model_copy(update={"default_model": model}) for model in ("tiny", "sd3.5-large-turbo")]
    with Live(choices[0]) as one, Live(choices[1]) as other:
        answers = [caller.post(live, OPENAI, headers=KEY, **body) for live in (one, other)]
        assert answers[0].json() == answers[1].json()
        assert [job["model"] for job in other.jobs()] == ["tiny"]


@pytest.mark.parametrize("path", [OPENAI, DEEPINFRA])
def test_client_that_repeats_any_5xx_is_told_of_a_failure_with_another_status(
    settings: GatewaySettings, caller: Caller, path: str
) -> None:
    with Painter(settings, Failure(code="out_of_memory", message="the GPU is full")), Live(settings) as live:
        answer = caller.post(live, path, headers=AI_SDK, json={"model": "tiny", "prompt": PROMPT})
    assert answer.status_code == 424
    assert "the GPU is full" in answer.text


@pytest.mark.parametrize("path", [OPENAI, DEEPINFRA])
def test_client_that_repeats_any_5xx_is_told_that_its_time_is_up_with_another_status(
    settings: GatewaySettings, worker: Painter, caller: Caller, path: str
) -> None:
    worker.go_on.clear()
    with Live(settings.model_copy(update={"hold_s": 1.0})) as live:
        answer = caller.post(live, path, headers=AI_SDK, json={"model": "tiny", "prompt": PROMPT})
    assert answer.status_code == 424
    assert "not ready within 1 s" in answer.text


def test_job_of_a_drained_gateway_is_adopted_by_the_same_request(
    settings: GatewaySettings, worker: Painter, caller: Caller
) -> None:
    worker.go_on.clear()
    with Live(settings) as one, Live(settings) as other:
        answer = drained(caller, one, worker, DEEPINFRA, headers=AI_SDK, json={"prompt": PROMPT})
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        worker.go_on.set()
        assert caller.post(other, DEEPINFRA, headers=AI_SDK, json={"prompt": PROMPT}).status_code == 200
        assert [job["status"] for job in other.jobs()] == ["succeeded"]


@pytest.mark.parametrize(
    ("path", "body"), [(DEEPINFRA, {"prompt": PROMPT}), (REPLICATE, VERSIONS), (OPENAI, {"prompt": PROMPT})]
)
def test_job_of_a_lost_connection_is_adopted_by_the_same_request(
    settings: GatewaySettings, alone: Live, worker: Painter, caller: Caller, path: str, body: dict[str, Any]
) -> None:
    headers = AI_SDK | {"prefer": "wait"}
    worker.go_on.clear()
    with pytest.raises(httpx.ReadTimeout):
        caller.post(alone, path, headers=headers, json=body, timeout=0.5)
    wait_until(lambda: orphans(settings) == 1)
    worker.go_on.set()
    assert caller.post(alone, path, headers=headers, json=body).status_code in {200, 201}
    assert [job["status"] for job in alone.jobs()] == ["succeeded"]
    assert orphans(settings) == 0


@pytest.mark.parametrize("dialect", [name for name in HELD if "stream" not in name])
def test_held_job_goes_on_while_redis_is_away(
    settings: GatewaySettings, worker: Painter, caller: Caller, dialect: str
) -> None:
    path, request = HELD[dialect]
    with Live(settings, failover(settings, worker, away=3)) as live:
        assert caller.post(live, path, **request).status_code == 200
        assert [job["status"] for job in live.jobs()] == ["succeeded"]


def test_job_that_cannot_be_looked_at_when_it_is_adopted_is_left_to_the_next_try(
    settings: GatewaySettings, worker: Painter, caller: Caller
) -> None:
    with Live(settings) as one, Live(settings, failover(settings, worker, away=1)) as other:
        drained(caller, one, worker, DEEPINFRA, headers=AI_SDK, json={"prompt": PROMPT})
        assert caller.post(other, DEEPINFRA, headers=AI_SDK, json={"prompt": PROMPT}).status_code == 503
        assert caller.post(other, DEEPINFRA, headers=AI_SDK, json={"prompt": PROMPT}).status_code == 200
        assert [job["status"] for job in other.jobs()] == ["succeeded"]
