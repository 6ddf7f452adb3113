"""A connection on which nobody asks for anything is not kept."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import uvicorn

from app import connection
from app.connection import PunctualProtocol

GET = b"GET / HTTP/1.1\r\nhost: x\r\n"


async def hello(scope: object, receive: object, send: object) -> None:
    """An app that takes its time: longer than headers may."""
    await asyncio.sleep(2 * connection.HEADERS_S)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})  # type: ignore[operator]
    await send({"type": "http.response.body", "body": b"hi"})  # type: ignore[operator]


@asynccontextmanager
async def connected() -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection to a server with that app."""
    config = uvicorn.Config(hello, port=0, http=PunctualProtocol, log_config=None, lifespan="off", ws="none")
    config.load()
    server = uvicorn.Server(config)
    server.lifespan = config.lifespan_class(config)
    await server.startup()
    port = server.servers[0].sockets[0].getsockname()[1]
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield reader, writer
    finally:
        writer.close()
        await server.shutdown()


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEADERS_S", 0.2)


async def closed(reader: asyncio.StreamReader) -> bytes:
    """What comes until the server closes."""
    async with asyncio.timeout(10):
        return await reader.read()


@pytest.mark.parametrize("sent", [b"", b"\r\n", GET], ids=["nothing", "an empty line", "half of the headers"])
async def test_connection_is_closed_when_headers_do_not_come_in_time(sent: bytes) -> None:
    async with connected() as (reader, writer):
        writer.write(sent)
        assert await closed(reader) == b""


async def test_headers_that_come_bit_by_bit_gain_no_time() -> None:
    async with connected() as (reader, writer):

        async def dribble() -> None:
            while True:
                writer.write(b"a: b\r\n")
                await asyncio.sleep(0.05)

        writer.write(GET)
        dribbling = asyncio.create_task(dribble())
        assert await closed(reader) == b""
        dribbling.cancel()


async def test_an_answer_may_take_longer_than_headers() -> None:
    async with connected() as (reader, writer):
        for _ in range(2):
            writer.write(GET + b"\r\n")
            async with asyncio.timeout(10):
                assert (await reader.readuntil(b"hi")).startswith(b"HTTP/1.1 200")


async def test_requests_sent_before_their_turn_are_all_answered() -> None:
    async with connected() as (reader, writer):
        writer.write(3 * (GET + b"\r\n"))
        async with asyncio.timeout(10):
            for _ in range(3):
                assert (await reader.readuntil(b"hi")).startswith(b"HTTP/1.1 200")


async def test_headers_that_do_not_come_after_an_answer_close_the_connection() -> None:
    async with connected() as (reader, writer):
        writer.write(GET + b"\r\n" + GET)
        assert (await closed(reader)).count(b"HTTP/1.1 200") == 1
