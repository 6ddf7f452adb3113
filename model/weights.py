"""Safetensors files as a net's tensors: checked by their headers first, then read one at a time, fp8 dequantised."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model.keys import Shape

HEADER_LIMIT = 100_000_000  # bytes; the format's own
PICKLES = (".bin", ".ckpt", ".pt", ".pth")
SCALES = ("scale_weight", "weight_scale")
LEFT_OUT = ("scale_input", "input_scale", "comfy_quant")  # hints for fp8 arithmetic, which is not done here
MARKER = "scaled_fp8"
NUMBER_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}
FLOATS = tuple(NUMBER_BYTES)
MOST_SIDES = 64  # of a tensor, as many as NumPy has: a product of any number of sides could take any time
SAMPLES, SAMPLE_BYTES = 64, 4096
CHUNK_BYTES = 2**22


class CheckpointError(Exception):
    """The files are no checkpoint that can be loaded: names the file or tensor, what was found, what is expected."""


class WeightFile:
    """One safetensors file: its header, and its tensors on demand."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.header, self._start = _header(path)
        self.metadata = _metadata(path, self.header.pop("__metadata__", None))
        self.quantized = _quantized_layers(path, self.metadata)
        self._handles: dict[str, Any] = {}

    def read(self, key: str, device: torch.device) -> Tensor:
        """A tensor in the dtype of the file, straight to the device."""
        name = str(device)
        try:
            if name not in self._handles:
                self._handles[name] = safe_open(self.path, framework="pt", device=name)
            return self._handles[name].get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.path}: tensor {key} cannot be read: {error}") from error

    def span(self, key: str) -> tuple[int, int]:
        """Where in the file a tensor's bytes begin and end."""
        start, end = self.header[key]["data_offsets"]
        return self._start + start, self._start + end

    def close(self) -> None:
        """Lets go of the file; it is opened again when it is read again."""
        self._handles.clear()

    def same_bytes(self, key: str, other: WeightFile, its_key: str) -> bool:
        """Whether a tensor is the same as one of another file, of the same dtype and shape, byte for byte."""
        (start, end), (its_start, its_end) = self.span(key), other.span(its_key)
        try:
            if start == its_start and self.path.samefile(other.path):
                return True
            if end - start != its_end - its_start:
                return False
            with self.path.open("rb", buffering=0) as ours, other.path.open("rb", buffering=0) as theirs:
                ours.seek(start)
                theirs.seek(its_start)
                return all(
                    ours.read(size) == theirs.read(size)
                    for size in (min(CHUNK_BYTES, end - at) for at in range(start, end, CHUNK_BYTES))
                )
        except OSError as error:
            raise CheckpointError(f"{self.path} and {other.path} cannot be compared: {error.strerror}") from error

    def fingerprint(self) -> bytes:
        """A digest of the name, the size, the header and samples from all over the data."""
        digest = hashlib.sha256(self.path.name.encode())
        size = self.path.stat().st_size
        with self.path.open("rb") as file:
            digest.update(size.to_bytes(8, "little") + file.read(self._start))
            for sample in range(SAMPLES):
                file.seek(self._start + (size - self._start) * sample // SAMPLES)
                digest.update(file.read(SAMPLE_BYTES))
        return digest.digest()


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file whose tensors and size agree with it, and where its data starts."""
    if path.suffix in PICKLES:
        raise CheckpointError(f"{path} is a pickle, which can run code when loaded: only safetensors files are read")
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            first = file.read(8)
            length = int.from_bytes(first, "little")
            if first == b"version ":
                raise CheckpointError(f"{path} is a Git LFS pointer, not the file itself: fetch it with git lfs pull")
            if size < 8 or not 2 <= length <= min(HEADER_LIMIT, size - 8):
                raise CheckpointError(f"{path} is not a safetensors file, or it is cut short: {size} bytes")
            header = json.loads(file.read(length))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a safetensors file: its header is broken") from error
    if not isinstance(header, dict):
        held = type(header).__name__
        raise CheckpointError(f"{path} is not a safetensors file: its header is a {held}, expected an object")
    ends = [_end(path, name, entry) for name, entry in header.items() if name != "__metadata__"]
    needed = 8 + length + max(ends, default=0)
    if size != needed:
        raise CheckpointError(f"{path} is truncated or corrupt: {size} bytes, expected {needed}")
    return header, 8 + length


def _end(path: Path, name: str, entry: Any) -> int:
    """Where a tensor's data ends, of a header entry in which all that is read from it later is right."""
    about: dict[str, Any] = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = (about.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not (
        isinstance(dtype, str)
        and (_are_counts(shape) and len(shape) <= MOST_SIDES)
        and (_are_counts(offsets) and len(offsets) == 2 and offsets[0] <= offsets[1])
    ):
        raise CheckpointError(f"{path} is not a safetensors file: its header is broken at tensor {name}")
    start, end = offsets
    if dtype in NUMBER_BYTES and end - start != (size := NUMBER_BYTES[dtype] * math.prod(shape)):
        said = f"{end - start} bytes, expected {size} for {dtype} of shape {tuple(shape)}"
        raise CheckpointError(f"{path}: tensor {name} cannot be read: {said}")
    return end


def _are_counts(value: Any) -> TypeGuard[list[int]]:
    """Whether it is a list of whole numbers of at most 63 bits, none negative."""
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _metadata(path: Path, told: Any) -> dict[str, str]:
    """What the header says of the file."""
    if told is None:
        return {}
    if not isinstance(told, dict) or not all(isinstance(value, str) for value in told.values()):
        raise CheckpointError(f"{path}: __metadata__ of its header is broken, expected an object of texts")
    return told


def _quantized_layers(path: Path, metadata: Mapping[str, str]) -> frozenset[str]:
    """The layers that the header says are quantised: each needs a scale."""
    try:
        layers = json.loads(metadata.get("_quantization_metadata", "{}")).get("layers", {})
        formats = {layer: str(about.get("format")) for layer, about in layers.items()}
    except (ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: its _quantization_metadata is broken") from error
    for layer, kind in formats.items():
        if not kind.startswith("float8_"):
            raise CheckpointError(f"{path}: {layer} is quantised as {kind}; expected 16 or 32 bit, fp8 or scaled fp8")
    return frozenset(formats)


@dataclass(frozen=True)
class Entry:
    """A tensor in a file."""

    file: WeightFile
    key: str  # in the file

    @property
    def shape(self) -> Shape:
        """As the header says."""
        return tuple(self.file.header[self.key]["shape"])

    @property
    def dtype(self) -> str:
        """As the format spells it: BF16, F8_E4M3, ..."""
        return str(self.file.header[self.key]["dtype"])

    def same_as(self, other: Entry) -> bool:
        """Whether both are the same tensor, byte for byte."""
        alike = (self.dtype, self.shape) == (other.dtype, other.shape)
        return alike and self.file.same_bytes(self.key, other.file, other.key)


def tensors_of(files: Iterable[WeightFile]) -> dict[str, Entry]:
    """All tensors of some files, by name."""
    entries: dict[str, Entry] = {}
    for file in files:
        for key in file.header:
            if key in entries:
                raise CheckpointError(f"tensor {key} is in both {entries[key].file.path} and {file.path}")
            entries[key] = Entry(file, key)
    return entries


def under(entries: Mapping[str, Entry], *prefixes: str) -> dict[str, Entry]:
    """The tensors whose names begin with one of the prefixes, without it."""
    return {n.removeprefix(p): entry for p in prefixes for n, entry in entries.items() if n.startswith(p)}


class Weights:
    """The tensors of one net under the names of its layout.

    Scaled fp8 is taken apart here: `entries` holds the tensors, `scales` the factor of each scaled one.
    """

    def __init__(self, entries: Mapping[str, Entry], where: object) -> None:
        self.where = where
        named = dict(entries)
        self.marked = named.pop(MARKER, None) is not None
        scales = {_weight_of(name): name for name in named if name.rpartition(".")[2] in SCALES}
        self.scales = {weight: named.pop(name) for weight, name in scales.items() if weight in named}
        hints = {name for name in named if name.rpartition(".")[2] in LEFT_OUT and _weight_of(name) in named}
        self.must_scale = {_weight_of(name) for name in hints if name.endswith("comfy_quant")}
        self.entries = {name: entry for name, entry in named.items() if name not in hints}

    @property
    def files(self) -> list[WeightFile]:
        """The files that hold the tensors."""
        return list({id(e.file): e.file for e in self.entries.values()}.values())

    @property
    def shapes(self) -> dict[str, Shape]:
        """The shape of each tensor."""
        return {name: entry.shape for name, entry in self.entries.items()}

    def same_as(self, other: Weights) -> bool:
        """Whether both hold the same tensors under the same names, byte for byte. CheckpointError."""
        tables = (self.entries, other.entries), (self.scales, other.scales)
        if any(ours.keys() != theirs.keys() for ours, theirs in tables):
            return False
        return all(ours[name].same_as(theirs[name]) for ours, theirs in tables for name in ours)

    def expect(self, shapes: Mapping[str, Shape]) -> None:
        """Refuse unless exactly these tensors are here, of these shapes, in number formats that can be read."""
        self._refuse_some("is missing", [name for name in shapes if name not in self.entries])
        self._refuse_some("is not part of this model", [name for name in self.entries if name not in shapes])
        for name, expected in shapes.items():
            entry = self.entries[name]
            if entry.shape != expected:
                raise CheckpointError(
                    f"{entry.file.path}: tensor {entry.key} has shape {entry.shape}, expected {expected}"
                )
            self._check_number_format(name, entry)

    def _refuse_some(self, what: str, names: list[str]) -> None:
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            where = self.entries[names[0]].file.path if names[0] in self.entries else self.where
            raise CheckpointError(f"{where}: tensor {names[0]} {what}{more}")

    def _check_number_format(self, name: str, entry: Entry) -> None:
        where = f"{entry.file.path}: tensor {entry.key}"
        if entry.dtype not in FLOATS:
            raise CheckpointError(f"{where} holds {entry.dtype}, expected one of {', '.join(FLOATS)}")
        fp8 = entry.dtype.startswith("F8_") and len(entry.shape) > 1
        listed = name in self.must_scale or entry.key.removesuffix(".weight") in entry.file.quantized
        if name in self.scales:
            shape, kind = self.scales[name].shape, self.scales[name].dtype
            if kind not in FLOATS:
                raise CheckpointError(f"{where} has a scale of {kind}, expected one of {', '.join(FLOATS)}")
            if shape not in ((), (1,), entry.shape[:1], (entry.shape[0], 1)):
                raise CheckpointError(f"{where} has a scale of shape {shape}, expected one number, or one a row")
        elif fp8 and (self.marked or listed):
            raise CheckpointError(f"{where} is marked as scaled fp8 but has no scale, expected {name[:-6]}scale_weight")

    def read(self, name: str, device: torch.device, dtype: torch.dtype) -> Tensor:
        """A tensor on the device, in `dtype`; fp8 times its scale if it has one. Never an alias of the file."""
        entry = self.entries[name]
        tensor = entry.file.read(entry.key, device)
        if (scale := self.scales.get(name)) is not None:
            factor = scale.file.read(scale.key, device).float().flatten()
            if not (torch.isfinite(factor).all() and (factor > 0).all()):
                raise CheckpointError(f"{scale.file.path}: scale {scale.key} is not finite and positive")
            tensor = tensor.float() * factor.view(-1, *[1] * (tensor.ndim - 1))
        # On the CPU the file is mapped: a copy, so that the model does not change or fall with the file.
        return tensor.to(dtype, copy=device.type == "cpu")


def _weight_of(name: str) -> str:
    return f"{name.rpartition('.')[0]}.weight"
