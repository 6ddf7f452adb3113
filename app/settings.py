"""Settings of the gateway process."""

from __future__ import annotations

from typing import Literal

from pydantic import AnyHttpUrl, Field

from worker.contract.settings import ContractSettings

LogFormat = Literal["json", "console"]


class GatewaySettings(ContractSettings):
    """What the gateway reads from `DARKROOM_*`, on top of what it shares with the worker."""

    host: str = Field(default="127.0.0.1", description="address that the gateway listens on")
    port: int = Field(default=8000, ge=0, le=65_535, description="port that the gateway listens on; 0 takes a free one")
    public_url: AnyHttpUrl | None = Field(
        default=None, description="what urls in answers begin with; unset: as the request was addressed"
    )
    max_body_bytes: int = Field(default=65_536, ge=1024, description="largest request body accepted, in bytes")
    body_timeout_s: float = Field(default=10.0, gt=0, le=600, description="seconds a client has to send its body")
    sweep_every_s: float = Field(default=300.0, ge=1, description="seconds between two removals of expired pictures")
    drain_s: float = Field(
        default=0.0,
        ge=0,
        le=600,
        description="seconds the gateway still serves, not ready, between SIGTERM and closing its port",
    )
    log_format: LogFormat = Field(default="json", description="log lines as json, or console for people")
