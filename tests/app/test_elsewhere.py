"""Who else talks to the gateway: pages of other origins, proxies, clients that hang up."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from pydantic import ValidationError

from app import middleware
from app.logs import make_log
from app.main import create_app
from app.settings import GatewaySettings
from tests.app.conftest import client_of, until
from tests.app.dialects.conftest import Live
from tests.app.fake_worker import FakeWorker
from worker.contract.job import Job
from worker.contract.queue import Accepted, JobQueue

TINY = {"model": "tiny", "prompt": "a red circle"}
STUDIO = "https://studio.example"


def asked_by(origin: str, **more: str) -> dict[str, str]:
    return {"origin": origin, **{name.replace("_", "-"): value for name, value in more.items()}}


async def test_pages_of_other_origins_may_not_call_by_default(client: httpx.AsyncClient) -> None:
    preflight = asked_by(STUDIO, access_control_request_method="POST")
    assert (await client.options("/v1/generations", headers=preflight)).status_code == 405
    assert "access-control-allow-origin" not in (await client.get("/healthz", headers=asked_by(STUDIO))).headers


async def test_pages_of_an_origin_that_is_allowed_may_call_and_read_refusals(settings: GatewaySettings) -> None:
    class Broken(JobQueue):
        async def page(self, owner: str, **_options: Any) -> Any:
            raise ValueError

    allowing = settings.model_copy(update={"cors_origins": f"{STUDIO}, http://localhost:3000"})
    queue = Broken.connect(allowing)
    async with client_of(create_app(allowing, queue)) as client:
        headers = asked_by(
            STUDIO, access_control_request_method="POST", access_control_request_headers="authorization,x-api-key"
        )
        preflight = await client.options("/v1/generations", headers=headers)
        refused = await client.get(f"/v1/generations/gen_{'0' * 31}", headers=asked_by(STUDIO))
        failed = await client.get("/v1/generations", headers=asked_by(STUDIO))
        stranger = await client.get("/healthz", headers=asked_by("https://evil.example"))
    await queue.close()
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == STUDIO
    assert preflight.headers["access-control-allow-headers"] == "authorization,x-api-key"
    assert (refused.status_code, failed.status_code) == (404, 500)
    for answer in (refused, failed):
        assert answer.headers["access-control-allow-origin"] == STUDIO
        assert "retry-after" in answer.headers["access-control-expose-headers"]
        assert answer.headers["x-request-id"]
    assert "access-control-allow-origin" not in stranger.headers


async def test_pages_of_other_origins_read_whether_to_try_again(settings: GatewaySettings) -> None:
    allowing = settings.model_copy(update={"cors_origins": STUDIO})
    queue = JobQueue.connect(allowing)
    async with client_of(create_app(allowing, queue)) as client:
        refused = await client.post("/openai/v1/images/generations", json={}, headers=asked_by(STUDIO))
    await queue.close()
    assert refused.headers["x-should-retry"] == "false"
    assert "x-should-retry" in refused.headers["access-control-expose-headers"].split(", ")


@pytest.mark.parametrize("asked_by_origin", [STUDIO, "https://evil.example"])
async def test_preflight_has_a_request_id_and_a_line_in_the_log(
    settings: GatewaySettings, log_lines: io.StringIO, asked_by_origin: str
) -> None:
    allowing = settings.model_copy(update={"cors_origins": STUDIO})
    queue = JobQueue.connect(allowing)
    async with client_of(create_app(allowing, queue, log=make_log("json", log_lines))) as client:
        headers = asked_by(asked_by_origin, access_control_request_method="POST", x_request_id="r-1")
        answer = await client.options("/v1/generations", headers=headers)
    await queue.close()
    assert answer.headers["x-request-id"] == "r-1"
    (line,) = map(json.loads, log_lines.getvalue().splitlines())
    assert (line["request_id"], line["method"], line["route"]) == ("r-1", "OPTIONS", "/v1/generations")
    assert line["status"] == answer.status_code


@pytest.mark.parametrize(
    "wrong",
    [
        {"cors_origins": "studio.example"},
        {"cors_origins": "https://studio.example/path"},
        {"trusted_proxies": "everyone"},
        {"trusted_proxies": "10.0.0.1/8"},
        {"max_multipart_bytes": 5},
    ],
)
def test_setting_that_is_wrong_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        GatewaySettings(**wrong)


async def test_client_that_hangs_up_while_it_is_held_leaves_its_job_running(
    settings: GatewaySettings, worker: FakeWorker
) -> None:
    worker.go_on.clear()
    live = Live(settings)
    await asyncio.to_thread(live.__enter__)
    try:
        host, port = live.url.removeprefix("http://").split(":")
        _reader, writer = await asyncio.open_connection(host, int(port))
        body = json.dumps(TINY).encode()
        head = f"POST /v1/generations HTTP/1.1\r\nhost: 127.0.0.1\r\nprefer: wait=60\r\ncontent-length: {len(body)}\r\n"
        writer.write(head.encode() + b"content-type: application/json\r\n\r\n" + body)
        await writer.drain()

        async def held() -> bool:
            return bool(worker.running)

        await until(held)
        writer.close()
        async with httpx.AsyncClient(base_url=live.url, trust_env=False) as client:

            async def counted() -> bool:
                return 'route="/v1/generations",status="499"' in (await client.get("/metrics")).text

            await until(counted)
            worker.go_on.set()

            async def succeeded() -> bool:
                (generation,) = (await client.get("/v1/generations")).json()["generations"]
                return bool(generation["status"] == "succeeded")

            await until(succeeded)
    finally:
        worker.go_on.set()
        await asyncio.to_thread(live.__exit__)


async def test_form_may_be_larger_than_json_and_is_bounded_too(settings: GatewaySettings) -> None:
    small = settings.model_copy(update={"max_body_bytes": 1024, "max_multipart_bytes": 4096})
    queue = JobQueue.connect(small)
    async with client_of(create_app(small, queue)) as client:
        form = {"content-type": "multipart/form-data; boundary=x"}
        found = [
            (await client.post("/v1/generations", content=b"x" * size, headers=headers)).status_code
            for headers, size in (({}, 2000), (form, 2000), (form, 5000))
        ]
    await queue.close()
    assert found == [413, 415, 413]


async def test_large_bodies_are_read_a_few_at_a_time_and_others_beside_them(
    settings: GatewaySettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(middleware, "LARGE_BODIES", 1)
    small = settings.model_copy(update={"max_body_bytes": 1024, "max_multipart_bytes": 4096})
    queue = JobQueue.connect(small)
    sent, rest = asyncio.Event(), asyncio.Event()
    form = {"content-type": "multipart/form-data; boundary=x"}

    async def slowly() -> AsyncIterator[bytes]:
        yield b"x" * 2000
        sent.set()
        await rest.wait()
        yield b"x"

    async with client_of(create_app(small, queue)) as client:

        async def post(content: Any, headers: dict[str, str]) -> httpx.Response:
            return await client.post("/v1/generations", content=content, headers=headers)

        first = asyncio.create_task(post(slowly(), form))
        await sent.wait()
        second = await post(b"x" * 2000, form)
        others = [(await post(b"x" * size, headers)).status_code for size, headers in ((500, form), (500, {}))]
        rest.set()
        assert (await first).status_code == 415
        again = await post(b"x" * 2000, form)
    await queue.close()
    assert (second.status_code, second.json()["error"]["code"]) == (503, "busy")
    assert second.headers["retry-after"] == "1"
    assert others == [415, 415]
    assert again.status_code == 415


async def test_trace_of_the_caller_goes_with_the_job(settings: GatewaySettings, worker: FakeWorker) -> None:
    traces = []

    class Noting(JobQueue):
        async def submit(self, job: Job, **options: Any) -> Accepted:
            traces.append(job.trace)
            return await super().submit(job, **options)

    queue = Noting.connect(settings)
    parent = f"00-{'a' * 32}-{'b' * 16}-01"
    async with client_of(create_app(settings, queue)) as client:
        for header in (parent, "rubbish"):
            await client.post("/v1/generations", json=TINY, headers={"traceparent": header})
    await queue.close()
    assert traces == [parent, ""]
