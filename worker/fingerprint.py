"""What must be the same for a deterministic job to give the same bytes: machine, software, weights, settings."""

from __future__ import annotations

import hashlib
import json
import platform
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import transformers

import model as model_package
from model.choices import TABLE
from model.fp8 import Fp8Linear
from model.kernels import has_triton
from model.pipeline import Pipeline

UNSEEN = {"training", "evaluation", "bundles", "__pycache__"}
"""Folders of the model's package that no served picture depends on, or whose weights the revision tells."""


def parts(pipeline: Pipeline, revision: str) -> dict[str, str | int]:
    """Everything that the bytes of a picture depend on, beside its job."""
    return {
        "device": _device_name(pipeline.device),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "build": _build(),
        "revision": revision,
        "dtype": str(pipeline.dtype),
        "way": pipeline.way,
        "precision": "fp8" if any(isinstance(layer, Fp8Linear) for layer in pipeline.mmdit.modules()) else "",
        "kernels": _kernels(pipeline.device) if pipeline.device.type == "cuda" else "",
        "texts": pipeline.text.digest,
        "text_device": pipeline.text.device.type,
        "text_dtype": str(next(pipeline.text.clip_l.parameters()).dtype),
        "t5_length": pipeline.t5_length if pipeline.text.t5 is not None else 0,
        "threads": torch.get_num_threads() if pipeline.device.type == "cpu" else 0,
    }


def fingerprint(pipeline: Pipeline, revision: str) -> str:
    """The parts as 16 hex digits: enough to compare, and nothing about the machine is given away."""
    told = json.dumps(parts(pipeline, revision), sort_keys=True)
    return f"fp_{hashlib.sha256(told.encode()).hexdigest()[:16]}"


@cache
def _kernels(device: torch.device) -> str:
    """The packages, beside PyTorch, that bring kernels; those that are absent, or do not work here, too."""
    found = {}
    for package in ("triton", "fa3-fwd"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "absent"
    if not has_triton(device):
        found["triton"] = "unused"
    return ", ".join(f"{package} {version}" for package, version in found.items())


@cache
def _build() -> str:
    """Darkroom's version, its own arithmetic as it is on this disk, and which way through it is taken."""
    digest = hashlib.sha256()
    root = Path(model_package.__path__[0])
    for path in sorted([*root.rglob("*.py"), TABLE]):
        if UNSEEN.isdisjoint(path.relative_to(root).parts):
            digest.update(path.read_bytes())
    version: str = metadata.version("darkroom")
    return f"{version}+{digest.hexdigest()[:12]}"


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        cudnn: Any = torch.backends.cudnn
        return f"{torch.cuda.get_device_name(device)}, cudnn {cudnn.version()}"
    return f"{_cpu_name()}, {torch.backends.cpu.get_cpu_capability()}"


@cache
def _cpu_name() -> str:
    """The CPU's model: its matrix libraries choose their kernels by it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "flags"))]
    return hashlib.sha256("".join(names[:2]).encode()).hexdigest()[:12]
