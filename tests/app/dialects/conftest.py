"""A gateway on a port, for clients that know nothing of tests."""

from __future__ import annotations

import asyncio
import io
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI

from app.logs import make_log
from app.main import create_app
from app.settings import GatewaySettings
from tests.app.dialects.painter import Painter
from tests.conftest import Valkey
from worker.contract.queue import JobQueue


class Live:
    """A gateway that serves on a port of its own, in a thread of this process."""

    def __init__(self, settings: GatewaySettings, queue: JobQueue | None = None) -> None:
        self.app: FastAPI = create_app(settings, queue, log=make_log("json", io.StringIO()))
        config = uvicorn.Config(self.app, port=0, log_config=None, ws="none", timeout_graceful_shutdown=2)
        self.server = uvicorn.Server(config)
        self._thread = threading.Thread(target=asyncio.run, args=(self._serve(),), name="gateway")

    def __enter__(self) -> Live:
        self._thread.start()
        deadline = time.monotonic() + 10
        while not self.server.started:
            assert time.monotonic() < deadline, "the gateway does not start"
            time.sleep(0.01)
        self.url = f"http://127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}"
        return self

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        await self.server.serve()
        await self.app.state.gateway.queue.close()

    def drain(self) -> None:
        """As a first SIGTERM does."""
        self._loop.call_soon_threadsafe(self.app.state.gateway.draining.set)

    def jobs(self) -> list[dict[str, Any]]:
        """All generations so far, newest first, as the native API tells of them."""
        answer = httpx.get(f"{self.url}/v1/generations", params={"limit": 100}, trust_env=False)
        return list(answer.raise_for_status().json()["generations"])

    def __exit__(self, *error: object) -> None:
        self.server.should_exit = True
        self._thread.join(10)
        assert not self._thread.is_alive()


@pytest.fixture
def settings(settings: GatewaySettings) -> GatewaySettings:
    """Waits a few seconds for a picture, not minutes."""
    return settings.model_copy(update={"hold_s": 20.0})


@pytest.fixture
def worker(settings: GatewaySettings) -> Iterator[Painter]:
    """A fake worker that paints, its cards already published."""
    with Painter(settings) as worker:
        yield worker


@pytest.fixture
def alone(settings: GatewaySettings, worker: Painter) -> Iterator[Live]:
    """A gateway on a port for one test, which may count its jobs and hold up its worker."""
    with Live(settings) as live:
        yield live


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A gateway on a port for the tests of a file, with a worker of its own."""
    folder = tmp_path_factory.mktemp("live")
    server = Valkey(folder)
    server.start()
    settings = GatewaySettings(redis_url=server.url, store_dir=folder / "pictures", hold_s=20)  # type: ignore[arg-type]
    try:
        with Painter(settings), Live(settings) as live:
            yield live
    finally:
        server.stop()
