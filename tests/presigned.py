"""A server whose pictures lie elsewhere, as where they are in S3: their urls redirect to where they are."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

PICTURE = b"\x89PNG\r\n\x1a\n, the rest of it"


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        host = f"http://{self.headers['host']}"
        images = [{"url": f"{host}/v1/images/0", "format": "png"}]
        self._answer(200, json.dumps({"status": "succeeded", "error": None, "images": images}).encode())

    def do_GET(self) -> None:
        if self.path == "/v1/images/0":
            self._answer(307, b"", location="/bucket/0.png")
        else:
            self._answer(200, PICTURE)

    def _answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in (headers | {"content-length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@contextmanager
def presigned() -> Iterator[str]:
    """Its url."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
