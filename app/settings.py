"""Settings of the gateway process."""

from __future__ import annotations

import ipaddress
import re
from typing import Annotated, Literal

from pydantic import AnyHttpUrl, Field, ValidationInfo, field_validator

from app.networks import Allowed
from worker.contract.errors import InvalidField
from worker.contract.keys import check_rate
from worker.contract.settings import DAY_S, UNSET, ContractSettings

LogFormat = Literal["json", "console"]
AuthMode = Literal["auto", "on", "off"]

ORIGIN = re.compile(r"https?://(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?")

OPEN_TO_ALL = (
    "DARKROOM_AUTH is off and DARKROOM_HOST is {host}: whoever reaches this machine could use it, and see every "
    "picture. Set DARKROOM_AUTH=on and make a key (darkroom keys add NAME); or listen on 127.0.0.1; or, if something "
    "in front asks who they are, say it twice: DARKROOM_AUTH_OFF_ON_PUBLIC=yes"
)


class GatewaySettings(ContractSettings):
    """What the gateway reads from `DARKROOM_*`, on top of what it shares with the worker."""

    host: str = Field(default="127.0.0.1", description="address that the gateway listens on")
    port: int = Field(default=8000, ge=0, le=65_535, description="port that the gateway listens on; 0 takes a free one")
    public_url: Annotated[AnyHttpUrl | None, UNSET] = Field(
        default=None, description="what urls in answers begin with; unset: as the request was addressed"
    )
    max_body_bytes: int = Field(default=65_536, ge=1024, description="largest request body accepted, in bytes")
    max_multipart_bytes: int = Field(
        default=10_485_760, ge=1024, description="the same for a form with files, which some vendors' calls are"
    )
    body_timeout_s: float = Field(default=10.0, gt=0, le=600, description="seconds a client has to send its body")
    sweep_every_s: float = Field(
        default=300.0, ge=1, le=DAY_S, description="seconds between two removals of expired pictures"
    )
    drain_s: float = Field(
        default=0.0,
        ge=0,
        le=600,
        description="seconds the gateway still serves, not ready, between SIGTERM and closing its port",
    )
    hold_s: float = Field(
        default=300.0,
        ge=1,
        le=3600,
        description="seconds that a vendor's call which answers with the picture itself waits for it; 429 at once if "
        "the wait is expected to be longer",
    )
    default_model: str = Field(
        default="",
        max_length=128,
        description="model for who names none, or through OpenAI's API one that is not known; unset: one that is held",
    )
    log_format: LogFormat = Field(default="json", description="log lines as json, or console for people")
    auth: AuthMode = Field(
        default="auto", description="API keys: on, off, or auto: off where only this machine can reach the gateway"
    )
    auth_off_on_public: bool = Field(
        default=False, validate_default=True, description="yes: `DARKROOM_AUTH=off` is meant, also on a public address"
    )
    key_rate: str = Field(
        default="3000/minute", description="requests that an API key may make that has no rate of its own, or none"
    )
    key_max_active: Annotated[int | None, UNSET] = Field(
        default=None, ge=1, description="jobs at once of an API key that has no such limit of its own; unset: any"
    )

    trusted_proxies: str = Field(
        default="127.0.0.1,::1",
        description="addresses and networks, with commas between, whose X-Forwarded-Proto and X-Forwarded-For are "
        "believed; * for all",
    )
    cors_origins: str = Field(
        default="",
        description="origins, with commas between, such as https://studio.example, whose pages may call this server; "
        "* for all; empty: none but its own",
    )
    webhook_allow: str = Field(
        default="",
        description="networks, addresses and names of hosts, with commas between, that webhooks may go to beside "
        "public addresses: by http too, and on any port",
    )

    @property
    def webhook_targets(self) -> Allowed:
        """What webhooks may reach beside public addresses."""
        return Allowed.parse(self.webhook_allow)

    @property
    def keys_on(self) -> bool:
        """Whether callers must have an API key."""
        return self.auth == "on" or (self.auth == "auto" and not is_loopback(self.host))

    @field_validator("public_url")
    @classmethod
    def _is_a_beginning(cls, url: AnyHttpUrl | None) -> AnyHttpUrl | None:
        if url and (url.username or url.password or url.query is not None or url.fragment is not None):
            raise ValueError("allowed: scheme, host, port and path, such as https://pictures.example/darkroom")
        return url

    @field_validator("auth_off_on_public")
    @classmethod
    def _off_is_said_twice(cls, said_twice: bool, info: ValidationInfo) -> bool:
        host = info.data.get("host", "")
        if info.data.get("auth") == "off" and not said_twice and not is_loopback(host):
            raise ValueError(OPEN_TO_ALL.format(host=host or "any address"))
        return said_twice

    @property
    def origins(self) -> list[str]:
        """Whose pages may call this server."""
        return _entries(self.cors_origins)

    @field_validator("trusted_proxies")
    @classmethod
    def _are_networks(cls, proxies: str) -> str:
        for entry in _entries(proxies):
            if entry != "*":
                ipaddress.ip_network(entry)
        return proxies

    @field_validator("cors_origins")
    @classmethod
    def _are_origins(cls, origins: str) -> str:
        for entry in _entries(origins):
            if entry != "*" and not ORIGIN.fullmatch(entry):
                raise ValueError(f"{entry!r} is no origin, such as https://studio.example or http://localhost:3000")
        return origins

    @field_validator("webhook_allow")
    @classmethod
    def _is_a_list(cls, entries: str) -> str:
        Allowed.parse(entries)
        return entries

    @field_validator("key_rate")
    @classmethod
    def _is_a_rate(cls, rate: str) -> str:
        try:
            check_rate("key_rate", rate)
        except InvalidField as error:
            raise ValueError(str(error)) from None
        return rate


def _entries(text: str) -> list[str]:
    return [entry.strip() for entry in text.split(",") if entry.strip()]


def is_loopback(host: str) -> bool:
    """Whether nobody but this machine reaches what listens there."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"
