"""Where a webhook may go: public addresses by https; not the networks behind this server, unless its operator says so.

A url is checked when a job is accepted and again whenever something is sent to it; the connection goes to the very
address that was checked, so that a name that resolves to something else a moment later gains nothing.
"""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Self

import httpcore
import httpx

from app.errors import Shown
from app.networks import Address, Allowed, is_name, is_public, read_address, unmapped
from worker.contract.errors import InvalidField

MAX_URL = 2048
RESOLVE_TIMEOUT_S = 5.0
RESOLVERS_AT_ONCE = 8
"""Threads of their own: slow name servers that clients point at must not take those of the picture store."""

PORTS = (443, 8443)
"""Where public receivers listen; the operator's own may listen anywhere."""

OPERATORS_LIST = "DARKROOM_WEBHOOK_ALLOW"

_EXAMPLE = "an https url, such as https://example.com/hook"
_PASSING = (socket.EAI_AGAIN, socket.EAI_SYSTEM, socket.EAI_MEMORY)
"""Troubles of the name service that say nothing of the name."""

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
"""The addresses of a host; socket.gaierror, TimeoutError."""


class TargetRefused(httpcore.ConnectError):
    """No webhook goes there; says what is allowed."""


@dataclass(frozen=True)
class Target:
    """The parts of a webhook's url that decide where it goes."""

    host: str  # in lower case, without a dot at its end; IPv6 without brackets
    port: int
    secure: bool  # https

    @classmethod
    def parse(cls, url: str) -> Self:
        """The target of a url; TargetRefused."""
        if len(url) > MAX_URL or not url.isascii() or not url.isprintable() or set(url) & set(' \\"<>^`{|}'):
            raise TargetRefused(f"an https url of at most {MAX_URL:,} plain characters")
        try:
            parsed = httpx.URL(url)
        except httpx.InvalidURL:
            raise TargetRefused(_EXAMPLE) from None
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise TargetRefused(_EXAMPLE)
        if "@" in re.split("[/?#]", url.partition("//")[2])[0]:
            raise TargetRefused("a url without a user name or password")
        host, secure = _plain(parsed.host), parsed.scheme == "https"
        port = (443 if secure else 80) if parsed.port is None else parsed.port
        if not port or not (is_name(host) or read_address(host)):
            raise TargetRefused("a url with the name of a host, or with its address in the usual form")
        return cls(host, port, secure)


@dataclass(frozen=True)
class Targets:
    """Decides where webhooks may go, and finds the addresses that they go to."""

    allowed: Allowed = field(default_factory=Allowed)
    resolve: Resolve = field(default_factory=lambda: Resolver())

    async def check(self, url: str, field: str = "webhook.url") -> None:
        """Returns if a webhook may go there; InvalidField. A name that cannot be looked up just now is let pass.

        Whoever sends it checks again.
        """
        try:
            await self.addresses(Target.parse(url))
        except TargetRefused as error:
            raise InvalidField(field, Shown(url), str(error)) from None
        except (OSError, TimeoutError):
            return

    async def addresses(self, target: Target) -> list[Address]:
        """The addresses of a target, all of them allowed; TargetRefused, OSError, TimeoutError.

        One that is not allowed among others that are is refused as well: no honest host has both.
        """
        addresses = await self._find(target)
        if addresses and all(self.allowed.has(target.host, address) for address in addresses):
            return addresses
        if not addresses or not all(is_public(a) or self.allowed.has(target.host, a) for a in addresses):
            # One text for both: nobody shall learn here which names the inside network has.
            known = "a host with public addresses only, by a name that the name service knows"
            raise TargetRefused(f"{known}, or one of {OPERATORS_LIST}")
        if not target.secure:
            raise TargetRefused(f"https; http only to hosts of {OPERATORS_LIST}")
        if target.port not in PORTS:
            raise TargetRefused(f"port {' or '.join(map(str, PORTS))}; others only on hosts of {OPERATORS_LIST}")
        return addresses

    async def _find(self, target: Target) -> list[Address]:
        if literal := read_address(target.host):
            return [literal]
        try:
            return [unmapped(ip_address(found)) for found in await self.resolve(target.host, target.port)]
        except socket.gaierror as error:
            if error.errno in _PASSING:
                raise
            return []


class Resolver:
    """The system's name service, in a few threads of its own."""

    def __init__(self, timeout_s: float = RESOLVE_TIMEOUT_S) -> None:
        self._timeout_s = timeout_s
        self._threads = ThreadPoolExecutor(RESOLVERS_AT_ONCE, "resolve-webhook")

    async def __call__(self, host: str, port: int) -> list[str]:
        """The addresses of a host, in the system's order."""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(self._timeout_s):
            found = await loop.run_in_executor(self._threads, _resolve, host, port)
        return list(dict.fromkeys(found))


class GuardedNetwork(httpcore.AsyncNetworkBackend):
    """Connects to addresses that `targets` allows, and to no others. TLS still asks for the name of the url."""

    def __init__(self, targets: Targets, *, secure: bool, network: httpcore.AsyncNetworkBackend | None = None) -> None:
        self._targets, self._secure = targets, secure
        self._network = network or httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """A connection to the first address of the host that takes one; TargetRefused, httpcore.ConnectError."""
        try:
            addresses = await self._targets.addresses(Target(_plain(host), port, self._secure))
        except TimeoutError:
            raise httpcore.ConnectTimeout("its host was not found in time") from None
        except OSError as error:
            raise httpcore.ConnectError(f"its host was not found: {error.strerror}") from error
        for address in addresses[:-1]:
            with suppress(httpcore.ConnectError, httpcore.ConnectTimeout):
                return await self._network.connect_tcp(str(address), port, timeout, local_address, socket_options)
        return await self._network.connect_tcp(str(addresses[-1]), port, timeout, local_address, socket_options)

    async def sleep(self, seconds: float) -> None:
        """Waits."""
        await self._network.sleep(seconds)


def _plain(host: str) -> str:
    return host.lower().removesuffix(".")


def _resolve(host: str, port: int) -> list[str]:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(address[0]).partition("%")[0] for *_, address in found]
