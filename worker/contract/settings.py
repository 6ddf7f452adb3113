"""Settings that gateway and worker share: where Redis and the pictures are, and how long things live."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import AnyHttpUrl, Field, RedisDsn, SecretStr, ValidationError, ValidationInfo, model_validator
from pydantic import field_validator as validates
from pydantic_core import InitErrorDetails, PydanticCustomError
from pydantic_settings import BaseSettings, EnvSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

DAY_S = 86_400
YEAR_S = 365 * DAY_S
PREFIX = "DARKROOM_"
IN_FILE = "_FILE"
SECRET = frozenset(
    {"redis_url", "s3_access_key_id", "s3_secret_access_key", "s3_endpoint", "s3_public_endpoint", "public_url"}
)
"""What may hold a password: values of these are never shown."""

BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,61}[A-Za-z0-9]")
FOLDERS = re.compile(r"([A-Za-z0-9_-][A-Za-z0-9._-]*(/|$))*")


UNSET = "unset if empty"
"""Marks settings that an empty value leaves unset: templates of deployments set what they don't know to nothing."""


class ContractSettings(BaseSettings):
    """Read once at start from `DARKROOM_*`; frozen; passed on as an argument.

    Instead of `DARKROOM_X`, `DARKROOM_X_FILE` may name a file that holds the value, as secrets are often mounted.
    """

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="ignore", hide_input_in_errors=True)

    redis_url: RedisDsn = Field(
        default=RedisDsn("redis://127.0.0.1:6379/0"), description="Redis or Valkey, 7.2 or later", repr=False
    )
    store_dir: Annotated[Path, UNSET] = Field(
        default=Path(".darkroom/pictures"), description="folder where pictures are kept, unless in a bucket"
    )
    s3_bucket: Annotated[str | None, UNSET] = Field(
        default=None, description="bucket where pictures are kept; unset: in the folder"
    )
    s3_prefix: str = Field(
        default="", max_length=256, description="what the bucket's keys of ours begin with, such as `pictures/`"
    )
    s3_endpoint: Annotated[AnyHttpUrl | None, UNSET] = Field(
        default=None, description="url of the S3 server; unset: AWS"
    )
    s3_region: Annotated[str | None, UNSET] = Field(
        default=None, pattern=r"^[A-Za-z0-9-]{1,64}$", description="unset: `AWS_REGION`, else us-east-1"
    )
    s3_path_style: Annotated[bool | None, UNSET] = Field(
        default=None, description="yes: the bucket is the path's beginning, not the host's; unset: yes with an endpoint"
    )
    s3_access_key_id: Annotated[str | None, UNSET] = Field(
        default=None,
        repr=False,
        description="unset: AWS's usual chain: its variables, web identity, container, instance",
    )
    s3_secret_access_key: Annotated[SecretStr | None, UNSET] = Field(
        default=None, validate_default=True, description="the secret of that key"
    )
    s3_presign: bool = Field(
        default=False,
        description="yes: pictures are answered by a redirect to a short-lived url of the bucket; no: the gateway "
        "passes their bytes on",
    )
    s3_public_endpoint: Annotated[AnyHttpUrl | None, UNSET] = Field(
        default=None, description="url of the S3 server as clients know it, for those redirects; unset: the same"
    )
    s3_sweep: bool = Field(
        default=True, description="no: leftovers are removed by a lifecycle rule of the bucket, not by the gateways"
    )
    picture_lifetime_s: int = Field(default=DAY_S, ge=60, le=10 * YEAR_S, description="seconds that pictures are kept")
    record_lifetime_s: int = Field(
        default=7 * DAY_S,
        ge=60,
        le=10 * YEAR_S,
        validate_default=True,
        description="seconds that a job's record is kept once ended, no fewer than its pictures; less where Redis is "
        "nearly full; also how long a job without `deadline_s` may wait",
    )
    queue_bound: int = Field(default=1000, ge=1, le=1_000_000, description="jobs that may wait per model and priority")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Arguments, then the files that the environment names, then itself: an empty value is none."""
        return init_settings, FileSource(settings_cls), env_settings

    @model_validator(mode="before")
    @classmethod
    def _without_what_is_empty(cls, given: dict[str, Any]) -> dict[str, Any]:
        unset = {name for name, field in cls.model_fields.items() if UNSET in field.metadata}
        return {name: value for name, value in given.items() if value != "" or name not in unset}

    @validates("record_lifetime_s")
    @classmethod
    def _outlives_pictures(cls, record_s: int, info: ValidationInfo) -> int:
        if record_s < (picture_s := info.data.get("picture_lifetime_s", 0)):
            raise ValueError(f"allowed: DARKROOM_PICTURE_LIFETIME_S ({picture_s}) or more; pictures go with the record")
        return record_s

    @validates("s3_bucket")
    @classmethod
    def _is_a_bucket(cls, name: str | None) -> str | None:
        if name is not None and not BUCKET.fullmatch(name):
            raise ValueError("a bucket's name has 3 to 63 letters, digits, dots and dashes; a folder in it: s3_prefix")
        return name

    @validates("s3_prefix")
    @classmethod
    def _is_a_prefix(cls, prefix: str) -> str:
        """Without its outer slashes."""
        prefix = prefix.strip("/")
        if not FOLDERS.fullmatch(prefix):
            raise ValueError("allowed: letters, digits, '.', '_' and '-', joined by '/'; no part begins with '.'")
        return prefix

    @validates("s3_endpoint", "s3_public_endpoint")
    @classmethod
    def _is_an_endpoint(cls, url: AnyHttpUrl | None) -> AnyHttpUrl | None:
        if url and (url.username or url.password or url.query or url.fragment or (url.path or "/") != "/"):
            raise ValueError("allowed: scheme, host and port, such as https://minio.example:9000; keys go elsewhere")
        return url

    @validates("s3_secret_access_key")
    @classmethod
    def _has_its_key(cls, secret: SecretStr | None, info: ValidationInfo) -> SecretStr | None:
        if "s3_access_key_id" in info.data and (secret is None) != (info.data["s3_access_key_id"] is None):
            raise ValueError("DARKROOM_S3_ACCESS_KEY_ID and DARKROOM_S3_SECRET_ACCESS_KEY go together: set both")
        return secret


class FromFile(str):
    """A value that a file holds: not to be shown."""

    __slots__ = ()


class FileSource(EnvSettingsSource):
    """The settings whose variables with `_FILE` behind their name say where they are."""

    def __init__(self, settings_cls: type[BaseSettings]) -> None:
        super().__init__(settings_cls)
        given, wrong = self.env_vars, list[InitErrorDetails]()
        self.env_vars = contents = dict[str, str | None]()
        for name in settings_cls.model_fields:
            variable = f"{PREFIX}{name}".lower()
            path = given.get(variable + IN_FILE.lower())
            if path is None:
                continue
            if given.get(variable):
                wrong.append(_wrong(name, path, f"{PREFIX}{name.upper()} is set too; allowed: one of the two"))
                continue
            try:
                contents[variable] = FromFile(Path(path).read_text().strip())
            except (OSError, ValueError) as error:
                why = (error.strerror or type(error).__name__) if isinstance(error, OSError) else "it is no text"
                wrong.append(_wrong(name, path, f"the file cannot be read: {why.lower()}"))
        if wrong:
            raise ValidationError.from_exception_data(settings_cls.__name__, wrong)


def _wrong(name: str, path: str, why: str) -> InitErrorDetails:
    error = PydanticCustomError("file", "{why}", {"why": why})
    return InitErrorDetails(type=error, loc=(f"{name}_file",), input=path)


def complaints(error: ValidationError) -> str:
    """A line for each setting that is wrong, by the name of its variable."""
    lines = []
    for wrong in error.errors():
        name = "_".join(str(part) for part in wrong["loc"])
        shown = "" if name in SECRET else f" is {wrong['input']!r}"
        if isinstance(wrong["input"], FromFile):
            shown = " (in its file)"
        lines.append(f"{PREFIX}{name.upper()}{shown}: {wrong['msg']}")
    return "\n".join(lines)


def overridden(env: Mapping[str, str] = os.environ, **settings: Any) -> dict[str, str]:
    """The environment of a child that shall read these settings, wherever ours came from; None: unset."""
    fixed = {f"{PREFIX}{name.upper()}": value for name, value in settings.items()}
    names = {*fixed, *(name + IN_FILE for name in fixed)}
    kept = {name: value for name, value in env.items() if name.upper() not in names}
    return kept | {name: str(value) for name, value in fixed.items() if value is not None}
