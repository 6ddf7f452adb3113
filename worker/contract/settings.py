"""Settings that gateway and worker share: where Redis and the pictures are, and how long things live."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, RedisDsn, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

DAY_S = 86_400


class ContractSettings(BaseSettings):
    """Read once at start from `DARKROOM_*`; frozen; passed on as an argument."""

    model_config = SettingsConfigDict(env_prefix="DARKROOM_", frozen=True, extra="ignore")

    redis_url: RedisDsn = Field(
        default=RedisDsn("redis://127.0.0.1:6379/0"), description="Redis or Valkey, 7.2 or later"
    )
    store_dir: Path = Field(default=Path(".darkroom/pictures"), description="folder where pictures are kept")
    picture_lifetime_s: int = Field(default=DAY_S, ge=60, description="seconds that pictures are kept")
    record_lifetime_s: int = Field(
        default=7 * DAY_S, ge=60, description="seconds that a job's record is kept once ended"
    )
    queue_bound: int = Field(default=1000, ge=1, description="jobs that may wait per model and priority")


def complaints(error: ValidationError) -> str:
    """A line for each setting that is wrong, by the name of its variable."""
    lines = []
    for wrong in error.errors():
        name = "_".join(str(part) for part in wrong["loc"])
        shown = "" if name == "redis_url" else f" is {wrong['input']!r}"  # a url may hold a password
        lines.append(f"DARKROOM_{name.upper()}{shown}: {wrong['msg']}")
    return "\n".join(lines)
