"""Server-sent events as a response: heartbeats while nothing happens, an end when the gateway drains."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from typing import Any

import anyio
from fastapi.sse import KEEPALIVE_COMMENT
from starlette.responses import StreamingResponse
from starlette.types import Send

from worker.contract.link import end

BEAT_S = 5.0
"""Shorter than the patience of any proxy."""


async def _comment() -> bytes:
    return KEEPALIVE_COMMENT


class EventStream(StreamingResponse):
    """Sends what `events` yields (see `fastapi.sse.format_sse_event`) until it ends or the client goes away.

    When the gateway drains it ends too: clients come back with `Last-Event-ID`, to another gateway or a later one.

    idle: what is sent each `beat_s` seconds in which there was no event; a comment, which clients pass over.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        draining: asyncio.Event,
        *,
        idle: Callable[[], Awaitable[bytes]] = _comment,
        beat_s: float = BEAT_S,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self._events, self._draining, self._idle, self._beat_s = events, draining, idle, beat_s
        # The second is for nginx, which holds answers back otherwise
        kept = {"cache-control": "no-store", "x-accel-buffering": "no", **(headers or {})}
        super().__init__(self._chunks(), headers=kept)

    async def stream_response(self, send: Send) -> None:
        """Sends everything; whatever happens meanwhile, the source is closed."""
        assert isinstance(self.body_iterator, AsyncGenerator)
        async with aclosing(self.body_iterator):
            await super().stream_response(send)

    async def _chunks(self) -> AsyncGenerator[bytes, None]:
        draining = asyncio.ensure_future(self._draining.wait())
        coming: asyncio.Future[bytes] | None = None
        try:
            yield KEEPALIVE_COMMENT  # so that proxies let the headers through
            while True:
                coming = coming or asyncio.ensure_future(anext(self._events))
                both: set[asyncio.Future[Any]] = {coming, draining}
                await asyncio.wait(both, timeout=self._beat_s, return_when=asyncio.FIRST_COMPLETED)
                if coming.done():
                    try:
                        chunk, coming = coming.result(), None
                    except StopAsyncIteration:
                        return
                    yield chunk
                elif draining.done():
                    return
                else:
                    yield await self._idle()
        finally:
            with anyio.CancelScope(shield=True):
                await end(draining)
                if coming is not None:  # a generator cannot be closed while it runs
                    await end(coming)
                await self._events.aclose()
