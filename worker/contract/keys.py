"""API keys as Redis holds them: never a secret, only its SHA-256.

A key's text is `dr_<id>_<secret>`: 12 hex digits that name it, and 43 url-safe characters (256 random bits) that only
its owner has. So many random bits need no slow hash: there is nothing to guess.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import secrets
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from types import TracebackType
from typing import Any, Literal, Self, cast, get_args

import redis
import redis.asyncio
from redis.client import Pipeline

from worker.contract.errors import InvalidField
from worker.contract.link import connect, connect_async, reaching_redis
from worker.contract.settings import ContractSettings
from worker.contract.transitions import EVEN_IF_FULL

Scope = Literal["generate", "read", "high-priority", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
USUAL_SCOPES: tuple[Scope, ...] = ("generate", "read")

KEYS = "darkroom:keys"
KEYS_USED = "darkroom:keys:used"
"""Apart from the keys: a gateway that notes a use must never write a key that an operator is just revoking."""

FRESH_S = 1.0
USED_EVERY_S = 300.0
MOST_REMEMBERED = 4096
MAX_CONNECTIONS = 16

KEY_ID = re.compile(r"[0-9a-f]{12}")
KEY_TEXT = re.compile(r"dr_([0-9a-f]{12})_([A-Za-z0-9_-]{43})")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@+-]{0,63}")
RATE = re.compile(r"[1-9][0-9]{0,6}/(second|minute|hour|day)")
UNLIMITED = "none"

_NOBODY = "0" * 64  # compared with when there is no such key


@dataclass(frozen=True, kw_only=True)
class ApiKey:
    """One key, without its secret."""

    id: str
    name: str
    digest: str  # SHA-256 of the secret, in hex
    scopes: tuple[str, ...] = USUAL_SCOPES
    rate: str | None = None  # such as 120/minute; "none": unlimited; None: the server's default
    max_active: int | None = None  # jobs that may wait and run at once; 0: any number; None: the server's default
    created_at: float  # Unix seconds
    revoked_at: float | None = None  # Unix seconds

    def to_json(self) -> str:
        """The key as JSON."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """The key of its JSON; what a newer Darkroom adds to it is passed over."""
        known = {field.name for field in fields(cls)}
        data = {name: value for name, value in json.loads(text).items() if name in known}
        return cls(scopes=tuple(data.pop("scopes")), **data)


def new_key(
    name: str, *, scopes: tuple[str, ...] = USUAL_SCOPES, rate: str | None = None, max_active: int | None = None
) -> tuple[ApiKey, str]:
    """A fresh key and its text, which is nowhere else. InvalidField."""
    if not NAME.fullmatch(name) or KEY_ID.fullmatch(name):
        allowed = "1 to 64 letters, digits and . _ @ + -, the first a letter or digit, unlike a key's id"
        raise InvalidField("name", name, allowed)
    for scope in scopes:
        if scope not in SCOPES:
            raise InvalidField("scope", scope, ", ".join(SCOPES))
    check_rate("rate", rate)
    key_id, secret = secrets.token_hex(6), secrets.token_urlsafe(32)
    key = ApiKey(
        id=key_id,
        name=name,
        digest=_digest(secret),
        scopes=tuple(scope for scope in SCOPES if scope in scopes),
        rate=rate,
        max_active=max_active,
        created_at=time.time(),
    )
    return key, f"dr_{key_id}_{secret}"


def check_rate(field: str, rate: str | None) -> None:
    """Raises InvalidField if it is no rate."""
    if rate not in (None, UNLIMITED) and not RATE.fullmatch(rate or ""):
        raise InvalidField(field, rate, "a number of requests a second, minute, hour or day, such as 120/minute; none")


def parse_key(text: str) -> tuple[str, str] | None:
    """Id and secret of a key's text; None if it is none."""
    match = KEY_TEXT.fullmatch(text)
    return (match[1], match[2]) if match else None


def opens(key: ApiKey | None, secret: str, same: Callable[[str, str], bool] = hmac.compare_digest) -> bool:
    """Whether the secret is the key's. Takes as long where there is no such key."""
    right = same(_digest(secret), key.digest if key else _NOBODY)
    return right and key is not None


class Keys:
    """The keys as a gateway asks for them. Raises QueueUnavailable when Redis is away.

    What was found is believed for FRESH_S, so a revoked key works that much longer, and no load of requests becomes
    one of look-ups.
    """

    def __init__(
        self,
        redis: redis.asyncio.Redis,
        clock: Callable[[], float] = time.monotonic,
        most_remembered: int = MOST_REMEMBERED,
    ) -> None:
        self.redis = redis
        self._clock, self._most = clock, most_remembered
        self._found: dict[str, tuple[ApiKey | None, float]] = {}
        self._noted: dict[str, float] = {}

    @classmethod
    def connect(cls, settings: ContractSettings) -> Self:
        """On the Redis of the settings; nothing is sent yet."""
        return cls(connect_async(settings, MAX_CONNECTIONS))

    async def close(self) -> None:
        """Closes all connections."""
        await self.redis.aclose()

    async def find(self, key_id: str) -> ApiKey | None:
        """The key of that id, also if it is revoked; None if there is none."""
        now = self._clock()
        key, found_at = self._found.get(key_id, (None, float("-inf")))
        if now - found_at < FRESH_S:
            return key
        with reaching_redis():
            text = await cast(Any, self.redis.hget(KEYS, key_id))
        key = ApiKey.from_json(text) if text else None
        self._remember(key_id, key, now)
        return key

    async def note_use(self, key_id: str) -> None:
        """Notes that the key is in use, every USED_EVERY_S at most."""
        now = self._clock()
        if now - self._noted.get(key_id, float("-inf")) >= USED_EVERY_S:
            with reaching_redis():
                await cast(Any, self.redis.eval(EVEN_IF_FULL, 0, "HSET", KEYS_USED, key_id, str(int(time.time()))))
            self._noted[key_id] = now

    def _remember(self, key_id: str, key: ApiKey | None, now: float) -> None:
        """Ids that were made up are remembered too, or their owners could tell by the time which ones are real."""
        self._found.pop(key_id, None)
        if len(self._found) >= self._most:
            del self._found[next(iter(self._found))]  # the one asked for longest ago
        self._found[key_id] = (key, now)


class Keyring:
    """The keys in an operator's hand. For one thread; raises QueueUnavailable when Redis is away."""

    def __init__(self, redis: redis.Redis) -> None:
        self._redis = redis

    @classmethod
    def connect(cls, settings: ContractSettings) -> Self:
        """On the Redis of the settings; nothing is sent yet."""
        return cls(connect(settings, again=False))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._redis.close()

    def known(self) -> list[ApiKey]:
        """All keys, also those revoked, oldest first."""
        with reaching_redis():
            return _read(self._redis)

    def used(self) -> dict[str, float]:
        """When each key was last used, by id: Unix seconds, give or take USED_EVERY_S."""
        with reaching_redis():
            found = cast(dict[bytes, bytes], self._redis.hgetall(KEYS_USED))
        return {key_id.decode(): float(at) for key_id, at in found.items()}

    def add(self, key: ApiKey, *, only_first: bool = False) -> bool:
        """Lets the key in. False if it was to be the first and there is another; InvalidField if its name is taken."""
        added = True

        def put(pipe: Pipeline) -> None:
            nonlocal added
            live = [other for other in _read(pipe) if other.revoked_at is None]
            added = not (only_first and live)
            if added and any(other.name == key.name for other in live):
                raise InvalidField("name", key.name, "a name that no other key has; revoke that one first")
            pipe.multi()
            if added:
                pipe.eval(EVEN_IF_FULL, 0, "HSET", KEYS, key.id, key.to_json())

        with reaching_redis():
            self._redis.transaction(put, KEYS)
        return added

    def revoke(self, which: str) -> ApiKey | None:
        """Revokes the key of that id or name for good, and tells which it was; None if none is live under it."""
        return self._change(which, revoked_at=time.time())

    def limit(self, which: str, **limits: str | int | None) -> ApiKey | None:
        """Sets `rate`, `max_active` or both of the key of that id or name; None if none is live so. InvalidField."""
        check_rate("rate", cast(str | None, limits.get("rate")))
        return self._change(which, **limits)

    def _change(self, which: str, **changes: Any) -> ApiKey | None:
        changed: ApiKey | None = None

        def put(pipe: Pipeline) -> None:
            nonlocal changed
            found = [key for key in _read(pipe) if which in (key.id, key.name) and key.revoked_at is None]
            changed = replace(found[0], **changes) if found else None
            pipe.multi()
            if changed:
                pipe.eval(EVEN_IF_FULL, 0, "HSET", KEYS, changed.id, changed.to_json())

        with reaching_redis():
            self._redis.transaction(put, KEYS)
        return changed


def _read(client: redis.Redis | Pipeline) -> list[ApiKey]:
    found = cast(dict[bytes, bytes], client.hgetall(KEYS))
    return sorted((ApiKey.from_json(text) for text in found.values()), key=lambda key: (key.created_at, key.id))


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
