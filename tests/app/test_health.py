"""Probes and metrics, with Redis and the store there and away."""

from __future__ import annotations

import asyncio
import io
import json
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis.asyncio
from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families

from app.logs import make_log
from app.main import create_app
from app.metrics import Metrics
from app.settings import GatewaySettings
from tests.app.conftest import client_of, until
from tests.app.fake_worker import FakeWorker
from tests.conftest import Valkey
from tests.worker.jobs import make_job
from worker.contract.errors import StoreUnavailable
from worker.contract.load import ASSUMED_SPEED
from worker.contract.queue import JobQueue
from worker.contract.store import FolderStore
from worker.intake import Intake

ASKED = {"model": "tiny", "prompt": "a red circle"}


@pytest.fixture
async def cut_off(tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a gateway whose Redis is not there."""
    settings = GatewaySettings(redis_url="redis://127.0.0.1:1/0", store_dir=tmp_path)  # type: ignore[arg-type]
    app = create_app(settings)
    async with app.router.lifespan_context(app), client_of(app) as client:
        yield client


async def samples(client: httpx.AsyncClient) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    answer = await client.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=")
    families = text_string_to_metric_families(answer.text)
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def named(found: dict[Any, float], name: str, **labels: str) -> float | None:
    return found.get((name, tuple(sorted(labels.items()))))


async def test_healthz_answers_though_redis_is_away(cut_off: httpx.AsyncClient) -> None:
    answer = await cut_off.get("/healthz")
    assert (answer.status_code, answer.json()) == (200, {"status": "ok"})


async def test_readyz_is_ready_without_workers(client: httpx.AsyncClient) -> None:
    answer = await client.get("/readyz")
    expected = {"status": "ready", "draining": False, "redis": "ok", "store": "ok", "workers": {}}
    assert (answer.status_code, answer.json()) == (200, expected)


async def test_readyz_tells_live_workers(served: httpx.AsyncClient) -> None:
    assert (await served.get("/readyz")).json()["workers"] == {"sd3.5-large": 1, "sd3.5-large-turbo": 1, "tiny": 1}


async def test_readyz_is_503_without_redis(cut_off: httpx.AsyncClient) -> None:
    answer = await cut_off.get("/readyz")
    assert answer.status_code == 503
    assert answer.json() == {
        "status": "not_ready",
        "draining": False,
        "redis": "not reachable",
        "store": "ok",
        "workers": {},
    }


@pytest.mark.parametrize(
    ("url", "cause"),
    [
        ("redis://127.0.0.1:1/0", "connecting to 127.0.0.1:1"),
        ("redis://:s3cret@{here}/0", "invalid username-password pair"),
        ("redis://:right@{here}/999999", "DB index is out of range"),
        ("rediss://{here}/0", "Timeout connecting to server"),
    ],
)
async def test_why_redis_cannot_be_used_is_logged_unasked(
    own_valkey: Valkey, tmp_path: Path, log_lines: io.StringIO, url: str, cause: str
) -> None:
    async with redis.asyncio.Redis.from_url(own_valkey.url) as operator:
        await operator.config_set("requirepass", "right")
    there = url.format(here=f"127.0.0.1:{own_valkey.port}")
    settings = GatewaySettings(redis_url=there, store_dir=tmp_path)  # type: ignore[arg-type]
    app = create_app(settings, log=make_log("json", log_lines))

    async def told() -> bool:
        said = [json.loads(line) for line in log_lines.getvalue().splitlines()]
        return any(cause in line.get("cause", "") for line in said if line.get("chore") == "_reap")

    async with app.router.lifespan_context(app):
        await until(told)
    assert "s3cret" not in log_lines.getvalue()


async def test_readyz_without_redis_leaves_the_cause_to_the_log(tmp_path: Path, log_lines: io.StringIO) -> None:
    settings = GatewaySettings(redis_url="redis://:s3cret@127.0.0.1:1/0", store_dir=tmp_path)  # type: ignore[arg-type]
    app = create_app(settings, log=make_log("json", log_lines))
    async with app.router.lifespan_context(app), client_of(app) as client:
        answer = await client.get("/readyz")
    (line,) = [line for line in map(json.loads, log_lines.getvalue().splitlines()) if line["event"] == "request"]
    assert "connecting to 127.0.0.1:1" in line["cause"]
    assert "127.0.0.1" not in answer.text
    assert "s3cret" not in log_lines.getvalue()


async def test_readyz_of_a_redis_that_says_nothing_leaves_that_to_the_log(
    own_valkey: Valkey, tmp_path: Path, log_lines: io.StringIO
) -> None:
    settings = GatewaySettings(redis_url=own_valkey.url, store_dir=tmp_path)  # type: ignore[arg-type]
    app = create_app(settings, log=make_log("json", log_lines))
    async with app.router.lifespan_context(app), client_of(app) as client:
        own_valkey.pause()
        try:
            assert (await client.get("/readyz")).status_code == 503
        finally:
            own_valkey.resume()
    (line,) = [line for line in map(json.loads, log_lines.getvalue().splitlines()) if line["event"] == "request"]
    assert line["cause"] in ("no answer within 2 s", "Timeout reading from socket")


async def test_readyz_is_503_without_store_and_only_the_log_names_its_folder(
    settings: GatewaySettings, tmp_path: Path, log_lines: io.StringIO
) -> None:
    (tmp_path / "file").write_text("not a folder")
    blocked = GatewaySettings(**settings.model_dump() | {"store_dir": tmp_path / "file" / "pictures"})
    app = create_app(blocked, log=make_log("json", log_lines))
    async with app.router.lifespan_context(app), client_of(app) as client:
        answer = await client.get("/readyz")
    assert answer.status_code == 503
    assert answer.json()["redis"] == "ok"
    assert "not reachable" in answer.json()["store"]
    assert str(tmp_path) not in answer.text
    assert str(tmp_path / "file") in json.loads(log_lines.getvalue().splitlines()[-1])["cause"]


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/v1/models", "/v1/models/tiny"])
async def test_head_answers_as_get_does_without_the_body(served: httpx.AsyncClient, path: str) -> None:
    head, get = await served.head(path), await served.get(path)
    assert (head.status_code, head.content) == (200, b"")
    for name in ("content-type", "content-length"):
        assert head.headers[name] == get.headers[name]


async def test_readyz_is_503_while_draining(client: httpx.AsyncClient, app: FastAPI) -> None:
    app.state.gateway.draining.set()
    answer = await client.get("/readyz")
    assert (answer.status_code, answer.json()["draining"]) == (503, True)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/generations"),
        ("GET", "/v1/generations/gen_" + "0" * 31),
        ("GET", "/v1/generations/gen_" + "0" * 31 + "/images/0"),
        ("POST", "/v1/generations/gen_" + "0" * 31 + "/cancel"),
        ("GET", "/v1/models"),
        ("GET", "/v1/models/tiny"),
    ],
)
async def test_without_redis_every_route_is_a_503_with_retry_after(
    cut_off: httpx.AsyncClient, method: str, path: str
) -> None:
    answer = await cut_off.request(method, path, json=ASKED if path == "/v1/generations" else None)
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "2"
    assert answer.json()["error"]["code"] == "queue_unavailable"


async def test_silent_redis_hangs_nothing(own_valkey: Any, tmp_path: Path) -> None:
    settings = GatewaySettings(redis_url=own_valkey.url, store_dir=tmp_path)
    app = create_app(settings)
    async with app.router.lifespan_context(app), client_of(app) as client:
        assert (await client.get("/readyz")).status_code == 200
        own_valkey.pause()
        try:
            async with asyncio.timeout(10):
                created, ready, metrics = await asyncio.gather(
                    client.post("/v1/generations", json=ASKED), client.get("/readyz"), client.get("/metrics")
                )
        finally:
            own_valkey.resume()
    assert (created.status_code, ready.status_code, metrics.status_code) == (503, 503, 200)
    assert "darkroom_queue_up 0.0" in metrics.text


async def test_metrics_count_requests_by_route_method_and_status(client: httpx.AsyncClient) -> None:
    await client.get("/v1/generations/gen_1")
    await client.get("/v1/generations/gen_2")
    await client.get("/nowhere/at/all")
    await client.request("BREW", "/healthz")
    found = await samples(client)
    route = "/v1/generations/{id}"
    assert named(found, "darkroom_requests_total", route=route, method="GET", status="404") == 2
    assert named(found, "darkroom_requests_total", route="unmatched", method="GET", status="404") == 1
    assert named(found, "darkroom_requests_total", route="/healthz", method="other", status="405") == 1
    assert named(found, "darkroom_request_seconds_count", route=route, method="GET") == 2


async def test_metrics_count_generations_by_outcome(served: httpx.AsyncClient) -> None:
    await served.post("/v1/generations", json=ASKED)
    await served.post("/v1/generations", json=ASKED | {"steps": 11})
    await served.post("/v1/generations", json=ASKED | {"steps": "x"})
    await served.post("/v1/generations", json=ASKED | {"model": "made-up"})
    await served.post("/v1/generations", json=ASKED | {"prompt": "x" * 100_000})
    found, name = await samples(served), "darkroom_generations_total"
    assert named(found, name, model="tiny", dialect="native", outcome="accepted", reason="") == 1
    assert named(found, name, model="tiny", dialect="native", outcome="rejected", reason="invalid_field") == 1
    assert named(found, name, model="unknown", dialect="native", outcome="rejected", reason="invalid_field") == 1
    assert named(found, name, model="unknown", dialect="native", outcome="rejected", reason="unknown_model") == 1
    assert named(found, name, model="unknown", dialect="native", outcome="rejected", reason="body_too_large") == 1


async def test_metrics_show_the_queue_and_the_workers(served: httpx.AsyncClient, worker: FakeWorker) -> None:
    worker.stop()
    for priority in ("low", "low", "high"):
        await served.post("/v1/generations", json=ASKED | {"priority": priority})
    found = await samples(served)
    assert named(found, "darkroom_queue_up") == 1
    assert named(found, "darkroom_queue_depth", model="tiny", priority="low") == 2
    assert named(found, "darkroom_queue_depth", model="tiny", priority="high") == 1
    assert named(found, "darkroom_queue_depth", model="tiny", priority="normal") == 0
    assert named(found, "darkroom_queue_bound") == 1000
    assert named(found, "darkroom_model_workers", model="tiny") == 0


async def test_metrics_count_how_generations_ended(served: httpx.AsyncClient, worker: FakeWorker) -> None:
    worker.stop()
    asked = await served.post("/v1/generations", json=ASKED)
    await served.post(f"/v1/generations/{asked.json()['id']}/cancel")
    found = await samples(served)
    assert named(found, "darkroom_generations_ended_total", model="tiny", outcome="canceled", reason="") == 1


async def test_metrics_tell_of_redis_memory_and_of_records_that_went_early(served: httpx.AsyncClient) -> None:
    found = await samples(served)
    assert named(found, "darkroom_redis_memory_bytes") > 0
    assert named(found, "darkroom_redis_memory_limit_bytes") == 0
    assert named(found, "darkroom_records_dropped_total") == 0


async def test_metrics_tell_the_seconds_of_work_also_where_the_speed_was_never_measured(
    served: httpx.AsyncClient, worker: FakeWorker, settings: GatewaySettings
) -> None:
    worker.stop()
    large = {"model": "sd3.5-large", "width": 1024, "height": 1024, "steps": 10}
    for asked in (ASKED, ASKED | large):
        assert (await served.post("/v1/generations", json=asked)).status_code == 202
    intake = Intake.connect(settings, "measured")
    intake.renew(["tiny", "sd3.5-large"], {"sd3.5-large": 2.0})
    found = await samples(served)
    intake.retire()
    intake.close()
    megapixel_steps = 1024 * 1024 * 10 * 2 / 1e6
    assert named(found, "darkroom_queue_seconds", model="sd3.5-large") == pytest.approx(megapixel_steps / 2)
    work = 64 * 64 * 2 * 2 / 1e6
    assert named(found, "darkroom_queue_seconds", model="tiny") == pytest.approx(work / ASSUMED_SPEED)
    assert named(found, "darkroom_queue_seconds", model="sd3.5-large-turbo") == 0
    oldest = "darkroom_queue_oldest_age_seconds"
    assert named(found, oldest, model="tiny", priority="normal") > 0
    assert named(found, oldest, model="tiny", priority="low") == 0


async def test_metrics_without_redis_have_all_but_the_queue(cut_off: httpx.AsyncClient) -> None:
    found = await samples(cut_off)
    assert named(found, "darkroom_queue_up") == 0
    assert not [name for name, _ in found if name.startswith(("darkroom_queue_depth", "darkroom_model"))]


class Store(FolderStore):
    """A store that breaks, or says nothing until it may."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.broken, self.asked = False, 0
        self.may_answer = threading.Event()
        self.may_answer.set()

    def check(self) -> None:
        self.asked += 1
        self.may_answer.wait(60)
        if self.broken:
            raise StoreUnavailable("not reachable")


async def test_store_up_follows_the_store(tmp_path: Path) -> None:
    metrics, store = Metrics(), Store(tmp_path)
    await metrics.check_store(store)
    assert metrics.registry.get_sample_value("darkroom_store_up") == 1
    store.broken = True
    with pytest.raises(StoreUnavailable):
        await metrics.check_store(store)
    assert metrics.registry.get_sample_value("darkroom_store_up") == 0


async def test_a_silent_store_is_down_and_is_not_asked_again_before_it_answers(tmp_path: Path) -> None:
    metrics, store = Metrics(store_timeout_s=0.05), Store(tmp_path)
    await metrics.check_store(store)
    store.may_answer.clear()
    for _ in range(3):
        await metrics.check_store(store)
        assert metrics.registry.get_sample_value("darkroom_store_up") == 0
    assert store.asked == 2
    store.may_answer.set()
    while not metrics.registry.get_sample_value("darkroom_store_up"):
        await metrics.check_store(store)


async def test_metrics_say_that_the_store_is_up(client: httpx.AsyncClient) -> None:
    async def is_up() -> bool:
        return named(await samples(client), "darkroom_store_up") == 1

    await until(is_up)


async def test_two_gateways_of_one_process_count_apart(settings: GatewaySettings, client: httpx.AsyncClient) -> None:
    await client.get("/healthz")
    app = create_app(settings)
    async with app.router.lifespan_context(app), client_of(app) as other:
        assert (
            named(await samples(other), "darkroom_requests_total", route="/healthz", method="GET", status="200") is None
        )


async def test_log_has_a_line_for_each_request_and_no_prompt(served: httpx.AsyncClient, log_lines: io.StringIO) -> None:
    answer = await served.post(
        "/v1/generations", json=ASKED | {"prompt": "my secret wish"}, headers={"x-request-id": "r-1"}
    )
    await served.get("/healthz")
    await served.post("/v1/generations", json=ASKED | {"prompt": "my secret wish", "steps": 0})
    lines = [json.loads(line) for line in log_lines.getvalue().splitlines()]
    assert [line["status"] for line in lines] == [202, 422]
    assert lines[0]["request_id"] == "r-1"
    assert lines[0]["generation"] == answer.json()["id"]
    assert lines[1]["error_code"] == "invalid_field"
    assert "secret" not in log_lines.getvalue()


@pytest.mark.parametrize("asked", ["abc-1.2:3_X", "a" * 128])
async def test_request_id_of_the_client_is_kept(client: httpx.AsyncClient, asked: str) -> None:
    assert (await client.get("/healthz", headers={"x-request-id": asked})).headers["x-request-id"] == asked


@pytest.mark.parametrize("asked", ["", "a b", "a" * 129, "<script>", "é"])
async def test_request_id_that_is_not_sane_is_replaced(client: httpx.AsyncClient, asked: str) -> None:
    answer = await client.get("/healthz", headers={"x-request-id": asked.encode()})
    assert answer.headers["x-request-id"].startswith("req_")


def test_log_for_people_has_the_traceback_but_no_variables() -> None:
    stream = io.StringIO()
    secret = "my " + "wish"
    try:
        raise ValueError("broken")
    except ValueError:
        make_log("console", stream).exception("request_failed", request_id="r-1")
    assert "request_failed" in stream.getvalue()
    assert "ValueError: broken" in stream.getvalue()
    assert secret not in stream.getvalue()


async def test_jobs_past_their_deadline_are_ended_though_nobody_looks(settings: GatewaySettings) -> None:
    late = make_job(deadline_s=-1)
    queue = JobQueue.connect(settings)
    await queue.submit(late)
    async with redis.asyncio.Redis.from_url(str(settings.redis_url)) as seen:  # `view` would end it itself
        assert await seen.hget(f"rq:job:{late.id}", "status") == b"queued"
        app = create_app(settings, queue)
        async with app.router.lifespan_context(app), asyncio.timeout(10):
            while await seen.hget(f"rq:job:{late.id}", "status") != b"failed":
                await asyncio.sleep(0.01)
        assert (await queue.view(late.id)).status == "failed"
    await queue.close()
