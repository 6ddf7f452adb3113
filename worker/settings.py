"""The worker's settings."""

from __future__ import annotations

import os
import re
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator
from pydantic_settings import NoDecode

from model.config import VARIANTS
from worker.contract.settings import ContractSettings

DEMO = Path(__file__).parent.parent / "model" / "bundles" / "demo"

SERVED = {"sd3.5-large": "large", "sd3.5-large-turbo": "large-turbo", "sd3.5-medium": "medium"}
"""The names under which the published models are served, and the variant that each name declares."""


@dataclass(frozen=True)
class ModelSource:
    """A model that the operator asks for: `name=path`, `name:variant=path`, or the bare name `demo`."""

    name: str
    path: Path
    variant: str | None = None  # None: as the files say

    @classmethod
    def parse(cls, text: str) -> ModelSource:
        """One entry of DARKROOM_MODELS; ValueError says what is wrong with it."""
        if text == "demo":
            return cls("demo", DEMO)
        declared, _, path = text.partition("=")
        name, _, variant = declared.partition(":")
        if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,63}", name) or not path:
            raise ValueError(f"{text!r} is not name=path; a name is lower-case letters, digits, dots and dashes")
        if variant and variant not in VARIANTS:
            raise ValueError(f"{text!r} declares the variant {variant!r}; known: {', '.join(VARIANTS)}")
        return cls(name, Path(path).expanduser(), variant or SERVED.get(name))


class WorkerSettings(ContractSettings):
    """Read once at start from `DARKROOM_*`."""

    models: Annotated[tuple[ModelSource, ...], NoDecode] = Field(
        default=(ModelSource("demo", DEMO),),
        min_length=1,
        description="models to load, comma-separated: `demo`, `name=path`, or `name:variant=path`",
    )
    tokenizers: Path | None = Field(
        default=None, description="folder with tokenizer, tokenizer_2 and tokenizer_3, for single-file checkpoints"
    )
    t5: bool = Field(
        default=True, description="load T5; without it prompts are understood less well, and 9.5 GB are saved"
    )
    t5_length: int | None = Field(
        default=None, ge=1, le=512, description="tokens of T5; absent: as the model says, or 256"
    )
    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda or cuda:N")
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        default="auto", description="auto: bf16 on GPUs and on CPUs with bf16 matrix units, else fp32"
    )
    max_jobs: int = Field(default=8, ge=1, le=256, description="jobs that one worker holds at a time")
    max_batch_rows: int = Field(
        default=8, ge=2, le=256, description="rows of one denoising step; a guided job takes two"
    )
    worker_name: str = Field(
        default_factory=lambda: f"{socket.gethostname()}-{os.getpid()}",
        description="this worker's name, unique in its Redis",
    )
    metrics_host: str = Field(default="127.0.0.1", description="address of the worker's /metrics")
    metrics_port: int = Field(default=0, ge=0, le=65_535, description="port of the worker's /metrics; 0: none")

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
