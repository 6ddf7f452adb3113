"""OpenAI's own client against a gateway on a port; nothing of it is changed but base url and key."""

from __future__ import annotations

import asyncio
import io
import threading
import time
from base64 import b64decode
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from PIL import Image

from app.settings import GatewaySettings
from tests.app.dialects.conftest import Live
from tests.app.dialects.painter import Painter
from tests.processes import wait_until as wait_for
from worker.contract.errors import QueueUnavailable
from worker.contract.job import Failure, JobView
from worker.contract.queue import JobQueue

PROMPT = "a red circle"


@pytest.fixture
def client(live: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{live.url}/openai/v1", api_key="any") as client:
        yield client


@pytest.fixture
def lonely(alone: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{alone.url}/openai/v1", api_key="any") as client:
        yield client


def size_of(b64: str | None) -> tuple[int, int, str | None]:
    with Image.open(io.BytesIO(b64decode(b64 or ""))) as picture:
        return (*picture.size, picture.format)


def test_generate_answers_with_base64_of_the_picture(client: openai.OpenAI) -> None:
    answer = client.images.generate(model="tiny", prompt=PROMPT)
    assert answer.data is not None
    assert size_of(answer.data[0].b64_json) == (64, 64, "PNG")
    assert answer.data[0].url is None
    assert (answer.size, answer.quality, answer.output_format, answer.background) == (
        "64x64",
        "medium",
        "png",
        "opaque",
    )
    assert abs(answer.created - time.time()) < 60


def test_generate_gives_several_pictures_in_the_format_asked_for(client: openai.OpenAI) -> None:
    answer = client.images.generate(model="tiny", prompt=PROMPT, n=2, output_format="webp", output_compression=50)
    assert [size_of(image.b64_json) for image in answer.data or []] == [(64, 64, "WEBP")] * 2


def test_generate_gives_urls_that_can_be_fetched(client: openai.OpenAI) -> None:
    answer = client.images.generate(model="tiny", prompt=PROMPT, response_format="url")
    assert answer.data is not None
    fetched = httpx.get(answer.data[0].url or "", trust_env=False)
    assert (fetched.status_code, fetched.headers["content-type"]) == (200, "image/png")


def test_generate_for_dall_e_gives_urls_unless_told_otherwise(client: openai.OpenAI) -> None:
    url = client.images.generate(model="dall-e-3", prompt=PROMPT, size="1024x1024").data
    b64 = client.images.generate(model="dall-e-3", prompt=PROMPT, response_format="b64_json").data
    assert url is not None
    assert url[0].url
    assert not url[0].b64_json
    assert b64 is not None
    assert b64[0].b64_json
    assert not b64[0].url


def test_generate_passes_on_what_extra_body_asks_for(client: openai.OpenAI, live: Live) -> None:
    extra = {"negative_prompt": "squares", "seed": 7, "num_inference_steps": 5, "guidance_scale": 2.5, "unknown": 1}
    answer = client.images.generate(model="tiny", prompt=PROMPT, user="me", style="vivid", extra_body=extra)
    params = live.jobs()[0]["params"]
    assert (params["negative_prompt"], params["seed"], params["steps"], params["guidance_scale"]) == (
        "squares",
        7,
        5,
        2.5,
    )
    assert answer.data is not None
    assert answer.data[0].seed == 7  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("asked", "made"),
    [
        ("auto", "1024x1024"),
        ("256x256", "512x512"),
        ("1024x1024", "1024x1024"),
        ("1536x1024", "1536x1024"),
        ("1792x1024", "1792x1024"),
        ("1344x768", "1344x768"),
    ],
)
def test_generate_makes_the_size_or_the_nearest_to_a_usual_one(client: openai.OpenAI, asked: str, made: str) -> None:
    answer = client.images.generate(model="sd3.5-large", prompt=PROMPT, size=asked, output_format="jpeg")
    assert answer.size == made
    assert answer.data is not None
    assert "x".join(map(str, size_of(answer.data[0].b64_json)[:2])) == made


@pytest.mark.parametrize(
    ("model", "quality", "steps"),
    [
        ("sd3.5-large", "auto", 28),
        ("sd3.5-large", "low", 14),
        ("sd3.5-large", "hd", 42),
        ("sd3.5-large", "max", 84),
        ("sd3.5-large-turbo", "low", 4),
        ("sd3.5-large-turbo", "high", 6),
    ],
)
def test_generate_takes_more_steps_for_more_quality(
    client: openai.OpenAI, live: Live, model: str, quality: Any, steps: int
) -> None:
    client.images.generate(model=model, prompt=PROMPT, quality=quality)
    assert live.jobs()[0]["params"]["steps"] == steps


def test_generate_for_an_unknown_model_takes_the_operators_default(settings: GatewaySettings, worker: Painter) -> None:
    with Live(settings.model_copy(update={"default_model": "tiny"})) as live:
        with openai.OpenAI(base_url=f"{live.url}/openai/v1", api_key="any") as client:
            client.images.generate(model="gpt-image-2", prompt=PROMPT)
            client.images.generate(prompt=PROMPT)
        assert [job["model"] for job in live.jobs()] == ["tiny", "tiny"]


async def test_async_client_generates_at_deepinfras_base_url(live: Live) -> None:
    async with openai.AsyncOpenAI(base_url=f"{live.url}/v1/openai", api_key="any") as client:
        one, other = await asyncio.gather(
            client.images.generate(model="tiny", prompt=PROMPT), client.images.generate(model="tiny", prompt="other")
        )
    assert one.data is not None
    assert other.data is not None
    assert size_of(one.data[0].b64_json) == size_of(other.data[0].b64_json) == (64, 64, "PNG")


def test_models_are_listed_and_found_by_their_vendors_names(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["sd3.5-large", "sd3.5-large-turbo", "tiny"]
    assert client.models.retrieve("stabilityai/stable-diffusion-3.5-large").object == "model"
    with pytest.raises(openai.NotFoundError, match=r"known models: sd3\.5-large") as caught:
        client.models.retrieve("gpt-image-2")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


def test_stream_gives_previews_and_then_the_picture(lonely: openai.OpenAI, worker: Painter) -> None:
    worker.previews = True
    with lonely.images.generate(
        model="tiny", prompt=PROMPT, stream=True, partial_images=2, extra_body={"steps": 10}
    ) as stream:
        events = list(stream)
    *partials, completed = events
    assert [event.type for event in partials] == ["image_generation.partial_image"] * len(partials)
    assert 1 <= len(partials) <= 2
    for index, partial in enumerate(partials):
        assert (getattr(partial, "partial_image_index", None), partial.size) == (index, "8x8")
        assert (size_of(partial.b64_json), partial.output_format) == ((8, 8, "JPEG"), "jpeg")
    assert completed.type == "image_generation.completed"
    assert size_of(completed.b64_json) == (64, 64, "PNG")
    assert (completed.size, completed.usage.total_tokens) == ("64x64", 0)


async def test_async_stream_without_partial_images_gives_each_picture(live: Live) -> None:
    async with openai.AsyncOpenAI(base_url=f"{live.url}/openai/v1", api_key="any") as client:
        stream = await client.images.generate(model="tiny", prompt=PROMPT, n=2, stream=True)
        assert [event.type async for event in stream] == ["image_generation.completed"] * 2


def test_stream_of_a_job_that_fails_raises_what_went_wrong(settings: GatewaySettings) -> None:
    with (
        Painter(settings, Failure(code="out_of_memory", message="the GPU is full")),
        Live(settings) as live,
        openai.OpenAI(base_url=f"{live.url}/openai/v1", api_key="any") as client,
        client.images.generate(model="tiny", prompt=PROMPT, stream=True) as stream,
        pytest.raises(openai.APIError, match="the GPU is full"),
    ):
        list(stream)


def test_stream_is_canceled_when_its_client_goes_away(lonely: openai.OpenAI, alone: Live, worker: Painter) -> None:
    worker.go_on.clear()
    with lonely.images.generate(model="tiny", prompt=PROMPT, stream=True):
        pass
    wait_for(lambda: [job["status"] for job in alone.jobs()] == ["canceled"])
    wait_for(lambda: not alone.app.state.gateway.queue._events._following)


@pytest.mark.parametrize(
    ("asked", "param", "text"),
    [
        ({"n": 3}, "n", "n is 3; allowed: 1 to 2"),
        ({"n": 11}, "n", "n is 11; allowed: a whole number from 1 to 4"),
        ({"size": "1000x1000"}, "size", 'size is "1000x1000"; allowed: a multiple of 16'),
        ({"size": "large"}, "size", 'size is "large"; allowed: "auto", or width and height as "1024x768"'),
        ({"background": "transparent"}, "background", "allowed: opaque, auto"),
        ({"output_format": "gif"}, "output_format", "allowed: png, jpeg, webp"),
        ({"extra_body": {"guidance_scale": 21}}, "guidance_scale", "guidance_scale is 21.0; allowed: 0 to 20"),
        (
            {"extra_body": {"num_inference_steps": 11}},
            "num_inference_steps",
            "num_inference_steps is 11; allowed: 1 to 10",
        ),
        ({"extra_body": {"seed": -1}}, "seed", "seed is -1; allowed: a whole number from 0"),
        ({"prompt": ""}, "prompt", "prompt is missing; allowed: text"),
    ],
)
def test_wrong_field_is_a_bad_request_under_the_name_it_was_sent(
    client: openai.OpenAI, asked: dict[str, Any], param: str, text: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(**({"model": "tiny", "prompt": PROMPT} | asked))
    assert (caught.value.param, caught.value.code, caught.value.type) == (
        param,
        "invalid_value",
        "invalid_request_error",
    )
    assert text in caught.value.message
    assert caught.value.request_id


def test_pictures_from_pictures_are_refused(client: openai.OpenAI, live: Live) -> None:
    with pytest.raises(openai.BadRequestError, match="images/edits is not served here; served: images/generations"):
        client.images.edit(image=b"png", prompt=PROMPT)
    answer = httpx.post(f"{live.url}/openai/v1/images/variations", files={"image": b"png"}, trust_env=False)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "not_served")


def test_other_calls_are_not_found_in_the_same_shape(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="nothing at /openai/v1/chat/completions"):
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "hello"}])


def test_failed_job_is_told_and_not_tried_again(settings: GatewaySettings) -> None:
    with (
        Painter(settings, Failure(code="out_of_memory", message="the GPU is full")),
        Live(settings) as live,
        openai.OpenAI(base_url=f"{live.url}/openai/v1", api_key="any", max_retries=2) as client,
    ):
        with pytest.raises(openai.InternalServerError, match="the GPU is full") as caught:
            client.images.generate(model="tiny", prompt=PROMPT)
        assert caught.value.code == "out_of_memory"
        assert len(live.jobs()) == 1


def test_try_that_runs_out_of_time_leaves_its_job_to_the_next_try(
    lonely: openai.OpenAI, alone: Live, worker: Painter
) -> None:
    worker.go_on.clear()
    release = threading.Timer(1.5, worker.go_on.set)  # in the second or third try
    release.start()
    answer = lonely.with_options(timeout=0.7, max_retries=5).images.generate(model="tiny", prompt=PROMPT)
    release.join()
    assert answer.data is not None
    assert [job["status"] for job in alone.jobs()] == ["succeeded"]


def test_try_that_nobody_repeats_is_canceled(lonely: openai.OpenAI, alone: Live, worker: Painter) -> None:
    worker.go_on.clear()
    with pytest.raises(openai.APITimeoutError):
        lonely.with_options(timeout=0.5, max_retries=0).images.generate(model="tiny", prompt=PROMPT)
    wait_for(lambda: [job["status"] for job in alone.jobs()] == ["canceled"])


def test_two_that_ask_for_the_same_get_a_picture_each(lonely: openai.OpenAI, alone: Live) -> None:
    for _ in range(2):
        lonely.images.generate(model="tiny", prompt=PROMPT)
    assert len({job["id"] for job in alone.jobs()}) == 2


def test_idempotency_key_makes_one_job(lonely: openai.OpenAI, alone: Live) -> None:
    key = {"Idempotency-Key": "once"}
    answers = [lonely.images.generate(model="tiny", prompt=PROMPT, extra_headers=key) for _ in range(2)]
    assert answers[0].data == answers[1].data
    assert len(alone.jobs()) == 1


def test_picture_that_takes_longer_than_the_hold_is_given_up(settings: GatewaySettings, worker: Painter) -> None:
    worker.go_on.clear()
    with (
        Live(settings.model_copy(update={"hold_s": 1.0})) as live,
        openai.OpenAI(base_url=f"{live.url}/openai/v1", api_key="any") as client,
    ):
        with pytest.raises(openai.InternalServerError, match="not ready within 1 s") as caught:
            client.images.generate(model="tiny", prompt=PROMPT)
        assert (caught.value.status_code, len(live.jobs())) == (504, 1)
        wait_for(lambda: live.jobs()[0]["status"] in {"canceled", "failed"})


def test_job_that_nobody_can_follow_any_more_is_not_asked_for_again(settings: GatewaySettings, worker: Painter) -> None:
    class Vanishing(JobQueue):
        async def wait(self, *_: Any) -> JobView:
            raise QueueUnavailable

        async def cancel(self, *_: Any) -> JobView:
            raise QueueUnavailable

    worker.go_on.clear()
    settings = settings.model_copy(update={"hold_s": 1.0})
    with (
        Live(settings, Vanishing.connect(settings)) as live,
        openai.OpenAI(base_url=f"{live.url}/openai/v1", api_key="any") as client,
    ):
        with pytest.raises(openai.InternalServerError, match="the queue went away") as caught:
            client.images.generate(model="tiny", prompt=PROMPT)
        assert caught.value.response.headers["x-should-retry"] == "false"
        assert len(live.jobs()) == 1


def test_wait_that_would_be_too_long_is_refused_at_once(settings: GatewaySettings, worker: Painter) -> None:
    class Busy(JobQueue):
        async def expected_wait(self, *_: Any) -> float | None:
            return 1000

    with (
        Live(settings, Busy.connect(settings)) as live,
        openai.OpenAI(base_url=f"{live.url}/openai/v1", api_key="any") as client,
    ):
        with pytest.raises(openai.RateLimitError, match="would start in about 1000 s") as caught:
            client.images.generate(model="tiny", prompt=PROMPT)
        assert caught.value.response.headers["retry-after"] == "980"
        assert live.jobs() == []


def test_drained_gateway_leaves_a_held_job_to_a_retry_at_another(settings: GatewaySettings, worker: Painter) -> None:
    worker.go_on.clear()
    body, first = {"model": "tiny", "prompt": PROMPT}, {"x-stainless-retry-count": "0"}
    with Live(settings) as one, Live(settings) as other, httpx.Client(trust_env=False, timeout=20) as client:
        answers: list[httpx.Response] = []

        def ask() -> None:
            answers.append(client.post(f"{one.url}/openai/v1/images/generations", json=body, headers=first))

        asking = threading.Thread(target=ask)
        asking.start()
        wait_for(lambda: bool(worker.running))
        one.drain()
        asking.join(10)
        assert (answers[0].status_code, answers[0].headers["x-should-retry"]) == (503, "true")
        worker.go_on.set()
        again = client.post(
            f"{other.url}/openai/v1/images/generations", json=body, headers={"x-stainless-retry-count": "1"}
        )
        assert again.status_code == 200
        assert [job["status"] for job in other.jobs()] == ["succeeded"]


@pytest.mark.parametrize(
    ("asked", "made"),
    [
        ({"width": 128, "height": 96}, "128x96"),
        ({"aspect_ratio": "7:4"}, "112x64"),
    ],
)
def test_size_may_be_said_in_our_words(client: openai.OpenAI, live: Live, asked: dict[str, Any], made: str) -> None:
    answer = client.images.generate(model="tiny", prompt=PROMPT, extra_body=asked | {"cfg_scale": 2.5})
    assert answer.size == made
    assert live.jobs()[0]["params"]["guidance_scale"] == 2.5


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        ({"size": "64x64", "width": 128}, 'size is "64x64"; allowed: nothing beside width'),
        ({"width": 100, "height": 64}, "width is 100; allowed: a multiple of 16"),
        ({"cfg_scale": 99}, "cfg_scale is 99.0; allowed: 0 to 20"),
        ({"aspect_ratio": "wide"}, 'aspect_ratio is "wide"'),
    ],
)
def test_our_words_are_refused_under_their_own_names(client: openai.OpenAI, asked: dict[str, Any], text: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(model="tiny", prompt=PROMPT, extra_body=asked)
    assert text in caught.value.message


def test_answer_tells_the_model_that_drew_what_was_not_followed_and_no_usage(client: openai.OpenAI) -> None:
    extra = {"negative_prompt": "squares"}
    answer = client.images.generate(model="sd3.5-large-turbo", prompt=PROMPT, extra_body=extra)
    assert answer.model == "sd3.5-large-turbo"  # type: ignore[attr-defined]
    assert "negative_prompt" in answer.warnings[0]  # type: ignore[attr-defined]
    assert answer.usage is not None
    assert answer.usage.total_tokens == 0


def test_client_of_another_server_finds_the_pictures_below_v1(live: Live) -> None:
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="any") as client:
        assert size_of((client.images.generate(model="tiny", prompt=PROMPT).data or [])[0].b64_json)[:2] == (64, 64)
        with pytest.raises(openai.BadRequestError, match="n is 99") as caught:
            client.images.generate(model="tiny", prompt=PROMPT, n=99)
    assert caught.value.param == "n"


def test_deepinfras_path_stands_in_for_no_model(live: Live) -> None:
    with openai.OpenAI(base_url=f"{live.url}/v1/openai", api_key="any") as client:
        with pytest.raises(openai.NotFoundError, match="FLUX"):
            client.images.generate(model="black-forest-labs/FLUX-1-schnell", prompt=PROMPT)
        assert client.images.generate(model="darkroom/tiny", prompt=PROMPT).size == "64x64"


def test_job_that_cannot_be_done_in_time_says_why(settings: GatewaySettings) -> None:
    why = "the deadline cannot be met: 4.0 s are left, at least 31.4 s are needed"
    with (
        Painter(settings, failure=Failure(code="deadline_exceeded", message=why)),
        Live(settings) as live,
        openai.OpenAI(base_url=f"{live.url}/openai/v1", api_key="any", max_retries=0) as client,
        pytest.raises(openai.InternalServerError, match=why) as caught,
    ):
        client.images.generate(model="tiny", prompt=PROMPT)
    assert caught.value.status_code == 504
