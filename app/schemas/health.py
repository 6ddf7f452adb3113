"""What probes are told."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from app import examples


class Alive(BaseModel):
    """The process answers."""

    status: str = Field(examples=["ok"])


class Readiness(BaseModel):
    """Whether this gateway can do its work. That no worker is there does not make it unready: jobs wait."""

    model_config = ConfigDict(json_schema_extra={"examples": [examples.READY]})

    status: str = Field(description="`ready` or `not_ready`.")
    draining: bool = Field(description="Shutting down.")
    redis: str = Field(description="`ok`, or what is wrong.")
    store: str = Field(description="`ok`, or what is wrong.")
    workers: dict[str, int] = Field(description="Live workers by model; empty when there are none, or Redis is away.")
