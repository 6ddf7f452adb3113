"""Replicate's HTTP API, as Replicate's own Python client asks it."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any

import httpx
import pytest
import replicate
from PIL import Image
from replicate.exceptions import ModelError, ReplicateError
from replicate.prediction import Prediction

from app.dialects.predictions import prediction, progress_log, version_id
from app.dialects.replicate import render
from app.links import Links
from app.refusals import Refusal
from app.settings import GatewaySettings
from app.signing import Signer
from model.params import GenerationParams
from tests.app.dialects.conftest import Live
from tests.app.dialects.painter import Painter
from tests.app.fake_worker import LARGE, FakeWorker
from tests.processes import wait_until
from worker.contract.job import Failure, Job, JobView, Picture, Result
from worker.contract.keys import Keyring, new_key

PROMPT = "a red circle"
INPUT = {"prompt": PROMPT}
LARGE_NAME = "stability-ai/stable-diffusion-3.5-large"
PICTURE = Picture(key="k", seed=1, width=64, height=64, format="png", bytes=2)
MEDIUM_VERSION = "382c0389" + "0" * 56


@contextmanager
def client_of(live: Live, key: str = "r8_any") -> Iterator[replicate.Client]:
    client = replicate.Client(api_token=key, base_url=live.url, trust_env=False)
    client.poll_interval = 0.02
    try:
        yield client
    finally:
        client._client.close()


@pytest.fixture
def client(live: Live) -> Iterator[replicate.Client]:
    """Replicate's client, unchanged but for base url and token."""
    with client_of(live) as client:
        yield client


@pytest.fixture
def held(alone: Live, worker: Painter) -> Iterator[replicate.Client]:
    """A client whose predictions run until `worker.go_on` is set."""
    worker.go_on.clear()
    with client_of(alone) as client:
        yield client
    worker.go_on.set()


def ask(live: Live, path: str = "/v1/predictions", method: str = "POST", **request: Any) -> httpx.Response:
    return httpx.request(method, live.url + path, trust_env=False, timeout=20, **request)


def picture(url: str) -> Image.Image:
    return Image.open(io.BytesIO(httpx.get(url, trust_env=False).raise_for_status().content))


def test_run_by_name_gives_the_url_of_one_picture(client: replicate.Client) -> None:
    url = client.run(LARGE_NAME, input=INPUT | {"aspect_ratio": "16:9"})
    assert isinstance(url, str)
    assert (picture(url).size, picture(url).format) == ((1344, 768), "WEBP")


@pytest.mark.parametrize(("format", "read"), [("webp", "WEBP"), ("jpg", "JPEG"), ("png", "PNG")])
def test_run_writes_the_format_asked_for(client: replicate.Client, format: str, read: str) -> None:
    assert picture(client.run("darkroom/tiny", input=INPUT | {"output_format": format})).format == read


def test_run_by_version_reads_its_schema_and_gives_what_that_says(client: replicate.Client) -> None:
    latest = client.models.get(LARGE_NAME).latest_version
    assert latest is not None
    assert isinstance(client.run(f"{LARGE_NAME}:{latest.id}", input=INPUT), str)
    schemas = latest.openapi_schema["components"]["schemas"]
    assert schemas["Input"]["required"] == ["prompt"]
    assert {"prompt", "cfg", "aspect_ratio", "seed"} <= schemas["Input"]["properties"].keys()
    assert schemas["Output"]["type"] == "string"


@pytest.mark.parametrize(("prefix", "output"), [("feb36d70", str), ("e6c4657f", list)])
def test_versions_of_replicate_itself_answer_as_they_do_there(
    client: replicate.Client, prefix: str, output: type
) -> None:
    asked = f"{LARGE_NAME}:{prefix}{'0' * 56}"
    assert isinstance(client.run(asked, input=INPUT), output)


def test_medium_gives_a_list_by_name_and_by_its_version(settings: GatewaySettings, worker: Painter) -> None:
    worker._intake.publish([replace(LARGE, name="sd3.5-medium", variant="medium")])
    name = "stability-ai/stable-diffusion-3.5-medium"
    with Live(settings) as live, client_of(live) as client:
        latest = client.models.get(name).latest_version
        assert latest is not None
        assert latest.openapi_schema["components"]["schemas"]["Output"]["type"] == "array"
        job = client.predictions.create(version=latest.id, input=INPUT)
        assert (job.version, live.jobs()[0]["params"]["steps"]) == (latest.id, 40)
        job.cancel()
    view = JobView(job=job_of({"array": True}), status="succeeded", result=Result(pictures=(PICTURE,)))
    assert isinstance(prediction(view, Links("http://x"))["output"], list)


def test_several_pictures_come_as_a_list(client: replicate.Client) -> None:
    urls = client.run("darkroom/tiny", input=INPUT | {"num_outputs": 2, "width": 64, "height": 128})
    assert [picture(url).size for url in urls] == [(64, 128)] * 2


async def test_async_client_runs_a_model(client: replicate.Client) -> None:
    async with client._async_client:
        assert picture(await client.async_run("darkroom/tiny", input=INPUT)).size == (64, 64)


def test_run_without_waiting_polls_until_the_end(client: replicate.Client) -> None:
    assert picture(client.run("darkroom/tiny", input=INPUT, wait=False)).size == (64, 64)


def test_prediction_tells_all_of_itself(client: replicate.Client, live: Live) -> None:
    made = client.models.predictions.create("darkroom/tiny", input=INPUT | {"seed": 7, "steps": 2, "bogus": 1})
    assert (made.status, made.output, made.completed_at) == ("starting", None, None)
    made.wait()
    assert (made.status, made.error, made.input) == ("succeeded", None, INPUT | {"seed": 7, "steps": 2, "bogus": 1})
    assert (made.model, made.version) == ("darkroom/tiny", version_id("tiny", "r1"))
    assert made.metrics is not None
    assert 0 <= made.metrics["predict_time"] <= made.metrics["total_time"]
    assert made.logs == (
        "Using seed: 7\nWarning: this model has no input bogus; it was ignored\n"
        " 50%|#####     | 1/2\n100%|##########| 2/2\nWarning: prompt was cut\n"
    )
    assert made.progress == Prediction.Progress(percentage=1.0, current=2, total=2)
    assert live.jobs()[0]["params"] | {"seed": 7, "steps": 2} == live.jobs()[0]["params"]


def test_input_means_what_it_means_there(client: replicate.Client, live: Live) -> None:
    client.run(LARGE_NAME, input=INPUT | {"cfg": 3.5, "seed": -1, "output_quality": 0, "prompt_strength": 0.85})
    params = live.jobs()[0]["params"]
    assert (params["guidance_scale"], params["steps"], params["output_quality"]) == (3.5, 28, 1)
    assert params["seed"] >= 0
    client.run(LARGE_NAME, input=INPUT)
    assert live.jobs()[0]["params"]["guidance_scale"] == 5


def test_wait_that_runs_out_says_starting_whatever_it_does(
    alone: Live, held: replicate.Client, worker: Painter
) -> None:
    answer = ask(alone, json={"version": "darkroom/tiny", "input": INPUT}, headers={"prefer": "wait=1"})
    assert (answer.status_code, answer.json()["status"]) == (202, "starting")
    assert held.predictions.get(answer.json()["id"]).status == "processing"


def test_run_goes_on_after_the_wait_ran_out(held: replicate.Client, worker: Painter) -> None:
    made = held.predictions.create("darkroom/tiny", input=INPUT, wait=1)
    assert made.status == "starting"
    worker.go_on.set()
    made.wait()
    assert made.status == "succeeded"


def test_running_prediction_is_canceled(held: replicate.Client, worker: Painter) -> None:
    made = held.predictions.create("darkroom/tiny", input=INPUT)
    wait_until(lambda: bool(worker.running), 10)
    assert (held.predictions.get(made.id).progress or Prediction.Progress(0, 0, 0)).current == 1
    made.cancel()
    made.wait()
    assert (made.status, made.output, made.error) == ("canceled", None, None)


def test_prediction_that_its_client_left_goes_on(alone: Live, held: replicate.Client, worker: Painter) -> None:
    asked, waits = {"version": "darkroom/tiny", "input": INPUT}, {"prefer": "wait"}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{alone.url}/v1/predictions", json=asked, headers=waits, timeout=0.5, trust_env=False)
    worker.go_on.set()
    wait_until(lambda: bool(held.predictions.list().results))
    (made,) = held.predictions.list().results
    made.wait()
    assert made.status == "succeeded"


def test_cancel_after_cancels_and_says_when(alone: Live, held: replicate.Client) -> None:
    asked = {"version": "darkroom/tiny", "input": INPUT}
    said = ask(alone, json=asked, headers={"cancel-after": "1m30s"}).json()
    assert said["deadline"] > said["created_at"]
    refused = ask(alone, json=asked, headers={"cancel-after": "soon"})
    assert (refused.status_code, refused.json()["detail"]) == (
        422,
        'cancel-after is "soon"; allowed: 5s to 1h, such as 30s, 5m or 1h',
    )


@pytest.mark.parametrize(
    ("echo", "status", "error"), [({"cancel_after_s": 5}, "canceled", None), ({}, "failed", "late")]
)
def test_deadline_asked_for_ends_as_canceled_and_another_as_failed(
    echo: dict[str, Any], status: str, error: str | None
) -> None:
    result = Result(failure=Failure(code="deadline_exceeded", message="late"))
    view = JobView(job=job_of(echo), status="failed", ended_at=3.0, result=result)
    said = prediction(view, Links("http://x"))
    assert (said["status"], said["error"]) == (status, error)


def job_of(echo: dict[str, Any]) -> Job:
    params = GenerationParams(
        prompt="p", negative_prompt="", width=64, height=64, steps=100, guidance_scale=1, seed=1, sampler="euler"
    )
    return Job(
        id="gen_1", model="tiny", revision="r1", params=params, num_images=4, echo=echo, created_at=1.0, deadline=2.0
    )


def test_logs_only_grow_and_stay_short() -> None:
    texts = [progress_log(job_of({}), step) for step in range(401)]
    assert all(later.startswith(earlier) for earlier, later in pairwise(texts))
    assert texts[-1].count("\n") == 51
    assert texts[-1].endswith("100%|##########| 400/400\n")


def test_pictures_that_are_gone_are_said_to_be_removed() -> None:
    view = JobView(job=job_of({}), status="succeeded", started_at=1.0, ended_at=2.0, result=Result(expires_at=3.0))
    said = prediction(view, Links("http://x"))
    assert (said["status"], said["output"], said["data_removed"]) == ("succeeded", None, True)


def test_failed_prediction_raises_its_reason(settings: GatewaySettings) -> None:
    failing = FakeWorker(settings, Failure(code="out_of_memory", message="too large"))
    with failing, Live(settings) as live, client_of(live) as client:
        with pytest.raises(ModelError, match="too large") as raised:
            client.run("darkroom/tiny", input=INPUT)
        assert raised.value.prediction.status == "failed"
        with pytest.raises(RuntimeError, match="too large"):
            list(client.stream("darkroom/tiny", input=INPUT))


def test_stream_gives_logs_then_output_then_done(client: replicate.Client) -> None:
    events = list(client.stream("darkroom/tiny", input=INPUT | {"seed": 3, "steps": 2}))
    names = [event.event.value for event in events]
    assert names[-2:] == ["output", "done"]
    assert set(names[:-2]) == {"logs"}
    assert "".join(event.data for event in events if event.event.value == "logs").endswith("prompt was cut\n")
    assert picture(str(events[-2].data)).size == (64, 64)


def test_stream_goes_on_after_the_last_event_seen(client: replicate.Client, live: Live) -> None:
    made = client.models.predictions.create("darkroom/tiny", input=INPUT, wait=5)
    events = list(made.stream())
    headers = {"last-event-id": events[-2].id}
    rest = ask(live, f"/v1/predictions/{made.id}/stream", "GET", headers=headers).text
    assert "event: done" in rest
    assert "event: output" not in rest


def test_predictions_are_listed_newest_first_in_pages(client: replicate.Client, live: Live) -> None:
    made = [client.models.predictions.create("darkroom/tiny", input=INPUT | {"seed": n}).id for n in range(3)]
    listed = client.predictions.list()
    assert [one.id for one in listed.results][:3] == made[::-1]
    older = ask(live, f"/v1/predictions?cursor={made[1]}", "GET").json()
    assert older["results"][0]["id"] == made[0]


def test_generation_of_the_native_api_is_a_prediction_too(client: replicate.Client, live: Live) -> None:
    native = ask(live, "/v1/generations", json={"model": "tiny", "prompt": PROMPT, "seed": 5}).json()
    made = client.predictions.get(native["id"])
    made.wait()
    assert (made.status, made.input) == ("succeeded", {"prompt": PROMPT, "seed": 5})


def test_deployment_answers_as_its_model(client: replicate.Client) -> None:
    made = client.deployments.predictions.create("acme/tiny", input=INPUT)
    made.wait()
    assert made.status == "succeeded"


def test_model_has_its_one_version(client: replicate.Client) -> None:
    model = client.models.get(LARGE_NAME)
    assert (model.id, model.description, model.visibility) == (LARGE_NAME, LARGE.description, "public")
    (version,) = model.versions.list().results
    assert version.id == version_id("sd3.5-large", "r1")
    assert model.versions.get(version.id).openapi_schema == version.openapi_schema


def test_version_of_medium_gives_a_list(live: Live) -> None:
    answer = ask(live, f"/v1/models/{LARGE_NAME}/versions/{MEDIUM_VERSION}", "GET").json()
    assert answer["openapi_schema"]["components"]["schemas"]["Output"]["type"] == "array"


@pytest.mark.parametrize(
    ("asked", "field", "said"),
    [
        ({}, "input.prompt", "prompt is missing; allowed: text of 1 to 10,000 characters"),
        ({"prompt": ""}, "input.prompt", "prompt is missing"),
        ({"prompt": "x" * 10_001}, "input.prompt", "at most 10,000 characters"),
        (INPUT | {"cfg": 30}, "input.cfg", "cfg is 30.0; allowed: 0 to 20"),
        (INPUT | {"guidance_scale": 30}, "input.guidance_scale", "guidance_scale is 30.0"),
        (INPUT | {"aspect_ratio": "7:3"}, "input.aspect_ratio", 'aspect_ratio is "7:3"; allowed: 1:1, 16:9'),
        (INPUT | {"num_outputs": 9}, "input.num_outputs", "num_outputs is 9; allowed: 1 to 4"),
        (INPUT | {"size": "1000x1024"}, "input.size", 'size is "1000x1024"; allowed: a multiple of 16'),
        (INPUT | {"size": "00x00"}, "input.size", 'size is "00x00"; allowed: width and height, as in 1024x1024'),
        (INPUT | {"output_format": "gif"}, "input.output_format", "allowed: webp, jpg, png"),
        (INPUT | {"image": "https://example.com/x.png"}, "image", "pictures from pictures are not served yet"),
    ],
)
def test_wrong_input_is_refused_by_its_name(
    client: replicate.Client, live: Live, asked: dict[str, Any], field: str, said: str
) -> None:
    with pytest.raises(ReplicateError) as raised:
        client.run(LARGE_NAME, input=asked)
    assert raised.value.status == 422
    assert said in (raised.value.detail or "")
    answer = ask(live, f"/v1/models/{LARGE_NAME}/predictions", json={"input": asked})
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["invalid_fields"][0]["field"] == field


@pytest.mark.parametrize(
    ("call", "status", "said"),
    [
        (lambda c: c.run("acme/nothing", input=INPUT), 404, "model is "),
        (lambda c: c.predictions.create(version="f" * 64, input=INPUT), 422, "sd3.5-large"),
        (lambda c: c.predictions.get("gen_none"), 404, "no generation"),
        (lambda c: c.files.create(io.BytesIO(b"x")), 422, "no model here takes pictures as input yet"),
        (lambda c: c.run(LARGE_NAME, input=INPUT | {"image": io.BytesIO(b"x")}), 422, "no model here takes pictures"),
        (lambda c: c.hardware.list(), 404, "nothing at /v1/hardware"),
        (lambda c: c.trainings.list(), 404, "nothing at /v1/trainings"),
    ],
)
def test_what_is_not_there_is_refused_in_words(client: replicate.Client, call: Any, status: int, said: str) -> None:
    with pytest.raises(ReplicateError) as raised:
        call(client)
    assert raised.value.status == status
    assert said in (raised.value.detail or "")


def test_there_are_no_files(client: replicate.Client) -> None:
    assert client.files.list() == []


@pytest.mark.parametrize(
    "body", [b"{", b"[]", b'{"version": 1}', b'{"input": {}}', b'{"version": "tiny/tiny", "input": 3}']
)
def test_broken_bodies_are_problems_with_words(live: Live, body: bytes) -> None:
    said = ask(live, content=body)
    assert said.status_code in {400, 422}
    assert isinstance(said.json()["detail"], str)


@pytest.mark.parametrize(
    ("asked", "events"),
    [
        ({"webhook": "https://1.1.1.1/hook"}, ["started", "completed", "progress"]),
        ({"webhook": "https://1.1.1.1/hook", "webhook_events_filter": ["start"]}, ["started"]),
        ({"webhook": "https://1.1.1.1/hook", "webhook_events_filter": ["output", "completed"]}, ["completed"]),
        ({"webhook_completed": "https://1.1.1.1/hook"}, ["completed"]),
    ],
)
def test_webhook_is_told_what_its_filter_lets_pass(
    client: replicate.Client, live: Live, asked: dict[str, Any], events: list[str]
) -> None:
    client.models.predictions.create("darkroom/tiny", input=INPUT, **asked)
    webhook = live.jobs()[0]["webhook"]
    assert (webhook["url"], webhook["events"]) == ("https://1.1.1.1/hook", events)


def test_webhook_inside_our_networks_is_refused(client: replicate.Client) -> None:
    with pytest.raises(ReplicateError) as raised:
        client.models.predictions.create("darkroom/tiny", input=INPUT, webhook="https://127.0.0.1/hook")
    assert raised.value.status == 422
    assert (raised.value.detail or "").startswith('webhook is "https://127.0.0.1/hook"; allowed: a host with public')


def test_secret_of_webhooks_is_what_clients_can_read(client: replicate.Client) -> None:
    secret = client.webhooks.default.secret()
    assert secret.key.startswith("whsec_")
    assert secret == client.webhooks.default.secret()


def test_account_is_whose_key_it_is(client: replicate.Client) -> None:
    assert client.accounts.current().name == "anonymous"


def test_stream_url_is_signed_where_keys_are_on() -> None:
    links = Links("http://x", Signer(b"secret"))
    stream = prediction(JobView(job=job_of({}), status="queued"), links)["urls"]["stream"]
    assert stream.startswith("http://x/v1/predictions/gen_1/stream?expires=2&signature=")


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 415, 422, 429, 499, 500, 503])
def test_every_refusal_has_words(status: int) -> None:
    said = json.loads(bytes(render(Refusal(status, "some_code", "in words")).body))
    assert (said["status"], said["detail"]) == (status, "in words")
    assert said["title"]


def test_throttled_client_is_told_in_the_words_it_knows() -> None:
    said = json.loads(bytes(render(Refusal(429, "rate_limited", "x", headers={"retry-after": "30"})).body))
    assert said["detail"] == "Request was throttled. Your rate limit resets in ~30s."


@pytest.fixture
def guarded(settings: GatewaySettings, worker: Painter) -> Iterator[Live]:
    """A gateway on a port that asks for keys."""
    with Live(settings.model_copy(update={"auth": "on"})) as live:
        yield live


def key_of(settings: GatewaySettings, name: str) -> str:
    with Keyring.connect(settings) as keyring:
        key, text = new_key(name)
        keyring.add(key)
    return text


def test_predictions_and_secrets_are_their_keys_own(guarded: Live, settings: GatewaySettings) -> None:
    with (
        client_of(guarded, key_of(settings, "mine")) as mine,
        client_of(guarded, key_of(settings, "theirs")) as theirs,
    ):
        made = mine.models.predictions.create("darkroom/tiny", input=INPUT, wait=5)
        for call in (theirs.predictions.get, theirs.predictions.cancel):
            with pytest.raises(ReplicateError) as raised:
                call(made.id)
            assert raised.value.status == 404
        assert [one.id for one in mine.predictions.list()] == [made.id]
        assert list(theirs.predictions.list()) == []
        assert mine.webhooks.default.secret().key != theirs.webhooks.default.secret().key


def test_urls_in_answers_need_no_key(guarded: Live, settings: GatewaySettings) -> None:
    with client_of(guarded, key_of(settings, "mine")) as client:
        made = client.models.predictions.create("darkroom/tiny", input=INPUT, wait=5)
    assert made.urls is not None
    assert picture(made.output).size == (64, 64)
    assert "event: done" in httpx.get(made.urls["stream"], trust_env=False).text
    forged = made.urls["stream"].replace(made.id, made.id[:-1] + ("0" if made.id[-1] != "0" else "1"))
    assert httpx.get(forged, trust_env=False).status_code == 403


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/predictions"),
        ("GET", "/v1/predictions"),
        ("POST", "/v1/models/darkroom/tiny/predictions"),
        ("POST", "/v1/deployments/darkroom/tiny/predictions"),
        ("GET", f"/v1/predictions/gen_{'0' * 31}"),
        ("POST", f"/v1/predictions/gen_{'0' * 31}/cancel"),
        ("GET", f"/v1/predictions/gen_{'0' * 31}/stream"),
        ("GET", "/v1/models/darkroom/tiny"),
        ("GET", "/v1/models/darkroom/tiny/versions"),
        ("GET", f"/v1/models/darkroom/tiny/versions/{'0' * 64}"),
        ("GET", "/v1/files"),
        ("POST", "/v1/files"),
        ("GET", "/v1/webhooks/default/secret"),
        ("GET", "/v1/account"),
    ],
)
def test_no_call_is_answered_without_a_key(keyless: Live, method: str, path: str) -> None:
    said = ask(keyless, path, method)
    assert (said.status_code, said.json()["title"]) == (401, "Unauthenticated")
    assert isinstance(said.json()["detail"], str)


@pytest.fixture(scope="module")
def keyless(live: Live) -> Iterator[Live]:
    """A gateway beside the other that asks for keys; nobody has one."""
    with Live(live.app.state.gateway.settings.model_copy(update={"auth": "on"})) as keyless:
        yield keyless


def test_deployment_is_got_and_asked(client: replicate.Client, live: Live) -> None:
    deployment = client.deployments.get("me/tiny")
    assert (deployment.owner, deployment.name) == ("me", "tiny")
    done = deployment.predictions.create(input=INPUT)
    done.wait()
    assert done.status == "succeeded"
    assert client.deployments.list().results == []
    assert ask(live, "/v1/deployments/me/nothing", "GET").status_code == 404


def test_shape_beside_a_size_is_said_to_be_ignored(client: replicate.Client) -> None:
    done = client.predictions.create("darkroom/tiny", input=INPUT | {"aspect_ratio": "16:9", "size": "64x64"})
    done.wait()
    assert "Warning: this model has no input aspect_ratio beside a size; it was ignored\n" in (done.logs or "")


def test_logs_say_why_a_prediction_was_canceled_by_its_deadline() -> None:
    result = Result(failure=Failure(code="deadline_exceeded", message="late"))
    view = JobView(job=job_of({"cancel_after_s": 5}), status="failed", ended_at=3.0, result=result)
    assert prediction(view, Links("http://x"))["logs"].endswith("Canceled: late\n")
