"""The worker's settings."""

from __future__ import annotations

import os
import re
import secrets
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator
from pydantic_settings import NoDecode

from model.config import VARIANTS
from model.memory import Precision
from worker.contract.settings import UNSET, ContractSettings

BUNDLES = Path(__file__).parent.parent / "model" / "bundles"
"""The folder of the models that come with Darkroom."""

SERVED = {"sd3.5-large": "large", "sd3.5-large-turbo": "large-turbo", "sd3.5-medium": "medium"}
"""The names under which the published models are served, and the variant that each name declares."""


@dataclass(frozen=True)
class ModelSource:
    """A model that the operator asks for: `name=path`, `name:variant=path`, or the bare name of one of ours."""

    name: str
    path: Path
    variant: str | None = None  # None: as the files say

    @classmethod
    def parse(cls, text: str) -> ModelSource:
        """One entry of DARKROOM_MODELS; ValueError says what is wrong with it."""
        for own in bundled():
            if text == own.name:
                return own
        declared, _, path = text.partition("=")
        name, _, variant = declared.partition(":")
        if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,63}", name) or not path:
            raise ValueError(f"{text!r} is not name=path; a name is lower-case letters, digits, dots and dashes")
        if variant and variant not in VARIANTS:
            raise ValueError(f"{text!r} declares the variant {variant!r}; known: {', '.join(VARIANTS)}")
        return cls(name, Path(path).expanduser(), variant or SERVED.get(name))


def bundled(folder: Path = BUNDLES) -> tuple[ModelSource, ...]:
    """The models that come with Darkroom: every folder that has a card."""
    return tuple(ModelSource(card.parent.name, card.parent) for card in sorted(folder.glob("*/darkroom.json")))


class WorkerSettings(ContractSettings):
    """Read once at start from `DARKROOM_*`."""

    models: Annotated[tuple[ModelSource, ...], NoDecode, UNSET] = Field(
        default_factory=bundled,
        validate_default=True,
        min_length=1,
        description="models to load, comma-separated: `demo`, `name=path`, or `name:variant=path`; "
        "unset: all that come with Darkroom",
    )
    tokenizers: Annotated[Path | None, UNSET] = Field(
        default=None, description="folder with tokenizer, tokenizer_2 and tokenizer_3, for single-file checkpoints"
    )
    t5: bool = Field(
        default=True, description="load T5; without it prompts are understood less well, and 9.5 GB are saved"
    )
    text_encoders: Literal["auto", "gpu", "cpu", "offload"] = Field(
        default="auto",
        description="where text encoders are: gpu; cpu, where a new prompt takes seconds; or offload, in the host's "
        "memory but for the layer that runs, 0.5 s more a new prompt. auto: gpu if all models, whose encoders "
        "are taken to be the same, and a picture fit beside them, else offload; `darkroom doctor --plan` tells for any "
        "card",
    )
    t5_length: Annotated[int | None, UNSET] = Field(
        default=None, ge=1, le=512, description="tokens of T5; absent: as the model says, or 256"
    )
    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda or cuda:N")
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        default="auto", description="auto: bf16 on GPUs and on CPUs with bf16 matrix units, else fp32"
    )
    precision: Annotated[dict[str, Precision], NoDecode] = Field(
        default_factory=dict,
        description="fp8: the MMDiT's large matrices take half the memory and are multiplied faster on Hopper, Ada and "
        "later GPUs, and pictures change a little; `bf16` (as DARKROOM_DTYPE says), `fp8`, or by model: `name=fp8`, "
        "comma-separated",
    )
    max_jobs: int = Field(default=8, ge=1, le=256, description="jobs that one worker holds at a time")
    max_batch_rows: int = Field(
        default=8, ge=2, le=256, description="rows of one denoising step; a guided job takes two"
    )
    token_budget: Annotated[int | None, UNSET] = Field(
        default=None,
        ge=1,
        le=1_000_000,
        description="image and text tokens of one denoising step, over all its rows; absent: 9,000 on a GPU, 1,600 on "
        "a CPU. One picture alone may take more",
    )
    embedding_cache_mb: int = Field(
        default=256, ge=0, le=65_536, description="MiB of encoded prompts to keep, on the device; 0: none"
    )
    gpus: str = Field(
        default="",
        pattern=r"^(|all|\d{1,3}(,\d{1,3})*)$",
        description="a process for each of these GPUs: `all`, or indices such as `0,2`; empty: one process on `device`",
    )
    safety: Literal["off", "blur"] = Field(
        default="off",
        description="blur: pictures that a classifier takes for unsafe are blurred; needs the `safety` extra",
    )
    safety_threshold: float = Field(
        default=0.5, ge=0, le=1, description="score from which on a picture is taken for unsafe; 0 blurs all"
    )
    death_limit: int = Field(
        default=3, ge=1, le=1000, description="a job fails once its worker died so often with nothing beside it"
    )
    store_patience_s: float = Field(
        default=60.0,
        ge=1,
        le=3600,
        description="seconds that finished pictures are held for a picture store that is away, before their jobs go "
        "back to the queue; this worker takes no more meanwhile",
    )
    grace_s: float = Field(
        default=20.0, ge=0, le=86_400, description="seconds to finish jobs when told to stop; the rest are handed back"
    )
    worker_name: str = Field(
        default_factory=lambda: f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}",
        description="this process's name, never used twice; the supervisor gives one",
    )
    worker_status: Annotated[Path | None, UNSET] = Field(
        default=None, description="file in which a process says how it is; the supervisor gives one"
    )
    metrics_host: str = Field(default="127.0.0.1", description="address of the worker's /metrics, /healthz and /readyz")
    metrics_port: int = Field(
        default=0, ge=0, le=65_535, description="port of the same, one for all processes of the worker; 0: none"
    )

    pod_name: str = Field(
        default="", description="in Kubernetes: this pod's name; with its namespace, its deletion cost is its jobs"
    )
    pod_namespace: str = Field(default="", description="in Kubernetes: the namespace of this pod")

    def fp8(self, model: str) -> bool:
        """Whether a model's large matrices are to be fp8."""
        return self.precision.get(model, self.precision.get("", "bf16")) == "fp8"

    @field_validator("precision", mode="before")
    @classmethod
    def _parse_precision(cls, value: object) -> object:
        """By the model's name; "" stands for those that are not named."""
        if not isinstance(value, str):
            return value
        found: dict[str, str] = {}
        for part in (part.strip() for part in value.split(",") if part.strip()):
            name, _, kind = part.rpartition("=")
            if kind not in ("bf16", "fp8"):
                raise ValueError(f"{part!r} is not bf16, fp8, name=bf16 or name=fp8")
            if name in found:
                raise ValueError(f"{name or 'the precision of all models'} is said twice")
            found[name] = kind
        return found

    @model_validator(mode="after")
    def _precision_names_models(self) -> Self:
        names = {source.name for source in self.models}
        if unknown := [name for name in self.precision if name and name not in names]:
            raise ValueError(f"precision names {unknown[0]!r}, expected one of {', '.join(sorted(names))}")
        return self

    @field_validator("models", mode="before")
    @classmethod
    def _parse_models(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        sources = tuple(ModelSource.parse(part.strip()) for part in value.split(",") if part.strip())
        names = [source.name for source in sources]
        if len(set(names)) < len(names):
            raise ValueError(f"a model is named twice: {', '.join(names)}")
        return sources
