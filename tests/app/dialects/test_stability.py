"""Stability's API, asked as its clients ask it: recorded requests, byte for byte."""

from __future__ import annotations

import http.client
import io
import json
from base64 import b64decode
from dataclasses import replace
from typing import Any

import httpx
import pytest
from PIL import Image

from app.dialects.call import warnings_header
from app.settings import GatewaySettings
from model.params import GenerationParams
from tests.app.dialects.conftest import Live
from tests.app.dialects.painter import Painter, picture_of
from tests.app.dialects.shapes import assert_stability
from tests.app.fake_worker import LARGE
from tests.processes import wait_until
from worker.contract.job import Failure, Job, JobView

SD3 = "/v2beta/stable-image/generate/sd3"

PYTHON_SAMPLE = (
    b'--8a1f3c\r\nContent-Disposition: form-data; name="prompt"\r\n\r\nLighthouse on a cliff overlooking the ocean\r\n'
    b'--8a1f3c\r\nContent-Disposition: form-data; name="output_format"\r\n\r\njpeg\r\n'
    b'--8a1f3c\r\nContent-Disposition: form-data; name="none"; filename="none"\r\n\r\n\r\n'
    b"--8a1f3c--\r\n"
)
"""Of the sample in Stability's reference, sent by `requests` with `files={"none": ""}`."""

NODE_SDK = (
    b'----------------------------5213\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na red circle\r\n'
    b'----------------------------5213\r\nContent-Disposition: form-data; name="mode"\r\n\r\ntext-to-image\r\n'
    b'----------------------------5213\r\nContent-Disposition: form-data; name="model"\r\n\r\nsd3-turbo\r\n'
    b'----------------------------5213\r\nContent-Disposition: form-data; name="seed"\r\n\r\n17\r\n'
    b"----------------------------5213--\r\n"
)
"""Of npm's stability-ai, which names models as they were called in 2024."""


def sent(live: Live, body: bytes, **headers: str) -> tuple[http.client.HTTPResponse, bytes]:
    connection = http.client.HTTPConnection(live.url.removeprefix("http://"), timeout=20)
    try:
        connection.request("POST", SD3, body, {name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        return answer, answer.read()
    finally:
        connection.close()


def post(live: Live, path: str = SD3, accept: str = "image/*", timeout: float = 20, **form: Any) -> httpx.Response:
    parts = {name: (None, str(value)) for name, value in ({"prompt": "a red circle", "model": "tiny"} | form).items()}
    return httpx.post(
        live.url + path,
        files=parts,
        headers={"authorization": "Bearer sk-any", "accept": accept},
        trust_env=False,
        timeout=timeout,
    )


def assert_refused(answer: httpx.Response, status: int, name: str, text: str) -> None:
    said = answer.json()
    assert (answer.status_code, said["name"]) == (status, name), said
    assert said.keys() == {"id", "name", "errors"}
    assert said["id"] == answer.headers["x-request-id"].removeprefix("req_").zfill(32)
    assert len(said["errors"]) == 1
    assert text in said["errors"][0]


def test_python_sample_gets_the_bytes_of_a_picture(live: Live) -> None:
    answer, body = sent(
        live,
        PYTHON_SAMPLE,
        Authorization="Bearer sk-any",
        Accept="image/*",
        Content_Type="multipart/form-data; boundary=8a1f3c",
    )
    assert (answer.status, answer.headers["content-type"], answer.headers["finish-reason"]) == (
        200,
        "image/jpeg",
        "SUCCESS",
    )
    assert Image.open(io.BytesIO(body)).size == (1024, 1024)
    assert int(answer.headers["seed"]) == live.jobs()[0]["seeds"][0]
    assert answer.headers["x-request-id"]
    assert live.jobs()[0]["model"] == "sd3.5-large"


def test_node_sdk_gets_json_that_names_the_picture_type(live: Live) -> None:
    answer, body = sent(
        live,
        NODE_SDK,
        Accept="application/json",
        Content_Type="multipart/form-data; boundary=--------------------------5213",
    )
    said = json.loads(body)
    assert (answer.status, answer.headers["content-type"]) == (200, "application/json; type=image/png")
    assert "seed" not in answer.headers
    assert "finish-reason" not in answer.headers
    assert (said["seed"], said["finish_reason"], said.keys()) == (17, "SUCCESS", {"image", "seed", "finish_reason"})
    assert Image.open(io.BytesIO(b64decode(said["image"]))).format == "PNG"
    assert live.jobs()[0]["model"] == "sd3.5-large-turbo"


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        ("image/*", "image/webp"),
        ("*/*", "image/webp"),
        ("application/json; type=image/png", "application/json; type=image/webp"),
        ("text/html, Application/JSON", "application/json; type=image/webp"),
    ],
)
def test_accept_decides_between_bytes_and_json(live: Live, accept: str, kind: str) -> None:
    answer = post(live, accept=accept, output_format="webp")
    assert (answer.status_code, answer.headers["content-type"]) == (200, kind)


@pytest.mark.parametrize(
    ("asked", "model"),
    [
        ("sd3.5-large", "sd3.5-large"),
        ("sd3.5-large-turbo", "sd3.5-large-turbo"),
        ("sd3-large", "sd3.5-large"),
        ("sd3-large-turbo", "sd3.5-large-turbo"),
        ("sd3", "sd3.5-large"),
        ("", "sd3.5-large"),
    ],
)
def test_models_answer_to_all_their_names(live: Live, asked: str, model: str) -> None:
    assert post(live, model=asked).status_code == 200
    assert live.jobs()[0]["model"] == model


@pytest.mark.parametrize(
    ("aspect_ratio", "size"), [("21:9", (1536, 640)), ("3:2", (1216, 832)), ("4:5", (896, 1088)), ("9:16", (768, 1344))]
)
def test_aspect_ratio_gives_about_a_megapixel(live: Live, aspect_ratio: str, size: tuple[int, int]) -> None:
    answer = post(live, model="sd3.5-large", aspect_ratio=aspect_ratio)
    assert Image.open(io.BytesIO(answer.content)).size == size


def test_aspect_ratio_of_a_small_model_gives_its_own_area(live: Live) -> None:
    width, height = Image.open(io.BytesIO(post(live, aspect_ratio="3:2").content)).size
    assert (width, height) == (80, 64) or width * height <= 8192


def test_fields_are_passed_on(live: Live) -> None:
    form = {"negative_prompt": "squares", "seed": "4294967294", "cfg_scale": "2.5", "style_preset": "pixel-art"}
    answer = post(live, **form)
    params = live.jobs()[0]["params"]
    assert answer.headers["seed"] == "4294967294"
    assert (params["negative_prompt"], params["seed"], params["guidance_scale"]) == ("squares", 4294967294, 2.5)
    assert params["prompt"] == "a red circle, pixel art"


def test_seed_0_is_random(live: Live) -> None:
    assert post(live, seed=0).headers["seed"] != post(live, seed="0").headers["seed"]


@pytest.mark.parametrize("service", ["core", "ultra"])
def test_core_and_ultra_are_answered_by_large(live: Live, service: str) -> None:
    assert post(live, f"/v2beta/stable-image/generate/{service}").status_code == 200
    assert live.jobs()[0]["model"] == "sd3.5-large"


@pytest.mark.parametrize(
    ("form", "text"),
    [
        ({"prompt": ""}, "prompt: is missing; allowed: text of 1 to 10,000 characters"),
        ({"prompt": "x" * 10_001}, "allowed: text of 1 to 10,000 characters"),
        ({"aspect_ratio": "2:1"}, "allowed: 21:9, 16:9"),
        ({"model": "sd4"}, "known models: sd3.5-large"),
        ({"model": "sd3.5-flash"}, 'model: is "sd3.5-flash"; allowed: known models: sd3.5-large'),
        ({"seed": 4294967295}, "allowed: a whole number from 0 to 4294967294; 0: random"),
        ({"seed": "lucky"}, 'seed: is "lucky"'),
        ({"output_format": "gif"}, "allowed: png, jpeg, webp"),
        ({"style_preset": "cubism"}, "allowed: 3d-model, analog-film"),
        ({"cfg_scale": 11}, "allowed: a number from 1 to 10"),
        ({"mode": "image-to-image"}, "pictures from pictures are not served yet"),
        ({"strength": "0.5"}, "pictures from pictures are not served yet"),
    ],
)
def test_wrong_field_is_a_bad_request(live: Live, form: dict[str, Any], text: str) -> None:
    assert_refused(post(live, **form), 400, "bad_request", text)


@pytest.mark.parametrize("request_id", ["mine", "0" * 32, "x" * 128])
def test_error_has_an_id_of_32_digits_whatever_the_client_calls_its_request(live: Live, request_id: str) -> None:
    headers = {"x-request-id": request_id}
    answer = httpx.post(live.url + SD3, files={"none": ""}, headers=headers, trust_env=False)
    assert_stability(answer)
    assert answer.headers["x-request-id"] == request_id


def test_picture_as_input_is_refused(live: Live) -> None:
    files = {"prompt": (None, "x"), "image": ("in.png", picture_of(64, 64, "png"), "image/png")}
    answer = httpx.post(live.url + SD3, files=files, trust_env=False)
    assert_refused(answer, 400, "bad_request", "pictures from pictures are not served yet")


@pytest.mark.parametrize(
    ("content", "kind", "text"),
    [
        (b'{"prompt": "x"}', "application/json", "allowed: multipart/form-data"),
        (b"x", None, "the request has no content-type; allowed: multipart/form-data"),
        (b"x", "multipart/form-data", "the body is not a valid form"),
        (b"--b\r\n\xff: x\r\n", "multipart/form-data; boundary=b", "the body is not a valid form"),
        (b"--b--\r\n", "multipart/form-data; boundary=b", "prompt: is missing"),
    ],
)
def test_body_that_is_no_form_is_a_bad_request(live: Live, content: bytes, kind: str | None, text: str) -> None:
    headers = {"content-type": kind} if kind else {}
    assert_refused(
        httpx.post(live.url + SD3, content=content, headers=headers, trust_env=False), 400, "bad_request", text
    )


@pytest.mark.parametrize("charset", ["punycode", '"PunyCode"', "utf-7", "idna", "unicode_escape", "rot13", "none"])
def test_charset_that_a_form_does_not_need_is_refused(live: Live, charset: str) -> None:
    headers = {"content-type": f"multipart/form-data; boundary=8a1f3c; charset={charset}"}
    answer = httpx.post(live.url + SD3, content=PYTHON_SAMPLE, headers=headers, trust_env=False)
    assert_refused(answer, 400, "bad_request", f'charset is "{charset.strip(chr(34))}"; allowed: utf-8, us-ascii, iso-')


@pytest.mark.parametrize(
    ("charset", "text"),
    [("utf-8", "café"), ("UTF-8", "café"), ('"utf-8"', "café"), ("us-ascii", "cafe"), ("ISO-8859-1", "café")],
)
def test_charset_of_a_form_is_followed(live: Live, charset: str, text: str) -> None:
    form = PYTHON_SAMPLE.replace(b"Lighthouse", text.encode(charset.strip('"')))
    headers = {"content-type": f"multipart/form-data; boundary=8a1f3c; charset={charset}"}
    assert httpx.post(live.url + SD3, content=form, headers=headers, trust_env=False).status_code == 200
    assert live.jobs()[0]["params"]["prompt"] == f"{text} on a cliff overlooking the ocean"


def test_charset_that_a_part_names_is_not_followed(live: Live) -> None:
    part = b'name="prompt"\r\nContent-Type: text/plain; charset=punycode\r\n\r\nLighthouse'
    form = PYTHON_SAMPLE.replace(b'name="prompt"\r\n\r\nLighthouse', part)
    headers = {"content-type": "multipart/form-data; boundary=8a1f3c"}
    assert httpx.post(live.url + SD3, content=form, headers=headers, trust_env=False).status_code == 200
    assert live.jobs()[0]["params"]["prompt"] == "Lighthouse on a cliff overlooking the ocean"


def test_what_is_not_served_is_said_in_the_same_shape(live: Live) -> None:
    upscale = post(live, "/v2beta/stable-image/upscale/creative")
    assert_refused(
        upscale, 400, "bad_request", "stable-image/upscale/creative is not served here; served: stable-image"
    )
    assert_refused(post(live, "/v2beta/stable-image/generate/sd9"), 400, "bad_request", "served: sd3, core, ultra")
    unknown = httpx.get(f"{live.url}/v2beta/results/{'a' * 64}", trust_env=False)
    assert_refused(unknown, 404, "not_found", "no generation")


def test_failed_job_is_told(settings: GatewaySettings) -> None:
    with Painter(settings, Failure(code="out_of_memory", message="the GPU is full")), Live(settings) as live:
        assert_refused(post(live), 502, "out_of_memory", "the GPU is full")


def test_client_that_goes_away_cancels_its_job(alone: Live, worker: Painter) -> None:
    worker.go_on.clear()
    with pytest.raises(httpx.ReadTimeout):
        post(alone, timeout=0.5)
    wait_until(lambda: [job["status"] for job in alone.jobs()] == ["canceled"])


def test_result_of_an_accepted_job_is_polled(alone: Live, worker: Painter) -> None:
    worker.go_on.clear()
    files = {"prompt": (None, "a red circle"), "model": (None, "tiny")}
    accepted = httpx.post(alone.url + SD3, files=files, headers={"prefer": "respond-async"}, trust_env=False)
    assert (accepted.status_code, accepted.json().keys()) == (200, {"id"})
    url = f"{alone.url}/v2beta/results/{accepted.json()['id']}"
    pending = httpx.get(url, trust_env=False)
    assert (pending.status_code, pending.json()) == (202, accepted.json() | {"status": "in-progress"})
    worker.go_on.set()
    wait_until(lambda: bool(httpx.get(url, trust_env=False).status_code == 200))
    as_bytes = httpx.get(url, trust_env=False)
    as_json = httpx.get(url, headers={"accept": "application/json; type=image/png"}, trust_env=False)
    assert as_bytes.headers["content-type"] == "image/png"
    assert b64decode(as_json.json()["image"]) == as_bytes.content


@pytest.mark.parametrize(
    ("form", "cfg"),
    [
        ({"model": "sd3.5-large"}, 4.0),
        ({"model": "sd3.5-large-turbo"}, 1.0),
        ({"model": "tiny"}, 3.0),
        ({"model": "sd3.5-large", "cfg_scale": 6}, 6.0),
    ],
)
def test_cfg_scale_left_out_is_stabilitys_own(live: Live, form: dict[str, Any], cfg: float) -> None:
    assert post(live, **form).status_code == 200
    assert live.jobs()[0]["params"]["guidance_scale"] == cfg


@pytest.mark.parametrize("accept", ["image/*", "application/json"])
def test_warnings_come_in_a_header(live: Live, accept: str) -> None:
    answer = post(live, accept=accept, model="sd3.5-large-turbo", negative_prompt="squares")
    assert "negative_prompt" in json.loads(answer.headers["x-warnings"])[0]


def test_cfg_scale_of_a_model_of_ones_own_is_its_own(settings: GatewaySettings, worker: Painter) -> None:
    few = replace(LARGE, name="my-4-step", defaults=replace(LARGE.defaults, steps=4, guidance_scale=1.0))
    worker._intake.publish([few])
    with Live(settings) as live:
        call = {"prompt": (None, "a red circle"), "model": (None, "my-4-step")}
        asked = {"accept": "image/*", "prefer": "respond-async"}
        assert httpx.post(live.url + SD3, files=call, headers=asked, trust_env=False).status_code == 200
        assert live.jobs()[0]["params"]["guidance_scale"] == 1.0


def test_warnings_of_a_header_fit_into_a_proxys_buffer() -> None:
    params = GenerationParams(prompt="p", width=64, height=64, steps=1, guidance_scale=1.0, seed=1)
    job = Job(id="gen_1", model="tiny", revision="r1", params=params, created_at=1.0, deadline=2.0)
    view = JobView(job=replace(job, warnings=tuple("\U0001f600" * 100 + str(n) for n in range(9))), status="succeeded")
    said = warnings_header(view)["x-warnings"]
    assert json.loads(said) == [view.warnings[0]]
    assert len(said) <= 2048
