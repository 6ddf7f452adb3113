"""A client's connection, on which headers must come in time: uvicorn itself would wait for them as long as it takes."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEADERS_S = 10.0
"""From the beginning of a connection, or the last answer on it, to the end of a request's headers."""


class PunctualProtocol(HttpToolsProtocol):
    """Closes a connection whose next headers are late; one that is idle uvicorn closes before that."""

    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """The first headers are waited for."""
        super().connection_made(transport)
        self._await_headers()

    def on_headers_complete(self) -> None:
        """There they are."""
        self._unawait()
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        """The next headers are waited for, unless a request came before its turn."""
        in_line = bool(self.pipeline)
        super().on_response_complete()
        if not in_line:
            self._await_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is waited for."""
        self._unawait()
        super().connection_lost(exc)

    def _await_headers(self) -> None:
        self._unawait()
        self._late = self.loop.call_later(HEADERS_S, self.transport.close)

    def _unawait(self) -> None:
        if self._late:
            self._late.cancel()
