"""API keys through vendors' clients: refusals in the vendor's shape, own jobs only, urls that need no key."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError

from app.settings import GatewaySettings
from tests.app.dialects.conftest import Live
from tests.app.dialects.painter import Painter
from tests.app.dialects.shapes import (
    assert_deepinfra,
    assert_huggingface,
    assert_openai,
    assert_replicate,
    assert_stability,
)
from worker.contract.keys import Keyring, new_key

PROMPT = "a red circle"


@pytest.fixture
def guarded(settings: GatewaySettings, worker: Painter) -> Iterator[Live]:
    """A gateway on a port that asks for keys."""
    with Live(settings.model_copy(update={"auth": "on"})) as live:
        yield live


@pytest.fixture
def key(settings: GatewaySettings) -> str:
    with Keyring.connect(settings) as keyring:
        key, text = new_key("test")
        keyring.add(key)
    return text


def ask(live: Live, path: str, key: str, **request: Any) -> httpx.Response:
    return httpx.post(live.url + path, headers={"authorization": f"Bearer {key}"}, trust_env=False, **request)


def test_wrong_key_is_told_in_each_vendors_shape(guarded: Live) -> None:
    with (
        openai.OpenAI(base_url=f"{guarded.url}/openai/v1", api_key="sk-wrong") as client,
        pytest.raises(openai.AuthenticationError) as caught,
    ):
        client.images.generate(model="tiny", prompt=PROMPT)
    assert (caught.value.code, caught.value.status_code) == ("invalid_api_key", 401)
    with pytest.raises(HfHubHTTPError, match="401"):
        InferenceClient(model=f"{guarded.url}/huggingface/tiny", token="hf_wrong").text_to_image(PROMPT)
    stability = ask(guarded, "/v2beta/stable-image/generate/sd3", "sk-wrong", files={"none": ""})
    assert (stability.status_code, stability.json()["name"]) == (401, "unauthorized")
    deepinfra = ask(guarded, "/v1/inference/tiny", "wrong", json={"prompt": PROMPT})
    assert (deepinfra.status_code, deepinfra.json().keys()) == (401, {"detail"})


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v2beta/stable-image/generate/sd3"),
        ("POST", "/v2beta/stable-image/upscale/fast"),
        ("GET", "/v2beta/results/gen_1"),
        ("POST", "/openai/v1/images/generations"),
        ("POST", "/openai/v1/images/edits"),
        ("GET", "/openai/v1/models"),
        ("GET", "/openai/v1/models/tiny"),
        ("POST", "/v1/inference/tiny"),
        ("POST", "/huggingface/tiny"),
    ],
)
def test_no_call_is_answered_without_a_key(guarded: Live, method: str, path: str) -> None:
    assert httpx.request(method, guarded.url + path, trust_env=False).status_code == 401


def test_right_key_gets_pictures_and_urls_that_need_no_key(guarded: Live, key: str) -> None:
    with openai.OpenAI(base_url=f"{guarded.url}/openai/v1", api_key=key) as client:
        answer = client.images.generate(model="tiny", prompt=PROMPT, response_format="url")
    assert answer.data is not None
    url = answer.data[0].url or ""
    assert "signature=" in url
    assert httpx.get(url, trust_env=False).headers["content-type"] == "image/png"
    assert httpx.get(url.partition("?")[0], trust_env=False).status_code == 401


@pytest.mark.parametrize(
    ("path", "request_", "check", "words"),
    [
        ("/openai/v1/images/generations", {"json": {"prompt": PROMPT}}, assert_openai, '"type":"rate_limit_error"'),
        ("/v1/openai/images/generations", {"json": {"prompt": PROMPT}}, assert_openai, '"type":"rate_limit_error"'),
        ("/v1/inference/tiny", {"json": {"prompt": PROMPT}}, assert_deepinfra, "more than 1/minute requests"),
        ("/huggingface/tiny", {"json": {"inputs": PROMPT}}, assert_huggingface, '"error_type":"rate_limited"'),
        (
            "/v1/models/darkroom/tiny/predictions",
            {"json": {"input": {"prompt": PROMPT}}},
            assert_replicate,
            "throttled",
        ),
        (
            "/v2beta/stable-image/generate/sd3",
            {"files": {"prompt": (None, PROMPT), "model": (None, "tiny")}},
            assert_stability,
            '"id":"rate_limit_exceeded","name":"rate_limit_exceeded"',
        ),
    ],
)
def test_key_that_asks_too_often_is_told_in_each_vendors_shape(
    guarded: Live,
    settings: GatewaySettings,
    path: str,
    request_: dict[str, Any],
    check: Callable[[httpx.Response], None],
    words: str,
) -> None:
    with Keyring.connect(settings) as keyring:
        limited, text = new_key("limited", rate="1/minute")
        keyring.add(limited)
    assert ask(guarded, path, text, **request_).status_code in {200, 201}
    refused = ask(guarded, path, text, **request_)
    assert refused.status_code == 429
    check(refused)
    assert words in refused.text
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert refused.headers.get("x-should-retry", "true") == "true"


def test_result_of_another_key_is_not_found(guarded: Live, settings: GatewaySettings, key: str) -> None:
    with Keyring.connect(settings) as keyring:
        second, other = new_key("other")
        keyring.add(second)
    files = {"prompt": (None, PROMPT), "model": (None, "tiny")}
    headers = {"authorization": f"Bearer {key}", "prefer": "respond-async"}
    url = f"{guarded.url}/v2beta/stable-image/generate/sd3"
    accepted = httpx.post(url, files=files, headers=headers, trust_env=False).json()["id"]
    result = f"{guarded.url}/v2beta/results/{accepted}"
    assert httpx.get(result, headers={"authorization": f"Bearer {other}"}, trust_env=False).status_code == 404
    assert httpx.get(result, headers={"authorization": f"Bearer {key}"}, trust_env=False).status_code in {200, 202}
