"""Whatever is sent to a dialect, it answers in its vendor's shape, and never with a 5xx."""

from __future__ import annotations

import asyncio
import gzip
import io
import json
from collections.abc import AsyncGenerator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from app.logs import make_log
from app.main import create_app
from app.settings import GatewaySettings
from tests.app.conftest import client_of
from tests.app.dialects.painter import picture_of
from tests.app.dialects.shapes import (
    assert_deepinfra,
    assert_huggingface,
    assert_openai,
    assert_replicate,
    assert_stability,
)
from tests.app.fake_worker import LARGE, TINY
from worker.contract.errors import UnknownGeneration
from worker.contract.events import FIRST, Event
from worker.contract.job import Job, JobView, Picture, Result
from worker.contract.queue import Accepted, JobQueue

ALWAYS_THE_SAME = hypothesis_settings(max_examples=40, deadline=None, derandomize=True)
RANDOM = hypothesis_settings(max_examples=500, deadline=None, database=None)

fuzzed = pytest.mark.parametrize(
    "examples", [pytest.param(ALWAYS_THE_SAME, id="few"), pytest.param(RANDOM, id="many", marks=pytest.mark.slow)]
)
"""A test of few examples, always the same; and a slow one of many, never the same."""

MODELS = [
    "tiny",
    "sd3.5-large",
    "sd3",
    "stabilityai/sd3.5",
    "stability-ai/stable-diffusion-3.5-large",
    "dall-e-3",
    "",
    "x",
]
VALUES = (
    st.none()
    | st.booleans()
    | st.integers(-5, 30)
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.sampled_from(["1024x1024", "1:1", "21:9", "png", "jpg", "0", "7", "1e3", "NaN", "url", "hd", "true", *MODELS])
    | st.text(max_size=20)
    | st.lists(st.integers(), max_size=2)
    | st.dictionaries(st.text(max_size=3), st.integers(), max_size=2)
)


class Instant(JobQueue):
    """Without Redis: every job has succeeded as soon as it is accepted."""

    job: Job | None = None

    async def cards(self) -> Any:
        return {"sd3.5-large": LARGE, "tiny": TINY}

    async def workers(self) -> dict[str, int]:
        return {"tiny": 1}

    async def expected_wait(self, *_: Any, **__: Any) -> float | None:
        return None

    async def replay(self, _: Any) -> JobView | None:
        return None

    async def submit(self, job: Job, **_: Any) -> Accepted:
        assert self._records.fields(job)
        self.job = job
        return Accepted(job.id, 0, replayed=False)

    async def view(self, job_id: str) -> JobView:
        job = self.job
        if job is None or job.id != job_id:
            raise UnknownGeneration(job_id)
        p, format = job.params, job.output.format
        pictures = tuple(
            Picture(key=f"{job.id}/1/{n}.{format}", seed=seed, width=p.width, height=p.height, format=format, bytes=2)
            for n, seed in enumerate(job.seeds)
        )
        return JobView(job=job, status="succeeded", started_at=1.0, ended_at=2.0, result=Result(pictures=pictures))

    async def wait(self, job_id: str, timeout_s: float) -> JobView:
        return await self.view(job_id)

    async def cancel(self, job_id: str) -> JobView:
        return await self.view(job_id)

    async def page(self, *_: Any, **__: Any) -> list[JobView]:
        return [] if self.job is None else [await self.view(self.job.id)]

    async def events(self, job_id: str, after: str = FIRST) -> AsyncGenerator[Event, None]:
        for step in (1, 2):
            yield Event("1-1", "progress", {"step": step, "steps": 2})
            yield Event("1-2", "preview", {"step": step})

    async def watch(self, job_id: str) -> None:
        pass

    async def preview(self, job_id: str) -> bytes | None:
        return picture_of(16, 8, "jpeg")

    async def secret(self) -> bytes:
        return b"secret"


class Blank:
    """A store in which every picture is the same two bytes."""

    def get(self, key: str) -> bytes | None:
        return b"ok"


Ask = Callable[..., httpx.Response]


@pytest.fixture
def ask(tmp_path: Path) -> Iterator[Ask]:
    """Sends requests to a gateway that makes every picture at once; with a portal, as hypothesis is not async."""
    settings = GatewaySettings(redis_url="redis://127.0.0.1:1/0", store_dir=tmp_path)  # type: ignore[arg-type]
    with asyncio.Runner() as runner:
        queue = Instant.connect(settings)
        app = create_app(settings, queue, Blank(), make_log("json", io.StringIO()))  # type: ignore[arg-type]

        async def send(method: str, path: str, **request: Any) -> httpx.Response:
            async with client_of(app) as client:
                return await client.request(method, path, **request)

        yield lambda method, path, **request: runner.run(send(method, path, **request))
        runner.run(queue.close())


def assert_events(answer: httpx.Response) -> None:
    """OpenAI's events: the last one is a picture or an error."""
    told = [json.loads(line.removeprefix("data: ")) for line in answer.text.splitlines() if line.startswith("data: ")]
    assert all(event["type"].startswith("image_generation.") for event in told[:-1])
    assert told[-1].keys() >= {"error"} or told[-1]["type"] == "image_generation.completed"


DIALECTS: dict[str, tuple[str, str, Callable[[httpx.Response], None]]] = {
    "openai": (
        "/openai/v1/images/generations",
        "prompt model n size quality response_format output_format output_compression background partial_images "
        "stream deterministic negative_prompt seed steps num_inference_steps guidance_scale sampler",
        assert_openai,
    ),
    "deepinfra": (
        "/v1/inference/tiny",
        "prompt negative_prompt num_images num_inference_steps aspect_ratio width height guidance_scale seed webhook "
        "image strength",
        assert_deepinfra,
    ),
    "huggingface": ("/huggingface/tiny", "inputs parameters options", assert_huggingface),
    "replicate": ("/v1/predictions", "version input webhook webhook_events_filter stream", assert_replicate),
}
PARAMETERS = "negative_prompt width height num_inference_steps guidance_scale scheduler seed x"
INPUT = (
    "prompt negative_prompt aspect_ratio cfg steps image seed num_outputs width height size "
    "output_format output_quality x"
)
GOOD: dict[str, Any] = {
    "prompt": "a red circle",
    "inputs": "a red circle",
    "version": "darkroom/tiny",
    "input": {"prompt": "a red circle"},
    "model": "tiny",
    "stream": True,
}
NEEDED = {"prompt", "inputs", "version", "input"}


def mostly(usual: st.SearchStrategy[Any], other: st.SearchStrategy[Any] = VALUES) -> st.SearchStrategy[Any]:
    """Three times of four the usual."""
    return st.integers(0, 3).flatmap(lambda n: usual if n < 3 else other)


@st.composite
def bodies(draw: st.DrawFn, fields: str) -> dict[str, Any]:
    """Objects with a few of these fields, most often those among them without which nothing is made."""
    names, inner = fields.split(), {"parameters": PARAMETERS, "input": INPUT}
    chosen = draw(st.sets(st.sampled_from(names), max_size=3))
    chosen |= draw(mostly(st.just(NEEDED & set(names)), st.just(set())))
    body = {}
    for name in sorted(chosen):
        usual = [st.just(GOOD[name])] if name in GOOD else []
        usual += [bodies(inner[name])] if name in inner else []
        body[name] = draw(mostly(st.one_of(usual)) if usual else VALUES)
    return body


@fuzzed
@pytest.mark.parametrize("dialect", DIALECTS)
def test_any_fields_are_followed_or_refused_in_the_vendors_shape(
    ask: Ask, dialect: str, examples: hypothesis_settings
) -> None:
    path, names, check = DIALECTS[dialect]
    followed = refused = 0

    @examples
    @given(bodies(names))
    def answers(body: dict[str, Any]) -> None:
        nonlocal followed, refused
        answer = ask("POST", path, content=json.dumps(body), headers={"content-type": "application/json"})
        assert answer.status_code < 500, answer.text
        if answer.status_code >= 300:
            refused += 1
            check(answer)
        else:
            followed += 1
            assert answer.status_code == (201 if dialect == "replicate" else 200)
        if answer.headers["content-type"].startswith("text/event-stream"):
            assert_events(answer)

    answers()
    assert followed
    assert refused


@fuzzed
@pytest.mark.parametrize("dialect", DIALECTS)
def test_any_bytes_are_refused_in_the_vendors_shape(ask: Ask, dialect: str, examples: hypothesis_settings) -> None:
    path, _, check = DIALECTS[dialect]
    hard = [b"[" * 50_000, b"9" * 50_000, b'{"prompt": "\\ud800"}', b"null"]

    @examples
    @given(st.binary(max_size=40) | st.sampled_from(hard))
    def answers(body: bytes) -> None:
        answer = ask("POST", path, content=body, headers={"content-type": "application/json"})
        assert answer.status_code in {400, 422}, answer.text
        check(answer)

    answers()


@pytest.mark.parametrize("value", ["NaN", "-Infinity", "1e999", '"\\ud83d"', '{"\\ud83d": 1}'])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_what_json_cannot_carry_back_is_refused_wherever_it_is(ask: Ask, dialect: str, value: str) -> None:
    path, _, check = DIALECTS[dialect]
    fields = f'"prompt": "a red circle", "inputs": "a red circle", "x": [{value}]'
    body = f'{{{fields}, "version": "darkroom/tiny", "input": {{{fields}}}}}'
    answer = ask("POST", path, content=body)
    assert answer.status_code == 400, answer.text
    assert "the body is not valid JSON: a " in answer.text
    check(answer)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_compressed_body_is_refused_in_the_vendors_shape(ask: Ask, dialect: str) -> None:
    path, _, check = DIALECTS[dialect]
    answer = ask("POST", path, content=gzip.compress(b"{}"), headers={"content-encoding": "gzip"})
    assert answer.status_code == 415, answer.text
    assert "allowed: none; send the body as it is" in answer.text
    check(answer)


@pytest.mark.parametrize("depth", [10, 60, 70, *range(100, 1000, 50), 5000])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_any_depth_is_followed_or_refused_in_the_vendors_shape(ask: Ask, dialect: str, depth: int) -> None:
    path, _, check = DIALECTS[dialect]
    deep = "[" * depth + "]" * depth
    fields = f'"prompt": "a red circle", "inputs": "a red circle", "x": {deep}'
    body = f'{{{fields}, "version": "darkroom/tiny", "input": {{{fields}}}}}'
    answer = ask("POST", path, content=body, headers={"idempotency-key": "deep"})
    assert (answer.status_code >= 400) == (depth > 64), answer.text
    if depth > 64:
        assert answer.status_code == 400
        check(answer)


FORM = "prompt negative_prompt mode aspect_ratio model seed output_format style_preset cfg_scale"
PARTS = st.tuples(
    st.none() | st.just("none") | st.text(max_size=5),
    st.text(max_size=20) | st.binary(max_size=20) | st.sampled_from(["1:1", "png", "origami", "7", *MODELS]),
)


@fuzzed
def test_any_form_is_followed_or_refused_in_stabilitys_shape(ask: Ask, examples: hypothesis_settings) -> None:
    statuses = set()

    @examples
    @given(
        parts=st.dictionaries(st.sampled_from([*FORM.split(), "none", "image", "strength"]), PARTS), good=st.booleans()
    )
    def answers(parts: dict[str, Any], good: bool) -> None:
        files = parts | ({"prompt": (None, "a red circle")} if good else {})
        answer = ask("POST", "/v2beta/stable-image/generate/sd3", files=files or {"none": ""})
        assert answer.status_code < 500, answer.text
        if answer.status_code != 200:
            assert_stability(answer)
        statuses.add(answer.status_code)

    answers()
    assert statuses >= {200, 400}


@fuzzed
def test_any_bytes_as_a_form_are_refused_in_stabilitys_shape(ask: Ask, examples: hypothesis_settings) -> None:
    @examples
    @given(st.binary(max_size=60), st.sampled_from(["b", "", '"', "b; charset=utf-7", "b" * 300]))
    def answers(body: bytes, boundary: str) -> None:
        headers = {"content-type": f"multipart/form-data; boundary={boundary}"}
        answer = ask("POST", "/v2beta/stable-image/generate/sd3", content=b"--b\r\n" + body, headers=headers)
        assert answer.status_code == 400
        assert_stability(answer)

    answers()


@fuzzed
@pytest.mark.parametrize(
    ("prefix", "check"),
    [
        ("/openai/v1/", assert_openai),
        ("/v1/openai/", assert_openai),
        ("/v1/inference/", assert_deepinfra),
        ("/huggingface/", assert_huggingface),
        ("/v2beta/", assert_stability),
        ("/v2beta/results/", assert_stability),
        ("/v1/predictions/", assert_replicate),
        ("/v1/deployments/", assert_replicate),
        ("/v1/models/a/b/", assert_replicate),
        ("/v1/models/stability-ai/stable-diffusion-3.5-large/versions/", assert_replicate),
        ("/v1/files/", assert_replicate),
        ("/v1/webhooks/", assert_replicate),
        ("/v1/account/", assert_replicate),
        ("/v1/trainings/", assert_replicate),
        ("/v1/hardware/", assert_replicate),
        ("/v1/collections/", assert_replicate),
    ],
)
def test_any_path_is_refused_in_the_vendors_shape(
    ask: Ask, prefix: str, check: Any, examples: hypothesis_settings
) -> None:
    @examples
    @given(st.sampled_from(["GET", "POST", "PUT", "DELETE"]), st.text(st.sampled_from("ab/.%0é?"), max_size=12))
    def answers(method: str, path: str) -> None:
        answer = ask(method, prefix + path, content=b"")
        if answer.request.url.path.startswith(prefix):  # the client resolves dots
            assert 400 <= answer.status_code < 500
            check(answer)

    answers()


HEADER = st.text(st.characters(min_codepoint=32, max_codepoint=255, exclude_characters="\x7f"), max_size=12)
WISHES = st.sampled_from(["wait", "wait=5", "wait=0", 'wait="7"', "wait=99999999999", "respond-async", "a, wait=1;b"])
DURATIONS = st.sampled_from(["5", "30s", "5m", "1h", "1h30m", "90m", "0s", "999999h999999m999999s", "h", "1d"])


@fuzzed
def test_any_preference_and_time_limit_of_a_prediction_is_followed_or_refused(
    ask: Ask, examples: hypothesis_settings
) -> None:
    statuses = set()

    @examples
    @given(HEADER | WISHES, HEADER | DURATIONS)
    def answers(prefer: str, cancel_after: str) -> None:
        headers = {"prefer": prefer.encode("latin-1"), "cancel-after": cancel_after.encode("latin-1")}
        answer = ask("POST", "/v1/models/darkroom/tiny/predictions", json={"input": GOOD["input"]}, headers=headers)
        assert answer.status_code in {201, 422}, answer.text
        if answer.status_code == 422:
            assert_replicate(answer)
        statuses.add(answer.status_code)

    answers()
    assert statuses == {201, 422}


@fuzzed
def test_any_preference_and_accept_header_of_stability_is_followed(ask: Ask, examples: hypothesis_settings) -> None:
    @examples
    @given(HEADER | WISHES, HEADER | st.sampled_from(["image/*", "*/*", "application/json; type=image/png"]))
    def answers(prefer: str, accept: str) -> None:
        headers = {"prefer": prefer.encode("latin-1"), "accept": accept.encode("latin-1")}
        files = {"prompt": (None, "a red circle"), "model": (None, "tiny")}
        answer = ask("POST", "/v2beta/stable-image/generate/sd3", files=files, headers=headers)
        assert answer.status_code == 200, answer.text

    answers()


@fuzzed
def test_any_cursor_gives_a_page_of_predictions(ask: Ask, examples: hypothesis_settings) -> None:
    @examples
    @given(st.text(max_size=40) | st.from_regex(r"gen_[0-9a-f]{31}", fullmatch=True))
    def answers(cursor: str) -> None:
        answer = ask("GET", "/v1/predictions", params={"cursor": cursor})
        assert answer.status_code == 200, answer.text
        assert answer.json().keys() == {"previous", "next", "results"}

    answers()


@fuzzed
def test_any_place_of_a_prediction_is_one_to_stream_from(ask: Ask, examples: hypothesis_settings) -> None:
    url = ask("POST", "/v1/models/darkroom/tiny/predictions", json={"input": GOOD["input"]}).json()["urls"]["stream"]

    @examples
    @given(HEADER | st.sampled_from(["1-1", "1-2-3", "0-0", "9" * 10_000 + "-1", "-", "1-"]))
    def answers(last_event_id: str) -> None:
        answer = ask("GET", url, headers={"last-event-id": last_event_id.encode("latin-1")})
        assert (answer.status_code, answer.headers["content-type"].partition(";")[0]) == (200, "text/event-stream")
        assert last_event_id != "" or "event: done" in answer.text

    answers()
