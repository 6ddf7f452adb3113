"""The gateway as a process: bodies on a real socket, signals, what it imports."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import httpx
import pytest

from app.settings import GatewaySettings
from tests.app.conftest import until
from tests.app.fake_worker import FakeWorker

ROOT = Path(__file__).parents[2]
SERVE = "from app.main import serve; from app.settings import GatewaySettings; serve(GatewaySettings())"
BODY = json.dumps({"model": "tiny", "prompt": "a red circle"}).encode()
HEAD = b"POST /v1/generations HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"


class Process:
    """A gateway in a process of its own."""

    def __init__(self, settings: GatewaySettings, log: Path, **env: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        given = {
            "DARKROOM_REDIS_URL": str(settings.redis_url),
            "DARKROOM_STORE_DIR": str(settings.store_dir),
            "DARKROOM_PORT": str(self.port),
        }
        environment = os.environ | given | env
        with log.open("wb") as stderr:
            self.child = subprocess.Popen([sys.executable, "-c", SERVE], cwd=ROOT, env=environment, stderr=stderr)

    async def ready(self) -> None:
        async def answers() -> bool:
            assert self.child.poll() is None, self.log.read_text()
            try:
                async with httpx.AsyncClient(trust_env=False) as client:
                    return (await client.get(f"{self.url}/readyz")).status_code == 200
            except httpx.TransportError:
                return False

        await until(answers, 30)

    async def exchange(self, *pieces: bytes) -> bytes:
        """Sends the pieces on one connection and returns all that comes back until the server closes it."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
            async with asyncio.timeout(10):
                return await reader.read()
        finally:
            writer.close()


@contextmanager
def process(settings: GatewaySettings, log: Path, **env: str) -> Iterator[Process]:
    gateway = Process(settings, log, **env)
    try:
        yield gateway
    finally:
        gateway.child.kill()
        gateway.child.wait()


@asynccontextmanager
async def gateway(settings: GatewaySettings, tmp_path: Path, **env: str) -> AsyncIterator[Process]:
    with process(settings, tmp_path / "gateway.log", **env) as running:
        await running.ready()
        yield running


async def test_bodies_are_bounded_in_size_and_time(settings: GatewaySettings, tmp_path: Path) -> None:
    async with gateway(settings, tmp_path, DARKROOM_MAX_BODY_BYTES="2000", DARKROOM_BODY_TIMEOUT_S="1") as running:
        close = b"connection: close\r\n"
        declared = HEAD + close + b"content-length: 300000\r\n\r\n"
        large = await running.exchange(declared, b"x" * 300_000)
        chunk = b"3e8\r\n" + b"x" * 1000 + b"\r\n"
        chunked = await running.exchange(HEAD + b"transfer-encoding: chunked\r\n\r\n", chunk, chunk, chunk)
        expecting = await running.exchange(HEAD + b"expect: 100-continue\r\ncontent-length: 300000\r\n\r\n")
        slow = await running.exchange(HEAD + b"content-length: 100\r\n\r\n{")
        within = await running.exchange(HEAD + close + b"content-length: %d\r\n\r\n" % len(BODY), BODY)
    for answer in (large, chunked, expecting):
        assert answer.startswith(b"HTTP/1.1 413 ")
        assert b'"code":"body_too_large","message":"the body is larger than the 2000 bytes allowed; pictures' in answer
    assert slow.startswith(b"HTTP/1.1 408 ")
    assert b'"code":"body_too_slow"' in slow
    assert b"connection: close" in slow
    assert within.startswith(b"HTTP/1.1 404 ")
    assert b"unknown_model" in within
    assert b"\r\nserver:" not in within
    assert b"\r\nx-request-id: req_" in within


async def test_head_of_a_picture_has_its_headers_alone(
    settings: GatewaySettings, worker: FakeWorker, tmp_path: Path
) -> None:
    async with gateway(settings, tmp_path) as running, httpx.AsyncClient(trust_env=False, timeout=20) as client:
        asked = JSON | {"prefer": "wait=10"}
        made = await client.post(f"{running.url}/v1/generations", content=BODY, headers=asked)
        url = made.json()["images"][0]["url"]
        get = await client.get(url)
        path = url.removeprefix(running.url).encode()
        head = await running.exchange(b"HEAD " + path + b" HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n\r\n")
    assert get.content
    assert head.startswith(b"HTTP/1.1 200 ")
    assert head.endswith(b"\r\n\r\n")
    for name in ("content-type", "content-length", "etag", "content-disposition"):
        assert f"\r\n{name}: {get.headers[name]}\r\n".encode() in head


async def test_headers_are_bounded_in_size(settings: GatewaySettings, tmp_path: Path) -> None:
    async with gateway(settings, tmp_path) as running:
        answer = await running.exchange(HEAD + b"a: " + b"x" * 70_000)
    assert answer.startswith(b"HTTP/1.1 431 ")


async def test_sigterm_answers_what_is_held_and_ends_cleanly(
    settings: GatewaySettings, worker: FakeWorker, tmp_path: Path
) -> None:
    worker.go_on.clear()
    async with gateway(settings, tmp_path) as running, httpx.AsyncClient(trust_env=False, timeout=20) as client:
        held = asyncio.create_task(
            client.post(f"{running.url}/v1/generations", content=BODY, headers=JSON | {"prefer": "wait=60"})
        )

        async def busy() -> bool:
            return bool(worker.running)

        await until(busy)
        running.child.send_signal(signal.SIGTERM)
        answer = await held
        code = await asyncio.to_thread(running.child.wait, 20)
    assert answer.status_code == 202
    assert code == 0
    lines = [json.loads(line) for line in running.log.read_text().splitlines()]
    assert {"request", "Application shutdown complete."} <= {line["event"] for line in lines}


async def test_sigterm_with_a_drain_is_not_ready_yet_serves(settings: GatewaySettings, tmp_path: Path) -> None:
    async with gateway(settings, tmp_path, DARKROOM_DRAIN_S="30") as running:
        async with httpx.AsyncClient(trust_env=False) as client:
            running.child.send_signal(signal.SIGTERM)

            async def draining() -> bool:
                return bool((await client.get(f"{running.url}/readyz")).status_code == 503)

            await until(draining)
            assert (await client.get(f"{running.url}/v1/models")).status_code == 200
        running.child.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(running.child.wait, 20) == 0


async def test_variable_that_nothing_reads_is_logged(settings: GatewaySettings, tmp_path: Path) -> None:
    async with gateway(settings, tmp_path, DARKROOM_AUHT="on") as running:
        events = [json.loads(line) for line in running.log.read_text().splitlines()]
    [found] = [event for event in events if event["event"] == "variable_unread"]
    assert (found["level"], found["told"]) == ("warning", "nothing reads DARKROOM_AUHT; did you mean DARKROOM_AUTH?")


async def test_scheme_is_believed_of_trusted_proxies_alone(settings: GatewaySettings, tmp_path: Path) -> None:
    async def scheme(proxies: str) -> str:
        headers = JSON | {"x-forwarded-proto": "https", "host": "pictures.localhost"}
        async with (
            gateway(settings, tmp_path, DARKROOM_TRUSTED_PROXIES=proxies) as running,
            httpx.AsyncClient(trust_env=False) as client,
        ):
            created = await client.post(f"{running.url}/v1/generations", content=BODY, headers=headers)
        return str(created.json()["urls"]["self"]).partition("/v1")[0]

    with FakeWorker(settings):
        assert await scheme("127.0.0.0/8") == "https://pictures.localhost"
        assert await scheme("10.0.0.0/8") == "http://pictures.localhost"


JSON = {"content-type": "application/json"}


@pytest.mark.parametrize("module", ["app.main", "worker.contract.queue"])
def test_gateway_never_loads_the_model_side(module: str) -> None:
    heavy = ["torch", "transformers", "safetensors", "numpy", "diffusers", "PIL"]
    code = f"import sys, {module}; print([name for name in {heavy} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
