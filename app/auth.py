"""Who asks: the caller that a request's API key stands for, what it may do, and how often."""

from __future__ import annotations

import hmac
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

from fastapi.security import HTTPBearer
from starlette.datastructures import Headers

from app.errors import Unauthorized
from app.ratelimit import RateLimit, RateLimits
from app.settings import GatewaySettings
from worker.contract.keys import SCOPES, UNLIMITED, ApiKey, Keys, opens, parse_key
from worker.contract.keys import Scope as Scope

ALL_SCOPES: frozenset[Scope] = frozenset(SCOPES)
AUTHORIZATION = re.compile(r"(?:bearer|token)[ \t]+(\S+)[ \t]*", re.IGNORECASE | re.ASCII)

HOW = "send it as `Authorization: Bearer dr_...` or as `X-API-Key: dr_...`"
MISSING = f"this server asks for an API key: {HOW}"
MALFORMED = f"what was sent as an API key is none: keys look like dr_..., and are complete; {HOW}"
UNKNOWN = "the API key is not known here"
REVOKED = "the API key was revoked"


KEY_SCHEME = HTTPBearer(
    scheme_name="API key",
    description="`darkroom keys add NAME` makes one. `X-API-Key: dr_...` is taken as well.",
    auto_error=False,
)


@dataclass(frozen=True)
class Caller:
    """One API key as the gateway sees it."""

    id: str  # owner of the jobs that it asks for; "" where keys are off
    name: str
    scopes: frozenset[Scope]
    max_active: int | None = None  # jobs of its own that may be queued or running at once
    rate: str | None = None  # such as "120/minute"


ANONYMOUS = Caller("", "anonymous", ALL_SCOPES)
"""Everybody, where keys are off."""


class Doorkeeper:
    """Knows callers by their keys. Where keys are off, everybody is ANONYMOUS."""

    def __init__(
        self, settings: GatewaySettings, keys: Keys | None, same: Callable[[str, str], bool] = hmac.compare_digest
    ) -> None:
        self._settings, self._keys, self._same = settings, keys, same
        self._rates = RateLimits(keys.redis) if keys else None

    @classmethod
    def connect(cls, settings: GatewaySettings) -> Self:
        """With the keys in the Redis of the settings; nothing is sent yet."""
        return cls(settings, Keys.connect(settings) if settings.keys_on else None)

    async def caller(self, headers: Headers) -> Caller:
        """Who sent a request with these headers. Unauthorized; QueueUnavailable, for nobody passes unseen."""
        if self._keys is None:
            return ANONYMOUS
        text = presented(headers)
        if text is None:
            raise Unauthorized(MISSING)
        parsed = parse_key(text)
        if parsed is None:
            raise Unauthorized(MALFORMED)
        key_id, secret = parsed
        key = await self._keys.find(key_id)
        if not opens(key, secret, self._same) or key is None:
            raise Unauthorized(UNKNOWN)
        if key.revoked_at is not None:  # only who has its secret learns this
            raise Unauthorized(REVOKED)
        await self._keys.note_use(key_id)
        return self._caller(key)

    async def spend(self, caller: Caller) -> RateLimit | None:
        """Counts a request of the caller; None if it may make as many as it likes. QueueUnavailable."""
        if self._rates is None or caller.rate is None:
            return None
        return await self._rates.spend(caller.id, caller.rate)

    def _caller(self, key: ApiKey) -> Caller:
        scopes = ALL_SCOPES if "admin" in key.scopes else ALL_SCOPES & frozenset(key.scopes)
        rate = key.rate or self._settings.key_rate
        max_active = self._settings.key_max_active if key.max_active is None else key.max_active
        return Caller(key.id, key.name, scopes, max_active or None, None if rate == UNLIMITED else rate)

    async def close(self) -> None:
        """Closes all connections."""
        if self._keys:
            await self._keys.close()


def presented(headers: Headers) -> str | None:
    """The text that a request has in a key's place; a scheme of somebody else's (Basic, of a proxy) is passed over."""
    if match := AUTHORIZATION.fullmatch(headers.get("authorization", "").strip()):
        return match[1]
    return headers.get("x-api-key", "").strip() or None
