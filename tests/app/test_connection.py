"""A connection on which nobody asks for anything is not kept, nor one whose headers never end."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import uvicorn

from app import connection
from app.connection import DISCARD_BYTES, MAX_HEADER_BYTES, PunctualProtocol

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


async def test_a_connection_that_has_served_may_be_idle_for_longer_than_headers_may_take() -> None:
    async with connected() as (reader, writer):
        for _ in range(2):
            writer.write(GET + b"\r\n")
            async with asyncio.timeout(10):
                assert (await reader.readuntil(b"hi")).startswith(b"HTTP/1.1 200")
            await asyncio.sleep(2 * connection.HEADERS_S)
        writer.write(GET)
        assert await closed(reader) == b""


def padded(size: int) -> bytes:
    """Headers of so many bytes."""
    rest = size - len(GET) - len(b"a: \r\n\r\n")
    return GET + b"a: " + b"x" * rest + b"\r\n\r\n"


def assert_too_large(answer: bytes) -> None:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 431 Request Header Fields Too Large\r\n")
    assert b"connection: close" in head
    error = json.loads(body)["error"]
    assert (error["code"], error["field"]) == ("headers_too_large", None)
    assert error["message"] == "the headers are larger than the 65536 bytes allowed"


@pytest.mark.parametrize(
    "sent",
    [
        padded(MAX_HEADER_BYTES + 1),
        GET + b"a: " + b"x" * MAX_HEADER_BYTES,
        GET + b"a: b\r\n" * MAX_HEADER_BYTES,
        b"GET /" + b"x" * MAX_HEADER_BYTES,
    ],
    ids=["a byte too many", "a value that does not end", "many", "a url that does not end"],
)
async def test_headers_that_are_too_large_are_refused(sent: bytes) -> None:
    async with connected() as (reader, writer):
        writer.write(sent)
        assert_too_large(await closed(reader))


async def test_headers_are_counted_for_each_request() -> None:
    async with connected() as (reader, writer):
        for _ in range(3):
            writer.write(padded(MAX_HEADER_BYTES))
            async with asyncio.timeout(10):
                assert (await reader.readuntil(b"hi")).startswith(b"HTTP/1.1 200")


async def test_headers_too_large_behind_another_request_are_refused_after_its_answer() -> None:
    async with connected() as (reader, writer):
        writer.write(GET + b"\r\n" + GET + b"a: " + b"x" * 2 * MAX_HEADER_BYTES)
        async with asyncio.timeout(10):
            assert (await reader.readuntil(b"hi")).startswith(b"HTTP/1.1 200")
        assert_too_large(await closed(reader))


async def test_a_request_is_answered_that_came_before_others_were_too_large() -> None:
    async with connected() as (reader, writer):
        writer.write(2 * (GET + b"\r\n") + GET + b"a: " + b"x" * 2 * MAX_HEADER_BYTES)
        assert (await closed(reader)).count(b"HTTP/1.1 ") == 3


@pytest.mark.parametrize(
    ("header", "body"),
    [
        (b"content-length: 300000", b"x" * 300_000),
        (b"transfer-encoding: chunked", b"493e0\r\n" + b"x" * 300_000 + b"\r\n0\r\n\r\n"),
        (b"transfer-encoding: chunked", b"1\r\nx\r\n" * 50_000 + b"0\r\n\r\n"),
    ],
    ids=["of a length", "in one chunk", "in many chunks"],
)
async def test_a_body_may_be_larger_than_headers(header: bytes, body: bytes) -> None:
    async with connected() as (reader, writer):
        for _ in range(2):
            writer.write(b"POST / HTTP/1.1\r\nhost: x\r\n" + header + b"\r\n\r\n" + body)
            async with asyncio.timeout(10):
                assert (await reader.readuntil(b"hi")).startswith(b"HTTP/1.1 200")


async def test_trailers_of_a_body_are_bounded_too() -> None:
    async with connected() as (reader, writer):
        writer.write(b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n0\r\n")
        writer.write(b"a: b\r\n" * MAX_HEADER_BYTES)
        async with asyncio.timeout(10):
            assert (await reader.readuntil(b"hi")).startswith(b"HTTP/1.1 200")
        assert_too_large(await closed(reader))


async def test_client_that_goes_on_sending_headers_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEADERS_S", 60)

    async def go_on(writer: asyncio.StreamWriter) -> None:
        async with asyncio.timeout(10):
            while True:
                writer.write(b"x" * DISCARD_BYTES)
                await writer.drain()

    async with connected() as (_reader, writer):
        writer.write(GET + b"a: ")
        with pytest.raises(ConnectionError):
            await go_on(writer)
