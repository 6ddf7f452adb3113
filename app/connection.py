"""A client's connection, on which headers must come in time and be of a size: uvicorn itself would take all of them."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from app.refusals import Refusal, native

HEADERS_S = 10.0
"""From the beginning of a connection, or of a further request on it, to the end of the request's headers."""

IDLE_S = 75
"""From the last answer on a connection to its end: longer than proxies keep theirs (60 s), for what comes as we
close one is lost."""

MAX_HEADER_BYTES = 65_536
"""Of a request's first line and headers; up to twice that where they come together with the end of another request."""

DISCARD_BYTES = 1_048_576
"""What is read past that: a client that is still sending when the connection closes never sees the answer."""


class PunctualProtocol(HttpToolsProtocol):
    """Closes a connection whose next headers are late or too large; one that is idle uvicorn closes before that."""

    _late: asyncio.TimerHandle | None = None
    _pending = 0
    """Bytes since headers or a request ended, or a body went on; counted here, for the parser gathers long headers."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """The first headers are waited for."""
        super().connection_made(transport)
        self._await_headers()

    def data_received(self, data: bytes) -> None:
        """Passes on what comes, in pieces that end where headers become too large; nothing after that."""
        if data and not self._late and (not self.cycle or self.cycle.response_complete):
            self._await_headers()
        while data and not self.transport.is_closing():
            if self._pending >= MAX_HEADER_BYTES:
                return self._discard(data)
            room = MAX_HEADER_BYTES - self._pending
            piece, data = data[:room], data[room:]
            self._pending += len(piece)
            super().data_received(piece)
            if self._pending >= MAX_HEADER_BYTES:
                self._refuse()

    def on_headers_complete(self) -> None:
        """There they are."""
        self._pending = 0
        self._unawait()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A body goes on; how large it may be is not decided here."""
        self._pending = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """What comes next are other headers."""
        self._pending = 0
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """The next headers, if they have begun, are waited for, or refused; a request that came early has its own."""
        in_line = bool(self.pipeline)
        super().on_response_complete()
        if in_line or not self._pending:
            return
        self._await_headers()
        if self._pending >= MAX_HEADER_BYTES:
            self._refuse()

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
        self._late = None

    def _refuse(self) -> None:
        """Answers 431, unless an earlier request is to be answered first; the client closes then, or its time is up."""
        if self.transport.is_closing() or (self.cycle and not self.cycle.response_complete):
            return
        self.logger.warning("Headers too large.")
        message = f"the headers are larger than the {MAX_HEADER_BYTES} bytes allowed"
        answer = native(Refusal(431, "headers_too_large", message))
        headers = [*self.server_state.default_headers, *answer.raw_headers, (b"connection", b"close")]
        lines = [b"%b: %b\r\n" % header for header in headers]
        self.transport.write(b"".join([STATUS_LINE[431], *lines, b"\r\n", answer.body]))
        if self.transport.can_write_eof():
            self.transport.write_eof()

    def _discard(self, data: bytes) -> None:
        self._pending += len(data)
        if self._pending > MAX_HEADER_BYTES + DISCARD_BYTES:
            self.transport.close()
