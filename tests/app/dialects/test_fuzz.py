"""Whatever is sent to a dialect, it answers in its vendor's shape, and never with a 5xx."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from app.logs import make_log
from app.main import create_app
from app.settings import GatewaySettings
from tests.app.conftest import client_of
from tests.app.fake_worker import LARGE, TINY
from worker.contract.job import Job, JobView, Picture, Result
from worker.contract.queue import Accepted, JobQueue

EXAMPLES = hypothesis_settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
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

    jobs: dict[str, Job]

    async def cards(self) -> Any:
        return {"sd3.5-large": LARGE, "tiny": TINY}

    async def workers(self) -> dict[str, int]:
        return {"tiny": 1}

    async def expected_wait(self, *_: Any, **__: Any) -> float | None:
        return None

    async def submit(self, job: Job, **_: Any) -> Accepted:
        self.jobs = {job.id: job}
        return Accepted(job.id, 0, replayed=False)

    async def view(self, job_id: str) -> JobView:
        job = self.jobs[job_id]
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
        return []

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


def assert_stability(said: Any, answer: httpx.Response) -> None:
    assert said.keys() == {"id", "name", "errors"}
    assert said["id"]
    assert said["name"]
    assert all(isinstance(error, str) and error for error in said["errors"])


def assert_openai(said: Any, answer: httpx.Response) -> None:
    assert said.keys() == {"error"}
    assert said["error"].keys() == {"message", "type", "param", "code"}
    assert isinstance(said["error"]["message"], str)
    assert answer.headers["x-should-retry"] in {"true", "false"}


def assert_deepinfra(said: Any, answer: httpx.Response) -> None:
    assert said.keys() == {"detail"}
    assert said["detail"].keys() == {"error"}
    assert isinstance(said["detail"]["error"], str)


def assert_huggingface(said: Any, answer: httpx.Response) -> None:
    assert said.keys() == {"error", "error_type"}
    assert isinstance(said["error"], str)


def assert_replicate(said: Any, answer: httpx.Response) -> None:
    assert said.keys() >= {"type", "title", "status", "detail"}
    assert isinstance(said["detail"], str)


DIALECTS: dict[str, tuple[str, str, Callable[[Any, httpx.Response], None]]] = {
    "openai": (
        "/openai/v1/images/generations",
        "prompt model n size quality response_format output_format output_compression background partial_images "
        "negative_prompt seed steps num_inference_steps guidance_scale sampler",
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
PARAMETERS = ["negative_prompt", "width", "height", "num_inference_steps", "guidance_scale", "scheduler", "seed", "x"]
INPUT = [
    "prompt",
    "negative_prompt",
    "aspect_ratio",
    "cfg",
    "steps",
    "image",
    "seed",
    "output_format",
    "output_quality",
]


def bodies(names: list[str]) -> st.SearchStrategy[dict[str, Any]]:
    """Objects with some of these fields, often a good prompt among them."""
    good = {"prompt": "a red circle", "inputs": "a red circle", "version": "tiny"}
    inner = {"parameters": PARAMETERS, "input": INPUT}
    fields = {
        name: (bodies(inner[name]) | VALUES)
        if name in inner
        else (st.just(good[name]) | VALUES)
        if name in good
        else VALUES
        for name in names
    }
    return st.fixed_dictionaries({}, optional=fields)


@pytest.mark.parametrize("dialect", DIALECTS)
@given(data=st.data())
@EXAMPLES
def test_any_fields_are_followed_or_refused_in_the_vendors_shape(ask: Ask, dialect: str, data: st.DataObject) -> None:
    path, names, check = DIALECTS[dialect]
    body = data.draw(bodies(names.split()))
    answer = ask("POST", path, content=json.dumps(body), headers={"content-type": "application/json"})
    assert answer.status_code < 500, answer.text
    if answer.status_code >= 300:
        check(answer.json(), answer)


@pytest.mark.parametrize("dialect", DIALECTS)
@given(body=st.binary(max_size=40) | st.sampled_from([b"[" * 50_000, b"9" * 50_000, b'{"prompt": "\\ud800"}', b"null"]))
@EXAMPLES
def test_any_bytes_are_refused_in_the_vendors_shape(ask: Ask, dialect: str, body: bytes) -> None:
    path, _, check = DIALECTS[dialect]
    answer = ask("POST", path, content=body, headers={"content-type": "application/json"})
    assert answer.status_code in {400, 422}, answer.text
    check(answer.json(), answer)


FORM = [
    "prompt",
    "negative_prompt",
    "mode",
    "aspect_ratio",
    "model",
    "seed",
    "output_format",
    "style_preset",
    "cfg_scale",
]
PARTS = st.tuples(
    st.none() | st.just("none") | st.text(max_size=5),
    st.text(max_size=20) | st.binary(max_size=20) | st.sampled_from(["1:1", "png", "origami", "7", *MODELS]),
)


@given(parts=st.dictionaries(st.sampled_from([*FORM, "none", "image", "strength"]), PARTS), good=st.booleans())
@EXAMPLES
def test_any_form_is_followed_or_refused_in_stabilitys_shape(ask: Ask, parts: dict[str, Any], good: bool) -> None:
    files = parts | ({"prompt": (None, "a red circle")} if good else {})
    answer = ask("POST", "/v2beta/stable-image/generate/sd3", files=files or {"none": ""})
    assert answer.status_code < 500, answer.text
    if answer.status_code != 200:
        assert_stability(answer.json(), answer)


@given(body=st.binary(max_size=60), boundary=st.sampled_from(["b", "", '"', "b; charset=utf-7", "b" * 300]))
@EXAMPLES
def test_any_bytes_as_a_form_are_refused_in_stabilitys_shape(ask: Ask, body: bytes, boundary: str) -> None:
    headers = {"content-type": f"multipart/form-data; boundary={boundary}"}
    answer = ask("POST", "/v2beta/stable-image/generate/sd3", content=b"--b\r\n" + body, headers=headers)
    assert answer.status_code == 400
    assert_stability(answer.json(), answer)


@pytest.mark.parametrize(
    ("prefix", "check"),
    [
        ("/openai/v1/", assert_openai),
        ("/v1/openai/", assert_openai),
        ("/v1/inference/", assert_deepinfra),
        ("/huggingface/", assert_huggingface),
        ("/v2beta/", assert_stability),
    ],
)
@given(method=st.sampled_from(["GET", "POST", "PUT", "DELETE"]), path=st.text(st.sampled_from("ab/.%0é?"), max_size=12))
@hypothesis_settings(EXAMPLES, max_examples=30)
def test_any_path_is_refused_in_the_vendors_shape(ask: Ask, prefix: str, check: Any, method: str, path: str) -> None:
    answer = ask(method, prefix + path, content=b"")
    assert 400 <= answer.status_code < 500
    if answer.request.url.path.startswith(prefix):  # the client resolves dots
        check(answer.json(), answer)
