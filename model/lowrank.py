"""A variant that is kept as a low-rank difference from its base (LoRA, Hu et al. 2021, arXiv:2106.09685).

A folder with `darkroom.json`, which names the base, and one safetensors file in the layout that diffusers and PEFT
write for SD3. For a module of diffusers' transformer, with W of shape = (out, in) and b of shape = (out,):

    transformer.<module>.lora_A.weight    A, shape = (rank, in)
    transformer.<module>.lora_B.weight    B, shape = (out, rank)    W' = W + scale * B A
    transformer.<module>.lora_B.bias      c, shape = (out,)         b' = b + scale * c; optional
    transformer.<module>.alpha            a number                  scale = alpha / rank; optional

Without an alpha here or in the header's metadata the scale is 1. Encoders and VAE are the base's own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from reprlib import repr as short  # what is in a file may be long
from typing import Any

import torch
from torch import Tensor

from model.bundle import LARGEST_NUMBER
from model.config import MMDiTConfig
from model.keys import Shape, mmdit_rules
from model.mmdit import MMDiT
from model.weights import CheckpointError, Entry, WeightFile, tensors_of

PREFIX = "transformer."
A, B, BIAS, ALPHA = ".lora_A.weight", ".lora_B.weight", ".lora_B.bias", ".alpha"
METADATA = "lora_adapter_metadata"
FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Pair:
    """The change of one module of diffusers' transformer."""

    a: Entry
    b: Entry
    bias: Entry | None
    scale: float


class Difference:
    """A file's changes of an MMDiT, all names and shapes checked. CheckpointError says what is wrong with it."""

    def __init__(self, file: WeightFile, config: MMDiTConfig) -> None:
        self.file = file
        ours = _shapes(config)
        self._rules = {rule.name: rule for rule in mmdit_rules(config)}
        self._shapes = {
            key: rule.source_shape(ours[name]) for name, rule in self._rules.items() for key in rule.sources
        }
        alphas = _Alphas(file)
        self._pairs = {
            module: self._pair(module, parts, alphas) for module, parts in _by_module(file, alphas.patterns).items()
        }

    def changes(self, name: str) -> bool:
        """Whether the tensor that our MMDiT calls `name` may differ from the base's."""
        return any(key.rpartition(".")[0] in self._pairs for key in self._rules[name].sources)

    def of(self, name: str, device: torch.device) -> Tensor | None:
        """The change of the tensor that our MMDiT calls `name`, in fp32 and of its shape; None if it stays."""
        rule = self._rules[name]
        changes = [self._change(key, device) for key in rule.sources]
        if all(change is None for change in changes):
            return None
        zeros = (torch.zeros(self._shapes[key], device=device) for key in rule.sources)
        whole = rule.gather([zero if change is None else change for change, zero in zip(changes, zeros, strict=True)])
        if not torch.isfinite(whole).all():
            raise CheckpointError(f"{self.file.path}: the change of {PREFIX}{rule.sources[0]} is not finite")
        return whole

    def _change(self, key: str, device: torch.device) -> Tensor | None:
        """The change of one tensor of diffusers' transformer."""
        module, _, leaf = key.rpartition(".")
        pair = self._pairs.get(module)
        if pair is None:
            return None
        if leaf == "bias":
            return None if pair.bias is None else pair.scale * _read(pair.bias, device)
        a, b = _read(pair.a, device), _read(pair.b, device)
        return pair.scale * (b.flatten(1) @ a.flatten(1)).view(self._shapes[key])

    def _pair(self, module: str, parts: Mapping[str, Entry], alphas: _Alphas) -> Pair:
        where, shape = self.file.path, self._shapes.get(f"{module}.weight", ())
        if len(shape) < 2:
            raise CheckpointError(f"{where}: {PREFIX}{module} is changed, but this model has no such matrix")
        for part, other in ((A, B), (B, A)):
            if part not in parts:
                raise CheckpointError(f"{where}: {PREFIX}{module} has {other[1:]} or more, but no {part[1:]}")
        a, b, bias = parts[A], parts[B], parts.get(BIAS)
        rank = a.shape[0] if a.shape else 0
        point = (1,) * (len(shape) - 2)  # a convolution's B is 1x1
        _expect_shape(a, (max(rank, 1), *shape[1:]))
        _expect_shape(b, (shape[0], rank, *point))
        if bias is not None:
            _expect_shape(bias, self._shapes.get(f"{module}.bias", ()))
        return Pair(a, b, bias, alphas.scale(module, rank, parts.get(ALPHA)))


class _Alphas:
    """How strongly each pair counts: by tensors beside the pairs, else by the adapter's settings in the header."""

    def __init__(self, file: WeightFile) -> None:
        self.path = file.path
        settings = _settings(file)
        if settings.get("use_dora"):
            raise CheckpointError(f"{file.path} is a DoRA, expected a LoRA")
        self.root = bool(settings.get("use_rslora"))  # Kalajdzievski 2023, arXiv:2312.03732: alpha / sqrt(rank)
        self.common = settings.get("lora_alpha")
        patterns = settings.get("alpha_pattern") or {}
        if not isinstance(patterns, dict):
            raise CheckpointError(f"{file.path}: alpha_pattern of its {METADATA} is no object")
        self.patterns: dict[str, Any] = {name.removeprefix("^"): alpha for name, alpha in patterns.items()}

    def scale(self, module: str, rank: int, entry: Entry | None) -> float:
        """The factor of a module's pair."""
        alpha: Any = self.common
        for name, special in self.patterns.items():
            if module == name or module.endswith(f".{name}"):
                alpha = special
        if entry is not None:
            if math.prod(entry.shape) != 1:
                raise CheckpointError(f"{self.path}: tensor {entry.key} has shape {entry.shape}, expected one number")
            alpha = float(_read(entry, torch.device("cpu")))
        if alpha is None:
            return 1.0
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) <= LARGEST_NUMBER:
            raise CheckpointError(f"{self.path}: the alpha of {PREFIX}{module} is {short(alpha)}, expected a number")
        return alpha / math.sqrt(rank) if self.root else alpha / rank


def _settings(file: WeightFile) -> dict[str, Any]:
    """The adapter's settings as PEFT names them, if the file brings them."""
    try:
        told = json.loads(file.metadata.get(METADATA, "{}"))
        return {name.removeprefix(PREFIX): value for name, value in told.items() if name.startswith(PREFIX)}
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{file.path}: its {METADATA} is broken") from error


def _shapes(config: MMDiTConfig) -> dict[str, Shape]:
    """Of each tensor of an MMDiT. CheckpointError: there can be no such net."""
    try:
        with torch.device("meta"):
            return {name: tuple(tensor.shape) for name, tensor in MMDiT(config).state_dict().items()}
    except (RuntimeError, ValueError, ArithmeticError) as error:
        raise CheckpointError(f"the base's MMDiT cannot be built: {error}") from error


def _by_module(file: WeightFile, patterns: Mapping[str, Any]) -> dict[str, dict[str, Entry]]:
    """The tensors of each module, by what they are to it."""
    modules: dict[str, dict[str, Entry]] = {}
    for key, entry in tensors_of([file]).items():
        part = next((part for part in (A, B, BIAS, ALPHA) if key.endswith(part)), None)
        if part is None or not key.startswith(PREFIX):
            expected = f"{PREFIX}<module>{A} and {B}"
            raise CheckpointError(f"{file.path}: tensor {key} is no part of a transformer's LoRA: expected {expected}")
        if entry.dtype not in FLOATS:
            raise CheckpointError(f"{file.path}: tensor {key} holds {entry.dtype}, expected {', '.join(FLOATS)}")
        modules.setdefault(key.removeprefix(PREFIX).removesuffix(part), {})[part] = entry
    if not modules:
        raise CheckpointError(f"{file.path} holds no tensors, expected a LoRA")
    for name in patterns:
        if not any(module == name or module.endswith(f".{name}") for module in modules):
            raise CheckpointError(f"{file.path}: alpha_pattern of its {METADATA} names {name!r}, which is not there")
    return modules


def _expect_shape(entry: Entry, expected: Shape) -> None:
    if entry.shape != expected:
        raise CheckpointError(f"{entry.file.path}: tensor {entry.key} has shape {entry.shape}, expected {expected}")


def _read(entry: Entry, device: torch.device) -> Tensor:
    return entry.file.read(entry.key, device).float()
