"""What somebody who means harm may try: other people's jobs, bodies, headers, paths; and what the log keeps."""

from __future__ import annotations

import asyncio
import io
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from app.logs import make_log
from app.main import create_app
from app.settings import GatewaySettings
from tests.app.conftest import client_of, key_of, until
from tests.app.fake_worker import FakeWorker
from tests.app.test_server import HEAD, gateway
from worker.contract.job import Job
from worker.contract.keys import Keyring
from worker.contract.queue import Accepted, JobQueue

PROMPT = "a very secret circle"
TINY = {"model": "tiny", "prompt": PROMPT}
REPLICATE = "/v1/models/stability-ai/stable-diffusion-3.5-large/predictions"
STABILITY = "/v2beta/stable-image/generate/sd3"


@pytest.fixture
def settings(settings: GatewaySettings) -> GatewaySettings:
    """Keys are on."""
    return settings.model_copy(update={"auth": "on"})


async def made_by(client: httpx.AsyncClient, headers: dict[str, str]) -> str:
    answer = await client.post("/v1/generations", json=TINY, headers=headers | {"prefer": "wait=10"})
    assert answer.status_code == 200, answer.text
    return str(answer.json()["id"])


CALLS = [
    ("GET", "/v1/generations/{id}"),
    ("GET", "/v1/generations/{id}/images/0"),
    ("GET", "/v1/generations/{id}/events"),
    ("POST", "/v1/generations/{id}/cancel"),
    ("DELETE", "/v1/generations/{id}"),
    ("GET", "/v2beta/results/{id}"),
    ("GET", "/v1/predictions/{id}"),
    ("GET", "/v1/predictions/{id}/stream"),
    ("POST", "/v1/predictions/{id}/cancel"),
]


@pytest.mark.parametrize(("method", "path"), CALLS)
async def test_another_keys_job_does_not_exist(
    client: httpx.AsyncClient, settings: GatewaySettings, worker: FakeWorker, method: str, path: str
) -> None:
    """No answer tells a job of somebody else's from one that never was."""
    owner, other = key_of(settings, "owner"), key_of(settings, "other")
    job_id = await made_by(client, owner)
    never = "gen_" + "0" * 31
    same = other | {"x-request-id": "r-1"}  # ids of errors are made from it
    theirs = await client.request(method, path.format(id=job_id), headers=same)
    nobodys = await client.request(method, path.format(id=never), headers=same)
    assert theirs.status_code == nobodys.status_code == 404
    assert theirs.text.replace(job_id, "ID") == nobodys.text.replace(never, "ID")
    assert (await client.get(f"/v1/generations/{job_id}", headers=owner)).status_code == 200


async def test_another_keys_running_job_goes_on_when_it_is_canceled(
    client: httpx.AsyncClient, settings: GatewaySettings, worker: FakeWorker
) -> None:
    worker.go_on.clear()
    owner, other = key_of(settings, "owner"), key_of(settings, "other")
    job_id = (await client.post("/v1/generations", json=TINY, headers=owner)).json()["id"]
    for method, path in CALLS:
        if method != "GET":
            assert (await client.request(method, path.format(id=job_id), headers=other)).status_code == 404
    worker.go_on.set()

    async def succeeded() -> bool:
        view = (await client.get(f"/v1/generations/{job_id}", headers=owner)).json()
        assert not view["cancel_requested"]
        return bool(view["status"] == "succeeded")

    await until(succeeded)


async def test_lists_hold_ones_own_jobs_alone(
    client: httpx.AsyncClient, settings: GatewaySettings, worker: FakeWorker
) -> None:
    mine, yours = key_of(settings, "me"), key_of(settings, "you")
    job_id, other_id = await made_by(client, mine), await made_by(client, yours)
    predicted = (await client.post(REPLICATE, json={"input": {"prompt": PROMPT}}, headers=mine)).json()["id"]
    listed = (await client.get("/v1/generations", headers=mine)).json()["generations"]
    assert {one["id"] for one in listed} == {job_id, predicted}
    # A cursor that is another's job shows nothing of it
    after = (await client.get("/v1/generations", params={"cursor": other_id}, headers=mine)).json()["generations"]
    assert {one["id"] for one in after} <= {job_id, predicted}
    assert other_id not in (await client.get("/v1/predictions", headers=mine)).text


async def test_an_admin_sees_and_cancels_all(
    client: httpx.AsyncClient, settings: GatewaySettings, worker: FakeWorker
) -> None:
    worker.go_on.clear()
    owner, admin = key_of(settings, "owner"), key_of(settings, "root", scopes=("admin",))
    job_id = (await client.post("/v1/generations", json=TINY, headers=owner)).json()["id"]
    assert (await client.get(f"/v1/generations/{job_id}", headers=admin)).status_code == 200
    assert (await client.post(f"/v1/generations/{job_id}/cancel", headers=admin)).status_code == 200


async def test_one_idempotency_key_of_two_callers_is_two_jobs(
    client: httpx.AsyncClient, settings: GatewaySettings, worker: FakeWorker
) -> None:
    once = {"idempotency-key": "the-same"}
    first, second = key_of(settings, "one") | once, key_of(settings, "two") | once
    answers = [await client.post("/v1/generations", json=TINY, headers=headers) for headers in (first, second, first)]
    one, two, again = (answer.json()["id"] for answer in answers)
    assert one == again != two


async def test_jobs_of_a_revoked_key_go_on_and_are_nobodys(
    client: httpx.AsyncClient, settings: GatewaySettings, worker: FakeWorker
) -> None:
    job_id = await made_by(client, key_of(settings, "ci"))
    with Keyring.connect(settings) as keyring:
        keyring.revoke("ci")
    heir = key_of(settings, "ci")
    assert (await client.get(f"/v1/generations/{job_id}", headers=heir)).status_code == 404


async def test_jobs_from_before_keys_were_on_are_no_keys(
    client: httpx.AsyncClient, settings: GatewaySettings, worker: FakeWorker
) -> None:
    off = create_app(settings.model_copy(update={"auth": "off"}))
    async with off.router.lifespan_context(off), client_of(off) as anybody:
        job_id = await made_by(anybody, {})
    assert (await client.get(f"/v1/generations/{job_id}", headers=key_of(settings, "ci"))).status_code == 404


@pytest.mark.parametrize("path", ["/v1/generations", "/openai/v1/images/generations", REPLICATE, STABILITY])
async def test_a_large_body_is_refused_with_or_without_a_key(
    client: httpx.AsyncClient, settings: GatewaySettings, path: str
) -> None:
    for headers in ({}, key_of(settings, "ci")):
        answer = await client.post(path, content=b"x" * 11_000_000, headers=headers)
        assert answer.status_code == 413, answer.text


async def test_a_form_of_very_many_parts_is_refused(
    client: httpx.AsyncClient, settings: GatewaySettings, worker: FakeWorker
) -> None:
    form = [(f"p{n}", (None, "x")) for n in range(5000)]
    answer = await client.post(STABILITY, files=form, headers=key_of(settings, "ci"))  # type: ignore[arg-type]
    assert 400 <= answer.status_code < 500


async def test_json_nested_without_end_is_refused(client: httpx.AsyncClient, settings: GatewaySettings) -> None:
    headers = key_of(settings, "ci") | {"content-type": "application/json"}
    for path in ("/v1/generations", "/openai/v1/images/generations", REPLICATE):
        answer = await client.post(path, content=b"[" * 60_000, headers=headers)
        assert 400 <= answer.status_code < 500, (path, answer.text)


INJECTED = "a\r\nset-cookie: stolen=1"


@pytest.mark.parametrize(
    "header", ["x-request-id", "idempotency-key", "prefer", "last-event-id", "traceparent", "accept"]
)
async def test_a_line_break_in_a_header_reaches_no_answer(
    client: httpx.AsyncClient, settings: GatewaySettings, worker: FakeWorker, header: str
) -> None:
    """No web server lets one through; the app does not count on that."""
    ours = key_of(settings, "ci")
    for method, path in (("POST", "/v1/generations"), ("GET", "/v1/generations"), ("POST", STABILITY)):
        body = TINY if method == "POST" else None
        answer = await client.request(method, path, json=body, headers=ours | {header: INJECTED})
        assert answer.status_code < 500
        assert_clean(answer)


@pytest.mark.parametrize(
    "path",
    [
        "/v1/generations/gen_%0d%0aset-cookie:%20stolen=1",
        "/v1/generations/%0d%0aset-cookie:%20stolen=1/images/0",
        "/v1/models/x%0d%0aset-cookie:%20stolen=1",
        "/v2beta/results/%0d%0aset-cookie:%20stolen=1",
        "/openai/v1/models/%0d%0aset-cookie:%20stolen=1",
        "/v1/models/a/b%0d%0aset-cookie:%20stolen=1",
        "/playground/%0d%0aset-cookie:%20stolen=1",
    ],
)
async def test_a_line_break_in_an_id_reaches_no_answer(
    client: httpx.AsyncClient, settings: GatewaySettings, worker: FakeWorker, path: str
) -> None:
    answer = await client.get(path, headers=key_of(settings, "ci"))
    assert 400 <= answer.status_code < 500
    assert_clean(answer)


async def test_a_line_break_in_a_file_name_reaches_no_answer(
    client: httpx.AsyncClient, settings: GatewaySettings, worker: FakeWorker
) -> None:
    body = (
        b'--b\r\ncontent-disposition: form-data; name="prompt"\r\n\r\na circle\r\n'
        b'--b\r\ncontent-disposition: form-data; name="none"; filename="a\r\nset-cookie: stolen=1"\r\n\r\n\r\n--b--\r\n'
    )
    headers = key_of(settings, "ci") | {"content-type": "multipart/form-data; boundary=b"}
    answer = await client.post(STABILITY, content=body, headers=headers)
    assert answer.status_code < 500
    assert_clean(answer)


def assert_clean(answer: httpx.Response) -> None:
    assert "set-cookie" not in answer.headers
    for name, value in answer.headers.multi_items():
        assert not set("\r\n\0") & set(name + value), (name, value)


@pytest.mark.parametrize(
    "tail",
    [
        "images/../../../../etc/passwd",
        "images/..%2f..%2f..%2f..%2fetc%2fpasswd",
        "images/%2e%2e/%2e%2e/etc/passwd",
        "images/..%5c..%5cwindows",
        "images//etc/passwd",
        "images/0%00.png",
        "images/0/%2e%2e/0",
        "images/-1",
        "images/1e0",
        "images/0x0",
        "images/%EF%BC%91",  # a digit, but not one of ours
        "images/" + "9" * 400,
        "images/0.png",
    ],
)
async def test_a_path_that_plays_tricks_finds_nothing(
    client: httpx.AsyncClient, settings: GatewaySettings, worker: FakeWorker, tail: str
) -> None:
    owner = key_of(settings, "ci")
    job_id = await made_by(client, owner)
    request = client.build_request("GET", "/", headers=owner)
    request.url = request.url.copy_with(raw_path=f"/v1/generations/{job_id}/{tail}".encode())  # as it is, unnormalized
    answer = await client.send(request)
    assert answer.status_code in (404, 422), answer.text
    assert "root:" not in answer.text


@pytest.mark.parametrize(
    "name",
    ["..%2fsettings.py", "%2e%2e/settings.py", "..%2f..%2fpyproject.toml", "%2fetc%2fpasswd", "index.html%00.py"],
)
async def test_the_playground_serves_its_own_files_alone(client: httpx.AsyncClient, name: str) -> None:
    request = client.build_request("GET", "/")
    request.url = request.url.copy_with(raw_path=f"/playground/{name}".encode())
    assert (await client.send(request)).status_code in (401, 404)


async def test_a_failure_of_ours_tells_neither_key_nor_prompt_to_the_log(
    settings: GatewaySettings, worker: FakeWorker
) -> None:
    class Broken(JobQueue):
        async def submit(self, job: Job, **_options: Any) -> Accepted:
            raise ValueError("something broke")

    lines = io.StringIO()
    headers = key_of(settings, "ci")
    queue = Broken.connect(settings)
    app = create_app(settings, queue, log=make_log("json", lines))
    async with app.router.lifespan_context(app), client_of(app) as client:
        for path, body in (("/v1/generations", TINY), (REPLICATE, {"input": {"prompt": PROMPT}})):
            assert (await client.post(path, json=body, headers=headers)).status_code == 500
    await queue.close()
    assert "something broke" in lines.getvalue()
    assert_silent(lines.getvalue(), headers)


async def test_the_log_has_the_id_of_a_key_and_no_secret_and_no_prompt(
    app: FastAPI, client: httpx.AsyncClient, settings: GatewaySettings, worker: FakeWorker, log_lines: io.StringIO
) -> None:
    headers = key_of(settings, "ci")
    wrong = {"authorization": headers["authorization"][:-3] + "xxx"}
    job_id = await made_by(client, headers)
    url = (await client.get(f"/v1/generations/{job_id}", headers=headers)).json()["images"][0]["url"]
    await client.get(url)
    for given in (headers, wrong, {"x-api-key": headers["authorization"][7:]}, {"x-api-key": PROMPT}):
        await client.post("/v1/generations", json=TINY | {"steps": 0}, headers=given)
        await client.post("/v1/generations", json=TINY | {PROMPT: 1}, headers=given)
        await client.post("/openai/v1/images/generations", json={"prompt": PROMPT, "size": PROMPT}, headers=given)
        await client.post(REPLICATE, json={"input": {"prompt": PROMPT}}, headers=given)
        await client.post(STABILITY, files={"prompt": (None, PROMPT)}, headers=given)
        await client.get(f"/v1/models/{PROMPT}", headers=given)
    assert_silent(log_lines.getvalue(), headers, url.partition("signature=")[2])
    told = [json.loads(line) for line in log_lines.getvalue().splitlines()]
    assert headers["authorization"][10:22] in {line.get("key") for line in told}


def assert_silent(log: str, headers: dict[str, str], *more: str) -> None:
    for secret in (PROMPT, PROMPT.replace(" ", "%20"), headers["authorization"][-43:-5], *more):
        assert secret
        assert secret not in log


async def test_a_real_gateway_stands_what_is_sent_to_its_socket(
    settings: GatewaySettings, worker: FakeWorker, tmp_path: Path
) -> None:
    headers = key_of(settings, "ci")
    key = f"authorization: {headers['authorization']}\r\nconnection: close\r\n".encode()
    env = {"DARKROOM_AUTH": "on", "DARKROOM_BODY_TIMEOUT_S": "1"}
    body = json.dumps(TINY).encode()
    async with gateway(settings, tmp_path, **env) as running:
        slow = running.exchange(HEAD + key + b"content-length: 500\r\n\r\n", body)
        keyless = running.exchange(HEAD + b"connection: close\r\ncontent-length: %d\r\n\r\n" % len(body), body)
        bare_return = running.exchange(b"GET /healthz HTTP/1.1\r\nhost: x\r\nx-request-id: a\rset-cookie: b\r\n\r\n")
        two_lengths = running.exchange(HEAD + key + b"content-length: 5\r\ncontent-length: 500\r\n\r\n{}")
        both = running.exchange(HEAD + key + b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n")
        signed = running.exchange(
            b"GET /v1/generations/gen_%s/images/0?expires=9&signature=%s HTTP/1.1\r\n"
            b"host: x\r\nconnection: close\r\n\r\n" % (b"0" * 31, b"s" * 43)
        )
        dots = running.exchange(
            b"GET /playground/../../../../etc/passwd HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
        )
        answers = await asyncio.gather(slow, keyless, bare_return, two_lengths, both, signed, dots)
        alive = await running.exchange(b"GET /healthz HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        log = running.log.read_text()
    statuses = [answer[9:12] for answer in answers]
    assert statuses[:2] == [b"408", b"401"]
    assert statuses[2:5] == [b"400"] * 3
    assert statuses[5:] == [b"403", b"404"]
    assert all(b"set-cookie" not in answer.partition(b"\r\n\r\n")[0] for answer in answers)
    assert alive.startswith(b"HTTP/1.1 200")
    assert_silent(log, headers, "s" * 43)
