"""Urls that need no API key: signed by us, good until a moment that they name."""

from __future__ import annotations

import hashlib
import hmac
from base64 import urlsafe_b64encode
from collections.abc import Awaitable, Callable


class Signer:
    """Signs and checks with the secret that all gateways of one Redis share (HMAC-SHA256)."""

    def __init__(self, secret: bytes) -> None:
        self._secret = hmac.digest(secret, b"darkroom url", "sha256")  # the secret signs other things as well

    def signature(self, path: str, expires: int) -> str:
        """The signature of a url's path, good until `expires` (Unix seconds): 43 url-safe characters."""
        digest = hmac.digest(self._secret, f"{expires} {path}".encode("utf-8", "replace"), hashlib.sha256)
        return urlsafe_b64encode(digest).decode().rstrip("=")

    def query(self, path: str, expires: int) -> str:
        """What the url ends with."""
        return f"?expires={expires}&signature={self.signature(path, expires)}"

    def signed(self, path: str, expires: int, signature: str) -> bool:
        """Whether we signed it; whether it has expired is not asked here."""
        ours = self.signature(path, expires)
        return hmac.compare_digest(ours.encode(), signature.encode("utf-8", "replace"))


class Signing:
    """The signer of one gateway, its secret asked of Redis once."""

    def __init__(self, fetch: Callable[[], Awaitable[bytes]]) -> None:
        self._fetch = fetch
        self._signer: Signer | None = None

    async def signer(self) -> Signer:
        """The signer. QueueUnavailable."""
        if self._signer is None:
            self._signer = Signer(await self._fetch())
        return self._signer
