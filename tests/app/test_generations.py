"""Generations over HTTP, against a real Valkey and a worker without a model."""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis
from fastapi import FastAPI

from app.deps import Gateway
from app.main import EXPIRE_LEASE_S, _expire_pictures, create_app
from app.schemas import timestamp
from app.settings import GatewaySettings
from tests.app.conftest import BASE_URL, client_of, until
from tests.app.fake_worker import CARDS, LARGE, FakeWorker
from tests.app.fake_worker import TINY as TINY_CARD
from worker.contract.cards import ModelCard
from worker.contract.errors import QueueUnavailable, StoreUnavailable
from worker.contract.job import Failure, JobView
from worker.contract.queue import JobQueue
from worker.contract.store import FolderStore
from worker.intake import Intake

TINY = {"model": "tiny", "prompt": "a red circle"}
WAIT = {"prefer": "wait=10"}


async def created(client: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    answer = await client.post("/v1/generations", json=TINY | fields)
    assert answer.status_code == 202, answer.text
    return dict(answer.json())


async def finished(client: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    answer = await client.post("/v1/generations", json=TINY | fields, headers=WAIT)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


async def test_create_answers_202_with_id_and_where_to_look(served: httpx.AsyncClient) -> None:
    answer = await served.post("/v1/generations", json=TINY)
    generation = answer.json()
    assert answer.status_code == 202
    assert generation["status"] == "queued"
    assert generation["queue_position"] == 0
    assert generation["urls"]["self"] == f"{BASE_URL}/v1/generations/{generation['id']}"
    assert answer.headers["location"] == generation["urls"]["self"]
    assert "preference-applied" not in answer.headers


async def test_create_fills_in_the_defaults_of_the_models_card(served: httpx.AsyncClient, worker: FakeWorker) -> None:
    params = (await created(served, seed=7))["params"]
    assert params == {
        "prompt": "a red circle",
        "negative_prompt": "",
        "width": 64,
        "height": 64,
        "steps": 2,
        "guidance_scale": 3.0,
        "seed": 7,
        "sampler": "dpmpp_2m",
        "num_images": 1,
        "output_format": "png",
        "output_quality": 90,
        "metadata": "full",
        "deterministic": False,
        "priority": "normal",
    }


async def test_create_keeps_what_is_asked_for(served: httpx.AsyncClient) -> None:
    asked = {
        "prompt": "ein Kreis \N{LARGE RED CIRCLE}",
        "negative_prompt": "squares",
        "width": 128,
        "height": 96,
        "steps": 10,
        "guidance_scale": 20,
        "seed": 2**53 - 5,
        "sampler": "euler",
        "num_images": 2,
        "output_format": "webp",
        "output_quality": 1,
        "metadata": "none",
        "deterministic": True,
        "priority": "high",
    }
    generation = await created(served, **asked)
    assert generation["params"] == asked
    assert generation["seeds"] == [2**53 - 5, 2**53 - 4]


async def test_create_without_seed_takes_and_tells_a_random_one(served: httpx.AsyncClient) -> None:
    first, second = await created(served), await created(served, seed=None)
    assert first["seeds"] == [first["params"]["seed"]]
    assert first["seeds"] != second["seeds"]


async def test_create_with_null_takes_the_default(served: httpx.AsyncClient) -> None:
    asked = {"width": None, "sampler": None, "num_images": None, "output_format": None, "deadline_s": None}
    params = (await created(served, **asked))["params"]
    assert (params["width"], params["sampler"], params["num_images"]) == (64, "dpmpp_2m", 1)


async def test_create_without_deadline_gets_the_records_lifetime(
    served: httpx.AsyncClient, settings: GatewaySettings
) -> None:
    view = await _view(settings, (await created(served))["id"])
    assert view.job.deadline - view.job.created_at == pytest.approx(settings.record_lifetime_s)


async def test_create_for_a_model_without_a_worker_is_queued(
    client: httpx.AsyncClient, settings: GatewaySettings
) -> None:
    _publish_cards(settings)
    first, second = await created(client), await created(client)
    assert [first["status"], first["queue_position"]] == ["queued", 0]
    assert [second["status"], second["queue_position"]] == ["queued", 1]
    model = (await client.get("/v1/models/tiny")).json()
    assert (model["loaded"], model["workers"]) == (False, 0)


async def test_create_with_prefer_wait_answers_200_once_it_has_ended(served: httpx.AsyncClient) -> None:
    answer = await served.post("/v1/generations", json=TINY | {"seed": 5, "num_images": 2}, headers=WAIT)
    generation = answer.json()
    assert answer.status_code == 200
    assert answer.headers["preference-applied"] == "wait=10"
    assert generation["status"] == "succeeded"
    assert [image["seed"] for image in generation["images"]] == [5, 6]
    assert generation["progress"] == {"step": 4, "steps": 4}
    assert generation["timings"].keys() == {"queue", "denoise", "total"}
    assert generation["warnings"] == ["prompt was cut"]
    assert generation["fingerprint"] == "fp_fake"
    assert generation["queue_position"] is None
    assert generation["expires_at"] > generation["ended_at"] >= generation["started_at"] >= generation["created_at"]


@pytest.mark.parametrize("header", ["wait=0", "respond-async, Wait=0", 'wait="0"; foo, wait=50', "x;wait=3,wait=0"])
async def test_create_with_prefer_wait_answers_202_when_the_time_is_up(
    served: httpx.AsyncClient, worker: FakeWorker, header: str
) -> None:
    worker.go_on.clear()
    answer = await served.post("/v1/generations", json=TINY, headers={"prefer": header})
    assert answer.status_code == 202
    assert answer.headers["preference-applied"] == "wait=0"
    assert answer.json()["status"] in {"queued", "running"}


@pytest.mark.parametrize("header", ["wait", "wait=", "wait=-1", "wait=soon", "respond-async", "waiting=5"])
async def test_create_ignores_a_preference_it_cannot_read(served: httpx.AsyncClient, header: str) -> None:
    answer = await served.post("/v1/generations", json=TINY, headers={"prefer": header})
    assert answer.status_code == 202
    assert "preference-applied" not in answer.headers


async def test_create_waits_a_minute_at_most(served: httpx.AsyncClient) -> None:
    answer = await served.post("/v1/generations", json=TINY, headers={"prefer": "wait=99999"})
    assert answer.headers["preference-applied"] == "wait=60"


async def test_held_create_answers_202_when_the_gateway_drains(
    served: httpx.AsyncClient, app: FastAPI, worker: FakeWorker
) -> None:
    worker.go_on.clear()
    held = asyncio.create_task(served.post("/v1/generations", json=TINY, headers={"prefer": "wait=60"}))
    await until(lambda: _busy(worker))
    app.state.gateway.draining.set()
    answer = await asyncio.wait_for(held, 5)
    assert answer.status_code == 202
    assert answer.json()["status"] == "running"


async def test_held_create_still_answers_202_when_redis_goes_away_meanwhile(settings: GatewaySettings) -> None:
    class Vanishing(JobQueue):
        async def wait(self, job_id: str, timeout_s: float) -> JobView:
            raise QueueUnavailable

    queue = Vanishing.connect(settings)
    _publish_cards(settings)
    async with client_of(create_app(settings, queue)) as client:
        answer = await client.post("/v1/generations", json=TINY, headers={"prefer": "wait=1"})
    await queue.close()
    assert answer.status_code == 202
    assert answer.json()["status"] == "queued"


async def test_failed_generation_tells_why(client: httpx.AsyncClient, settings: GatewaySettings) -> None:
    with FakeWorker(settings, Failure(code="out_of_memory", message="the GPU is full")):
        generation = await finished(client)
    assert generation["status"] == "failed"
    assert generation["error"] == {"code": "out_of_memory", "message": "the GPU is full"}
    image = await client.get(generation["urls"]["self"] + "/images/0")
    assert (image.status_code, image.json()["error"]["code"]) == (404, "no_picture")


async def test_generation_past_its_deadline_fails_though_nobody_works(
    client: httpx.AsyncClient, settings: GatewaySettings
) -> None:
    _publish_cards(settings)
    generation = await finished(client, deadline_s=1)
    assert generation["status"] == "failed"
    assert generation["error"]["code"] == "deadline_exceeded"


@pytest.mark.parametrize(
    ("model", "guidance_scale", "warned"),
    [("tiny", 1.0, True), ("tiny", 1.5, False), ("sd3.5-large-turbo", None, True)],
)
async def test_negative_prompt_without_guidance_is_warned_of(
    served: httpx.AsyncClient, model: str, guidance_scale: float | None, warned: bool
) -> None:
    generation = await created(served, model=model, negative_prompt="blur", guidance_scale=guidance_scale)
    assert generation["warnings"] == (["negative_prompt has no effect: guidance_scale is 1"] if warned else [])


async def test_negative_prompt_of_a_guided_turbo_is_warned_of(served: httpx.AsyncClient) -> None:
    generation = await created(served, model="sd3.5-large-turbo", negative_prompt="blur", guidance_scale=3)
    assert generation["warnings"] == [
        "negative_prompt has little effect: sd3.5-large-turbo was distilled to do without guidance"
    ]


@pytest.mark.parametrize(("height", "warned"), [(1024, False), (1040, True)])
async def test_picture_larger_than_the_model_was_trained_on_is_warned_of(
    served: httpx.AsyncClient, settings: GatewaySettings, height: int, warned: bool
) -> None:
    trained = replace(LARGE, name="trained", trained_pixels=1_048_576)
    _publish(settings, trained)
    generation = await created(served, model="trained", width=1024, height=height)
    assert generation["warnings"] == (
        [
            "1024x1040 is 1,064,960 pixels: trained was trained on pictures up to 1,048,576, "
            "and larger ones often repeat their subject"
        ]
        if warned
        else []
    )


async def test_warnings_of_the_worker_come_after_those_of_the_request(served: httpx.AsyncClient) -> None:
    generation = await finished(served, negative_prompt="blur", guidance_scale=0)
    assert generation["warnings"] == ["negative_prompt has no effect: guidance_scale is 0", "prompt was cut"]


async def test_model_answers_for_its_aliases_while_no_card_has_the_name(
    served: httpx.AsyncClient, settings: GatewaySettings
) -> None:
    _publish(settings, replace(TINY_CARD, name="also", aliases=("sd3.5-medium", "sd3.5-large")))
    assert (await created(served, model="sd3.5-medium"))["model"] == "also"
    assert (await created(served, model="sd3.5-large"))["model"] == "sd3.5-large"


async def test_get_shows_progress_of_a_running_generation(served: httpx.AsyncClient, worker: FakeWorker) -> None:
    worker.go_on.clear()
    url = (await created(served))["urls"]["self"]

    async def running() -> Any:
        generation = (await served.get(url)).json()
        return generation["progress"] and generation

    generation = await until(running)
    assert generation["status"] == "running"
    assert generation["progress"] == {"step": 1, "steps": 2}
    assert generation["images"] == []
    image = await served.get(url + "/images/0")
    assert (image.status_code, image.json()["error"]["code"]) == (404, "not_finished")


async def test_cancel_ends_a_queued_generation_at_once_and_again_changes_nothing(
    client: httpx.AsyncClient, settings: GatewaySettings
) -> None:
    _publish_cards(settings)
    url = (await created(client))["urls"]["cancel"]
    first, second = await client.post(url), await client.post(url)
    assert (first.status_code, first.json()["status"]) == (200, "canceled")
    assert second.json() == first.json()


async def test_cancel_stops_a_running_generation(served: httpx.AsyncClient, worker: FakeWorker) -> None:
    worker.go_on.clear()
    generation = await created(served)
    await until(lambda: _busy(worker))
    canceled = (await served.post(generation["urls"]["cancel"])).json()
    assert canceled["cancel_requested"] or canceled["status"] == "canceled"

    async def status() -> bool:
        return bool((await served.get(generation["urls"]["self"])).json()["status"] == "canceled")

    await until(status)


async def test_cancel_leaves_a_finished_generation(served: httpx.AsyncClient) -> None:
    generation = await finished(served)
    assert (await served.post(generation["urls"]["cancel"])).json() == generation


@pytest.mark.parametrize(
    ("output_format", "media_type"), [("png", "image/png"), ("jpeg", "image/jpeg"), ("webp", "image/webp")]
)
async def test_image_is_served_as_what_it_is(served: httpx.AsyncClient, output_format: str, media_type: str) -> None:
    generation = await finished(served, output_format=output_format, num_images=2, seed=3)
    answers = [await served.get(image["url"]) for image in generation["images"]]
    assert [a.headers["content-type"] for a in answers] == [media_type] * 2
    assert [a.content for a in answers] == [f"{output_format} of a red circle by {seed}".encode() for seed in (3, 4)]
    assert generation["images"][0]["bytes"] == len(answers[0].content)
    assert answers[0].headers["cache-control"].startswith("private, max-age=")
    assert answers[0].headers["content-disposition"] == f'inline; filename="{generation["id"]}-0.{output_format}"'
    assert answers[0].headers["etag"] != answers[1].headers["etag"]


@pytest.mark.parametrize("header", ["{tag}", "W/{tag}", '"other", {tag}', "*"])
async def test_image_that_the_client_holds_is_304(served: httpx.AsyncClient, header: str) -> None:
    url = (await finished(served))["images"][0]["url"]
    tag = (await served.get(url)).headers["etag"]
    answer = await served.get(url, headers={"if-none-match": header.format(tag=tag)})
    assert (answer.status_code, answer.content) == (304, b"")
    assert answer.headers["etag"] == tag
    assert (await served.get(url, headers={"if-none-match": '"other"'})).status_code == 200


@pytest.mark.parametrize(("n", "status"), [("1", 404), ("99999999999999999999", 404), ("-1", 422), ("x", 422)])
async def test_image_that_there_is_not_is_refused(served: httpx.AsyncClient, n: str, status: int) -> None:
    url = (await finished(served))["urls"]["self"]
    answer = await served.get(f"{url}/images/{n}")
    assert answer.status_code == status
    assert answer.json()["error"]["code"] == ("no_picture" if status == 404 else "invalid_field")


async def test_image_past_its_lifetime_is_410_and_says_when(settings: GatewaySettings) -> None:
    class Past(JobQueue):
        async def view(self, job_id: str) -> JobView:
            view = await super().view(job_id)
            if view.result:
                object.__setattr__(view.result, "expires_at", 1_700_000_000.0)
            return view

    queue = Past.connect(settings)
    with FakeWorker(settings):
        async with client_of(create_app(settings, queue)) as client:
            generation = await finished(client)
            answer = await client.get(generation["images"][0]["url"])
    await queue.close()
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (410, "expired")
    assert "2023-11-14T22:13:20Z" in error["message"]


async def test_pictures_are_kept_as_long_as_the_request_says_and_then_deleted(
    served: httpx.AsyncClient, app: FastAPI, settings: GatewaySettings, worker: FakeWorker
) -> None:
    worker.age_s = 3600.0
    generation = await finished(served, expires_in_s=60)
    answer = await served.get(generation["images"][0]["url"])
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (410, "expired")
    assert "were deleted: the request asked for 60 s (expires_in_s)" in error["message"]
    store = settings.store_dir / generation["id"]
    assert store.exists()
    app.state.gateway.draining.set()  # its own chores are over
    await _expire_pictures(app.state.gateway)
    assert not store.exists()


class Stubborn(FolderStore):
    """A folder that does not let go of what one job stored."""

    kept = ""

    def delete_prefix(self, prefix: str) -> None:
        if prefix == self.kept:
            raise StoreUnavailable("permission denied")
        super().delete_prefix(prefix)


async def test_pictures_that_cannot_be_deleted_keep_no_others_and_go_later(
    settings: GatewaySettings, worker: FakeWorker
) -> None:
    worker.age_s = 3600.0
    store = Stubborn(settings.store_dir)
    app = create_app(settings, store=store)  # its chores do not run
    async with client_of(app) as client:
        stuck, other = [(await finished(client, expires_in_s=60))["id"] for _ in range(2)]
    gateway: Gateway = app.state.gateway
    store.kept = stuck
    with pytest.raises(StoreUnavailable, match="permission denied"):
        await _expire_pictures(gateway)
    assert [(settings.store_dir / job_id).exists() for job_id in (stuck, other)] == [True, False]
    assert gateway.metrics.registry.get_sample_value("darkroom_jobs_expired_total") == 1
    store.kept = ""
    with redis.Redis.from_url(str(settings.redis_url)) as valkey:
        valkey.zincrby("darkroom:pictures", -EXPIRE_LEASE_S, stuck)
    await _expire_pictures(gateway)
    assert not (settings.store_dir / stuck).exists()
    assert gateway.metrics.registry.get_sample_value("darkroom_jobs_expired_total") == 2
    await gateway.door.close()
    await gateway.queue.close()


async def test_image_lost_from_the_store_is_410_with_when_it_was_to_expire(
    served: httpx.AsyncClient, settings: GatewaySettings
) -> None:
    generation = await finished(served)
    FolderStore(settings.store_dir).delete_prefix(generation["id"])
    answer = await served.get(generation["images"][0]["url"])
    assert (answer.status_code, answer.json()["error"]["code"]) == (410, "picture_lost")
    assert generation["expires_at"][:19] in answer.json()["error"]["message"]


@pytest.mark.parametrize("job_id", ["gen_" + "0" * 31, "gen_x", "..", "gen_" + "A" * 31, "x" * 5000])
async def test_unknown_generation_is_404(client: httpx.AsyncClient, job_id: str) -> None:
    for answer in (
        await client.get(f"/v1/generations/{job_id}"),
        await client.get(f"/v1/generations/{job_id}/images/0"),
        await client.post(f"/v1/generations/{job_id}/cancel"),
    ):
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "not_found"
        assert len(answer.content) < 400


async def test_list_has_the_newest_first_in_pages(served: httpx.AsyncClient) -> None:
    ids = [(await created(served))["id"] for _ in range(5)]
    pages, cursor = [], None
    while True:
        query = {"limit": 2} | ({"cursor": cursor} if cursor else {})
        page = (await served.get("/v1/generations", params=query)).json()
        pages.append([generation["id"] for generation in page["generations"]])
        cursor = page["next"]
        if cursor is None:
            break
    assert pages == [ids[4:2:-1], ids[2:0:-1], ids[:1]]


async def test_list_shows_generations_as_they_are_alone(served: httpx.AsyncClient) -> None:
    generation = await finished(served)
    assert (await served.get("/v1/generations")).json() == {"generations": [generation], "next": None}


async def test_list_is_empty_at_first(client: httpx.AsyncClient) -> None:
    assert (await client.get("/v1/generations")).json() == {"generations": [], "next": None}


@pytest.mark.parametrize(
    ("query", "field", "allowed"),
    [
        ("limit=0", "limit", "a whole number from 1 to 100"),
        ("limit=101", "limit", "a whole number from 1 to 100"),
        ("limit=x", "limit", "a whole number from 1 to 100"),
        ("cursor=x", "cursor", "`next` of a page that was answered"),
    ],
)
async def test_list_with_a_wrong_page_is_refused(
    client: httpx.AsyncClient, query: str, field: str, allowed: str
) -> None:
    answer = await client.get(f"/v1/generations?{query}")
    error = answer.json()["error"]
    assert (answer.status_code, error["field"]) == (422, field)
    assert error["message"].endswith(f"allowed: {allowed}")


async def test_list_goes_on_behind_a_generation_that_was_forgotten(served: httpx.AsyncClient) -> None:
    ids = [(await created(served))["id"] for _ in range(3)]
    assert (await served.delete(f"/v1/generations/{ids[1]}")).status_code == 204
    page = (await served.get("/v1/generations", params={"cursor": ids[1]})).json()
    assert [generation["id"] for generation in page["generations"]] == ids[:1]


async def test_delete_forgets_record_and_pictures(served: httpx.AsyncClient, settings: GatewaySettings) -> None:
    generation = await finished(served)
    url = generation["urls"]["self"]
    answer = await served.delete(url)
    assert (answer.status_code, answer.content) == (204, b"")
    assert not (settings.store_dir / generation["id"]).exists()
    assert (await served.get(url)).status_code == 404
    assert (await served.get(generation["images"][0]["url"])).status_code == 404
    assert (await served.get("/v1/generations")).json()["generations"] == []
    assert (await served.delete(url)).status_code == 404


async def test_delete_ends_a_running_generation_and_leaves_no_picture(
    served: httpx.AsyncClient, settings: GatewaySettings, worker: FakeWorker
) -> None:
    worker.go_on.clear()
    generation = await created(served)
    await until(lambda: _busy(worker))
    assert (await served.delete(generation["urls"]["self"])).status_code == 204

    async def idle() -> bool:
        return not worker.running

    await until(idle)
    assert not (settings.store_dir / generation["id"]).exists()


async def test_delete_while_the_store_is_away_keeps_the_record(settings: GatewaySettings, worker: FakeWorker) -> None:
    class Away(FolderStore):
        def delete_prefix(self, prefix: str) -> None:
            raise StoreUnavailable("away")

    app = create_app(settings, store=Away(settings.store_dir))
    async with app.router.lifespan_context(app), client_of(app) as client:
        generation = await finished(client)
        answer = await client.delete(generation["urls"]["self"])
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "store_unavailable")
        assert (await client.get(generation["urls"]["self"])).status_code == 200


async def test_webhook_is_shown_with_the_generation(client: httpx.AsyncClient, settings: GatewaySettings) -> None:
    _publish_cards(settings)
    hook = {"url": "https://93.184.216.34/hook", "events": ["started", "completed", "started"]}
    generation = await created(client, webhook=hook)
    assert generation["webhook"] == {"url": hook["url"], "events": ["started", "completed"], "deliveries": []}
    view = await _view(settings, generation["id"])
    assert view.job.echo == {"base_url": BASE_URL}


async def test_urls_begin_with_the_public_url(settings: GatewaySettings) -> None:
    _publish_cards(settings)
    public = GatewaySettings(**settings.model_dump() | {"public_url": "https://pictures.example/sd/"})
    app = create_app(public)
    async with app.router.lifespan_context(app), client_of(app) as client:
        generation = await created(client)
    assert generation["urls"]["self"] == f"https://pictures.example/sd/v1/generations/{generation['id']}"


async def test_models_are_listed_with_their_workers(served: httpx.AsyncClient) -> None:
    models = (await served.get("/v1/models")).json()["models"]
    assert [model["name"] for model in models] == ["sd3.5-large", "sd3.5-large-turbo", "tiny"]
    large = (await served.get("/v1/models/sd3.5-large")).json()
    assert large == models[0]
    assert (large["loaded"], large["workers"]) == (True, 1)
    assert large["defaults"] == {"width": 1024, "height": 1024, "steps": 28, "guidance_scale": 4.5, "sampler": "euler"}
    assert large["limits"]["max_pixels"] == 2_097_152


async def test_expired_pictures_are_swept_at_start(settings: GatewaySettings) -> None:
    store = FolderStore(settings.store_dir)
    store.put("gen_old/1/0.png", b"old")
    store.put("gen_new/1/0.png", b"new")
    _age(settings.store_dir / "gen_old/1/0.png", settings.picture_lifetime_s + 120)
    app = create_app(settings)

    async def swept() -> bool:
        return store.get("gen_old/1/0.png") is None

    async with app.router.lifespan_context(app):
        await until(swept)
    assert store.get("gen_new/1/0.png") == b"new"


def test_time_beyond_all_times_is_the_last_one() -> None:
    assert timestamp(1e12) == "9999-12-31T00:00:00Z"


def _age(path: Path, seconds: float) -> None:
    then = path.stat().st_mtime - seconds
    os.utime(path, (then, then))


def _publish_cards(settings: GatewaySettings) -> None:
    _publish(settings, *CARDS)


def _publish(settings: GatewaySettings, *cards: ModelCard) -> None:
    intake = Intake(redis.Redis.from_url(str(settings.redis_url)), "publisher")
    intake.publish(cards)
    intake.close()


async def _view(settings: GatewaySettings, job_id: str) -> JobView:
    queue = JobQueue.connect(settings)
    try:
        return await queue.view(job_id)
    finally:
        await queue.close()


async def _busy(worker: FakeWorker) -> bool:
    return bool(worker.running)
