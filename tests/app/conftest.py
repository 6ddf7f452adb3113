"""A gateway on a real Valkey, and clients of it."""

from __future__ import annotations

import asyncio
import io
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from app.logs import make_log
from app.main import create_app
from app.settings import GatewaySettings
from tests.app.fake_worker import FakeWorker
from worker.contract.keys import Keyring, new_key

BASE_URL = "http://darkroom.localhost"


@pytest.fixture
def settings(redis_url: str, tmp_path: Path) -> GatewaySettings:
    """A gateway on the shared Valkey, with a store of its own."""
    return GatewaySettings(redis_url=redis_url, store_dir=tmp_path / "pictures")  # type: ignore[arg-type]


@pytest.fixture
def worker(settings: GatewaySettings) -> Iterator[FakeWorker]:
    """A fake worker that serves, its cards already published."""
    with FakeWorker(settings) as worker:
        yield worker


@pytest.fixture
def log_lines() -> io.StringIO:
    """What the gateway logs."""
    return io.StringIO()


@pytest.fixture
async def app(settings: GatewaySettings, log_lines: io.StringIO) -> AsyncIterator[FastAPI]:
    """A gateway that runs."""
    app = create_app(settings, log=make_log("json", log_lines))
    async with app.router.lifespan_context(app):
        yield app


@pytest.fixture
async def client(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the running gateway."""
    async with client_of(app) as client:
        yield client


@asynccontextmanager
async def client_of(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=BASE_URL) as client:
        yield client


@pytest.fixture
def served(worker: FakeWorker, client: httpx.AsyncClient) -> httpx.AsyncClient:
    """A client of a gateway whose worker is known and alive."""
    return client


def key_of(settings: GatewaySettings, name: str, **limits: Any) -> dict[str, str]:
    """Headers of a caller who has a key of its own; limits: of `new_key`."""
    key, text = new_key(name, **limits)
    with Keyring.connect(settings) as keyring:
        keyring.add(key)
    return {"authorization": f"Bearer {text}"}


async def until(condition: Callable[[], Awaitable[Any]], timeout_s: float = 10) -> Any:
    """What the condition gives, once it is true."""
    deadline = time.monotonic() + timeout_s
    while not (found := await condition()):
        assert time.monotonic() < deadline, "it never came true"
        await asyncio.sleep(0.02)
    return found
