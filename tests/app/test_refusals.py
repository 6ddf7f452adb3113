"""Bad requests and their answers: always the one shape, the field, the value, what is allowed; never a 5xx."""

from __future__ import annotations

import asyncio
import gzip
import io
import json
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from app.errors import Shown, shortened
from app.limits import resolve
from app.logs import make_log
from app.main import create_app
from app.refusals import STATUS, status_of
from app.schemas import GenerationCreate
from app.settings import GatewaySettings
from tests.app.conftest import client_of
from tests.app.fake_worker import LARGE, FakeWorker
from worker.contract.errors import DarkroomError
from worker.contract.job import Job
from worker.contract.queue import Accepted, JobQueue
from worker.contract.settings import ContractSettings

LARGE_ASKED = {"model": "sd3.5-large", "prompt": "a red circle"}
JSON = {"content-type": "application/json"}
NOBODYS = "gen_" + "0" * 31


def assert_refused(answer: httpx.Response, status: int, code: str, field: str | None) -> str:
    error = answer.json()["error"]
    assert set(answer.json()) == {"error"}
    assert set(error) == {"code", "message", "field", "request_id"}
    assert (answer.status_code, error["code"], error["field"]) == (status, code, field), error
    assert error["request_id"] == answer.headers["x-request-id"]
    assert len(error["message"]) < 400
    return str(error["message"])


@pytest.mark.parametrize(
    ("fields", "field", "text"),
    [
        ({"width": 1000}, "width", "width is 1000; allowed: a multiple of 16 from 64 to 3072, such as 1008"),
        ({"height": 48}, "height", "height is 48; allowed: a multiple of 16 from 64 to 3072, such as 64"),
        ({"width": 3088}, "width", "such as 3072"),
        ({"width": 0}, "width", "width is 0; allowed: a whole number, at least 1"),
        ({"width": 1e3}, "width", "width is 1000.0; allowed: a whole number"),
        ({"width": 10**30}, "width", "from 64 to 3072"),
        ({"width": 256, "height": 512}, "width", "width is 256 and height is 512, 131,072 pixels"),
        ({"width": 2048, "height": 1040}, "width", "allowed: width x height from 262,144 to 2,097,152 pixels"),
        ({"steps": "20"}, "steps", 'steps is "20"; allowed: a whole number, at least 1'),
        ({"steps": True}, "steps", "steps is true; allowed: a whole number, at least 1"),
        ({"steps": 0}, "steps", "steps is 0; allowed: a whole number, at least 1"),
        ({"steps": 101}, "steps", "steps is 101; allowed: 1 to 100"),
        ({"guidance_scale": -0.1}, "guidance_scale", "guidance_scale is -0.1; allowed: a finite number, at least 0"),
        ({"guidance_scale": 20.5}, "guidance_scale", "guidance_scale is 20.5; allowed: 0 to 20"),
        ({"guidance_scale": False}, "guidance_scale", "guidance_scale is false"),
        ({"seed": -1}, "seed", "seed is -1; allowed: a whole number from 0 to 9007199254740987"),
        ({"seed": 2**53 - 4}, "seed", "seed is 9007199254740988; allowed"),
        ({"num_images": 0}, "num_images", "num_images is 0"),
        ({"num_images": 5}, "num_images", "num_images is 5; allowed: 1 to 4"),
        ({"sampler": "ddim"}, "sampler", 'sampler is "ddim"; allowed: "euler", "dpmpp_2m"'),
        ({"output_format": "gif"}, "output_format", 'output_format is "gif"; allowed: "png", "jpeg", "webp"'),
        ({"output_quality": 101}, "output_quality", "output_quality is 101; allowed: a whole number from 1 to 100"),
        ({"metadata": True}, "metadata", 'metadata is true; allowed: "full", "none"'),
        ({"deterministic": 1}, "deterministic", "deterministic is 1; allowed: true, false"),
        ({"priority": "urgent"}, "priority", 'priority is "urgent"; allowed: "high", "normal", "low"'),
        ({"deadline_s": 0}, "deadline_s", "deadline_s is 0; allowed: a whole number from 1 to 3600"),
        ({"deadline_s": 3601}, "deadline_s", "deadline_s is 3601"),
        ({"prompt": ""}, "prompt", 'prompt is ""; allowed: text, not empty'),
        ({"prompt": 5}, "prompt", "prompt is 5; allowed: text"),
        ({"prompt": ["a", "b"]}, "prompt", 'prompt is ["a", "b"]'),
        ({"prompt": "x" * 10_001}, "prompt", "prompt is 10,001 characters long; allowed: at most 10,000 characters"),
        ({"negative_prompt": "x" * 10_001}, "negative_prompt", "negative_prompt is 10,001 characters long"),
        ({"prompt": "a\0b"}, "prompt", 'prompt is "a\\u0000b"; allowed: text without U+0000'),
        ({"model": ""}, "model", "model is"),
        ({"model": "x" * 129}, "model", "xxx...xxx"),
        ({"aspect_ratio": "wide"}, "aspect_ratio", 'aspect_ratio is "wide"; allowed: text such as 1:1, 16:9, 2:3'),
        ({"aspect_ratio": "0:1"}, "aspect_ratio", "such as 1:1"),
        ({"aspect_ratio": "16:9", "width": 1024}, "aspect_ratio", "allowed: nothing beside width or height"),
        ({"megapixels": 1, "height": 1024}, "megapixels", "megapixels is 1.0; allowed: nothing beside width or height"),
        ({"aspect_ratio": "1:100"}, "aspect_ratio", "allowed: up to 9:1 or 1:9 with 1 megapixels"),
        ({"megapixels": 0}, "megapixels", "megapixels is 0; allowed: a finite number over 0"),
        ({"megapixels": 2.5}, "megapixels", "megapixels is 2.5; allowed: 0.25 to 2"),
        ({"expires_in_s": 59}, "expires_in_s", "expires_in_s is 59; allowed: a whole number, at least 60"),
        ({"expires_in_s": 86_401}, "expires_in_s", "expires_in_s is 86401; allowed: 60 to 86400"),
        ({"webhook": "x"}, "webhook", 'webhook is "x"; allowed: an object with url and events'),
        ({"webhook": {}}, "webhook.url", "webhook.url is required"),
        ({"webhook": {"url": 5}}, "webhook.url", "webhook.url is 5; allowed: text from 1 to 2048 characters"),
        ({"webhook": {"url": "https://a.example", "event": []}}, "webhook.event", "(did you mean events?)"),
        ({"webhook": {"url": "https://a.example", "events": ["x"]}}, "webhook.events", '"started", "progress"'),
        ({"webhook": {"url": "https://a.example", "events": []}}, "webhook.events", "allowed: a list of some of"),
        ({"webhook": {"url": "https://127.0.0.1/"}}, "webhook.url", "allowed: a host with public addresses"),
        ({"stepz": 20}, "stepz", 'there is no field "stepz" (did you mean steps?)'),
        ({"num_inference_steps": 20}, "num_inference_steps", "(did you mean steps?)"),
        ({"cfg-scale": 20}, "cfg-scale", "(did you mean guidance_scale?)"),
        ({"Ω" * 100: 1}, "Ω" * 60 + "..." + "Ω" * 12, "there is no field"),
        ({"steps": "20", "width": "x", "foo": 1}, "width", "(also wrong: foo, steps)"),
    ],
)
async def test_wrong_field_is_422_and_named(
    served: httpx.AsyncClient, fields: dict[str, Any], field: str, text: str
) -> None:
    answer = await served.post("/v1/generations", json=LARGE_ASKED | fields)
    assert text in assert_refused(answer, 422, "invalid_field", field)


@pytest.mark.parametrize(
    ("body", "status", "code", "field", "text"),
    [
        (b'{"model": "sd3.5-large", "prompt": }', 400, "invalid_json", None, "Expecting value at character 35"),
        (b'{"model', 400, "invalid_json", None, "Unterminated string starting at character 1"),
        (b'{"prompt": "\xff"}', 400, "invalid_json", None, "not UTF-8 at byte 12"),
        (b"[" * 60_000, 400, "invalid_json", None, "nested too deeply"),
        (b"9" * 60_000, 400, "invalid_json", None, "a number in it is too long"),
        (b"", 422, "invalid_field", None, "the body is missing; allowed: a JSON object"),
        (b"null", 422, "invalid_field", None, "allowed: a JSON object"),
        (b"[1]", 422, "invalid_field", None, "the body is [1]; allowed: a JSON object"),
        (b'"text"', 422, "invalid_field", None, 'the body is "text"; allowed: a JSON object'),
        (b"{}", 422, "invalid_field", "model", "model is required; known models: sd3.5-large, sd3.5-large-turbo, tiny"),
        (b'{"model": "tiny"}', 422, "invalid_field", "prompt", "prompt is required"),
        (b'{"model": "tiny", "prompt": null}', 422, "invalid_field", "prompt", "prompt is required"),
        (b'{"model": "t", "prompt": "x"}', 404, "unknown_model", "model", "known models: sd3.5-large, sd3.5-large-tur"),
        (b'{"model": "tiny", "prompt": "x", "seed": NaN}', 422, "invalid_field", "seed", "seed is NaN"),
        (b'{"model": "tiny", "prompt": "x", "steps": 1e999}', 422, "invalid_field", "steps", "steps is Infinity"),
        (
            b'{"model": "tiny", "prompt": "x", "guidance_scale": NaN}',
            422,
            "invalid_field",
            "guidance_scale",
            "guidance_scale is NaN; allowed: a finite number, at least 0",
        ),
        (b'{"model": "tiny", "prompt": "\\ud800"}', 422, "invalid_field", "prompt", "without lone surrogates"),
        (
            b'{"model": "tiny", "prompt": "x", "negative_prompt": "\\ud83d"}',
            422,
            "invalid_field",
            "negative_prompt",
            "allowed: text without lone surrogates",
        ),
        (b'{"\\ud800": 1, "prompt": "x"}', 422, "invalid_field", None, "without lone surrogates"),
    ],
)
async def test_broken_body_is_refused(
    served: httpx.AsyncClient, body: bytes, status: int, code: str, field: str | None, text: str
) -> None:
    answer = await served.post("/v1/generations", content=body, headers=JSON)
    assert text in assert_refused(answer, status, code, field)


async def test_required_model_is_told_of_even_without_redis() -> None:
    settings = GatewaySettings(redis_url="redis://127.0.0.1:1/0")  # type: ignore[arg-type]
    queue = JobQueue.connect(settings)
    async with client_of(create_app(settings, queue)) as client:
        answer = await client.post("/v1/generations", json={"prompt": "x"})
    await queue.close()
    assert assert_refused(answer, 422, "invalid_field", "model") == "model is required"


@pytest.mark.parametrize(
    "content_type", [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"]
)
async def test_body_that_is_not_declared_json_is_415(served: httpx.AsyncClient, content_type: str | None) -> None:
    headers = {"content-type": content_type} if content_type else {}
    answer = await served.post("/v1/generations", content=json.dumps(LARGE_ASKED), headers=headers)
    message = assert_refused(answer, 415, "unsupported_media_type", None)
    assert "allowed: application/json" in message


@pytest.mark.parametrize("content_type", ["application/json; charset=utf-8", "Application/JSON", "application/a+json"])
async def test_body_declared_json_in_other_words_is_taken(served: httpx.AsyncClient, content_type: str) -> None:
    content = json.dumps(LARGE_ASKED)
    answer = await served.post("/v1/generations", content=content, headers={"content-type": content_type})
    assert answer.status_code == 202


@pytest.mark.parametrize("encoding", ["gzip", "br", "Deflate", "gzip, identity"])
async def test_compressed_body_is_415(served: httpx.AsyncClient, encoding: str) -> None:
    content = gzip.compress(json.dumps(LARGE_ASKED).encode())
    answer = await served.post("/v1/generations", content=content, headers=JSON | {"content-encoding": encoding})
    message = assert_refused(answer, 415, "unsupported_media_type", None)
    assert message == f'content-encoding is "{encoding}"; allowed: none; send the body as it is'


async def test_body_that_is_said_to_be_as_it_is_is_taken(served: httpx.AsyncClient) -> None:
    answer = await served.post("/v1/generations", json=LARGE_ASKED, headers={"content-encoding": "identity"})
    assert answer.status_code == 202


@pytest.mark.parametrize(
    ("method", "path", "text"),
    [
        ("GET", "/v1/generations?status=failed", 'there is no parameter "status"; allowed: limit, cursor'),
        ("GET", "/v1/generations?cursr=1", 'there is no parameter "cursr" (did you mean cursor?)'),
        ("GET", "/v1/generations?status=failed&limit=5", "allowed: limit, cursor"),
        ("POST", "/v1/generations?status=failed", 'there is no parameter "status"; allowed: none'),
        ("GET", f"/v1/generations/{NOBODYS}?status=failed", "allowed: none"),
        ("DELETE", f"/v1/generations/{NOBODYS}?status=failed", "allowed: none"),
        ("POST", f"/v1/generations/{NOBODYS}/cancel?status=failed", "allowed: none"),
        ("GET", f"/v1/generations/{NOBODYS}/events?status=failed", "allowed: previews"),
        ("GET", f"/v1/generations/{NOBODYS}/images/0?status=failed", "allowed: expires, signature"),
        ("GET", "/v1/models?status=failed", "allowed: none"),
        ("GET", "/v1/models/tiny?status=failed", "allowed: none"),
    ],
)
async def test_unknown_parameter_is_422_and_named(served: httpx.AsyncClient, method: str, path: str, text: str) -> None:
    answer = await served.request(method, path, json=LARGE_ASKED if method == "POST" else None)
    field = "cursr" if "cursr" in path else "status"
    assert text in assert_refused(answer, 422, "invalid_field", field)


@pytest.mark.parametrize("path", ["/v1", "/v1/generations/", "/docs", "/redoc", "/v2/generations", "/%ff%fe"])
async def test_unknown_path_is_404(client: httpx.AsyncClient, path: str) -> None:
    assert_refused(await client.get(path), 404, "not_found", None)


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("PUT", "/v1/generations", "GET, POST"),
        ("PATCH", "/v1/generations/gen_1", "DELETE, GET"),
        ("GET", "/v1/generations/gen_1/cancel", "POST"),
        ("POST", "/v1/models", "GET, HEAD"),
        ("BREW", "/healthz", "GET, HEAD"),
    ],
)
async def test_wrong_method_is_405_and_says_what_is_allowed(
    client: httpx.AsyncClient, method: str, path: str, allowed: str
) -> None:
    answer = await client.request(method, path)
    message = assert_refused(answer, 405, "method_not_allowed", None)
    assert message.endswith(f"allowed: {allowed}")
    assert answer.headers["allow"] == allowed


async def test_unknown_model_page_is_404(served: httpx.AsyncClient) -> None:
    assert_refused(await served.get("/v1/models/sd4"), 404, "unknown_model", "model")


async def test_full_queue_is_429_with_retry_after(settings: GatewaySettings, worker: FakeWorker) -> None:
    worker.stop()
    small = GatewaySettings(**settings.model_dump() | {"queue_bound": 1})
    app = create_app(small)
    async with app.router.lifespan_context(app), client_of(app) as client:
        assert (await client.post("/v1/generations", json=LARGE_ASKED)).status_code == 202
        answer = await client.post("/v1/generations", json=LARGE_ASKED)
    assert_refused(answer, 429, "queue_full", None)
    assert int(answer.headers["retry-after"]) > 0


async def test_failure_of_ours_is_500_without_detail(
    settings: GatewaySettings, log_lines: io.StringIO, worker: FakeWorker
) -> None:
    class Broken(JobQueue):
        async def submit(self, job: Job, **_options: Any) -> Accepted:
            raise ValueError("secret detail")

    queue = Broken.connect(settings)
    async with client_of(create_app(settings, queue, log=make_log("json", log_lines))) as client:
        answer = await client.post("/v1/generations", json=LARGE_ASKED)
    await queue.close()
    message = assert_refused(answer, 500, "internal_error", None)
    assert "secret" not in message
    assert "secret detail" in log_lines.getvalue()
    assert answer.headers["x-request-id"] in log_lines.getvalue()


def test_every_error_of_the_tree_has_a_status() -> None:
    def below(kind: type[DarkroomError]) -> list[type[DarkroomError]]:
        return [kind, *(deeper for child in kind.__subclasses__() for deeper in below(child))]

    ours = [kind for kind in below(DarkroomError) if kind.__module__ in {"app.errors", "worker.contract.errors"}]
    assert {kind.__name__ for kind in ours} - {kind.__name__ for kind in STATUS} == set()


def test_status_of_an_error_without_its_own_is_its_ancestors() -> None:
    class Stranger(DarkroomError):
        pass

    assert status_of(Stranger()) == 500


def test_shown_value_is_short_and_encodable() -> None:
    assert repr(Shown({"a": "x" * 500})).startswith('{"a": "xxx')
    assert len(repr(Shown("x" * 500))) < 100
    assert repr(Shown(object())) == "object"
    assert shortened("\ud800") == "?"


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.sampled_from([*GenerationCreate.model_fields, "foo", ""])
LIKELY = st.sampled_from(["sd3.5-large", "tiny", "euler", "png", "none", "low", 1, 4, 64, 512, 1024, 1.5, None])
BODIES = st.fixed_dictionaries(
    {}, optional={"model": st.just("sd3.5-large") | VALUES, "prompt": st.text(min_size=1, max_size=20) | VALUES}
).flatmap(lambda base: st.dictionaries(FIELDS, LIKELY | VALUES, max_size=4).map(lambda more: more | base))


@given(body=BODIES | VALUES)
@hypothesis_settings(
    max_examples=100, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_json_is_accepted_or_refused_in_the_one_shape(refuser: Any, body: Any) -> None:
    answer = refuser(json.dumps(body))
    if answer.status_code != 202:
        error = answer.json()["error"]
        assert answer.status_code in {404, 422}
        assert set(error) == {"code", "message", "field", "request_id"}
        assert 0 < len(error["message"]) < 500


@given(body=st.binary(max_size=60))
@hypothesis_settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_bytes_are_refused_in_the_one_shape(refuser: Any, body: bytes) -> None:
    answer = refuser(body)
    assert answer.status_code in {400, 422}
    assert set(answer.json()["error"]) == {"code", "message", "field", "request_id"}


@pytest.fixture
def refuser(settings: GatewaySettings, worker: FakeWorker) -> Any:
    """Posts bodies to a gateway whose queue takes all and keeps nothing; with a portal, as hypothesis is not async."""

    class Sink(JobQueue):
        async def cards(self) -> Any:
            return {"sd3.5-large": LARGE}

        async def submit(self, job: Job, **_options: Any) -> Accepted:
            return Accepted(job.id, 0, replayed=False)

    with asyncio.Runner() as runner:
        queue = Sink.connect(settings)
        app = create_app(settings, queue)

        async def post(body: str | bytes) -> httpx.Response:
            async with client_of(app) as client:
                return await client.post("/v1/generations", content=body, headers=JSON)

        yield lambda body: runner.run(post(body))
        runner.run(queue.close())


@given(
    width=st.integers(1, 4000), height=st.integers(1, 4000), steps=st.integers(1, 200), scale=st.floats(0, 30, width=32)
)
@hypothesis_settings(max_examples=200, deadline=None, derandomize=True)
def test_resolved_job_is_within_the_limits_of_its_card(width: int, height: int, steps: int, scale: float) -> None:
    create = GenerationCreate(
        model="sd3.5-large", prompt="x", width=width, height=height, steps=steps, guidance_scale=scale
    )
    within = (
        width % 16 == height % 16 == 0
        and 64 <= min(width, height) <= max(width, height) <= 3072
        and 262_144 <= width * height <= 2_097_152
        and steps <= 100
        and scale <= 20
    )
    try:
        job = resolve(create, LARGE, ContractSettings(), request_id="")
    except DarkroomError as error:
        refused: DarkroomError | None = error
    else:
        refused = None
        assert (job.params.width, job.params.height) == (width, height)
    assert (refused is None) == within
