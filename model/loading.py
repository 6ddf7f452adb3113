"""Tensors of files straight into a GPU's memory: several threads read, in the order of the files.

Each thread has a buffer of pinned memory, so these bound what the host needs. It reads a stretch of a file into its
buffer, has what lies in it copied to its places on a stream of its own, and waits for that while the others read.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from model.weights import CheckpointError, Entry

LANES = 8
BUFFER_BYTES = 2**25
ALIGNMENT = 8  # bytes; tensors are cut between numbers, whatever their dtype

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


@dataclass(frozen=True, eq=False)
class Parcel:
    """A tensor of a file and the memory that it goes to."""

    entry: Entry
    to: Tensor  # contiguous, with as many numbers; of any dtype


class Lane:
    """One thread's buffer, and the way from there to a device."""

    def __init__(self, device: torch.device, size: int = BUFFER_BYTES) -> None:
        cuda = device.type == "cuda"
        self.buffer = torch.empty(size, dtype=torch.uint8, pin_memory=cuda)  # shape = (size,)
        self._device = device
        self._staging: Tensor | None = None  # on the device, for numbers on their way to another dtype
        self._stream = torch.cuda.Stream(device) if cuda else None

    def begin(self) -> None:
        """Wait, on the device, for what the calling thread has begun: it may still read memory that is written now."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def copy(self, to: Tensor, start: int, size: int, dtype: torch.dtype) -> None:
        """Have these bytes of the buffer, numbers of `dtype`, copied; to : shape = (numbers,), of any dtype."""
        part = self.buffer[start : start + size]
        with torch.cuda.stream(self._stream):
            if to.dtype == dtype:
                to.view(torch.uint8).copy_(part, non_blocking=True)
                return
            if self._staging is None:
                self._staging = torch.empty_like(self.buffer, device=self._device)
            staged = self._staging[:size]
            staged.copy_(part, non_blocking=True)
            to.copy_(staged.view(dtype))

    def settle(self) -> None:
        """Wait for all copies: the buffer may be written to again."""
        if self._stream is not None:
            self._stream.synchronize()


def lanes_to(device: torch.device) -> list[Lane]:
    """Lanes to a GPU; none to a device, or on a system, that has no such way."""
    if device.type != "cuda" or not hasattr(os, "preadv"):
        return []
    try:
        return [Lane(device) for _ in range(max(2, min(LANES, os.cpu_count() or 1)))]
    except RuntimeError:  # no more memory can be pinned here
        return []


def load(parcels: Sequence[Parcel], lanes: Sequence[Lane]) -> None:
    """Read all parcels and copy them to their places, on one thread a lane; all is in place when this returns.

    No thread is left behind, whatever happens.
    raises CheckpointError : the first file, in their order, that cannot be read, or is not what its header says
    """
    stretches = list(_stretches(parcels, min(lane.buffer.nbytes for lane in lanes)))
    with ExitStack() as files:
        handles = {path: _opened(path, files) for path in dict.fromkeys(stretch.path for stretch in stretches)}
        reading = _Reading(stretches, handles)
        for lane in lanes:
            lane.begin()
        with ThreadPoolExecutor(len(lanes), "load") as pool:
            try:
                wait([pool.submit(reading.run, lane, torch.is_inference_mode_enabled()) for lane in lanes])
            finally:
                reading.stop()
    if reading.errors:
        raise reading.errors[min(reading.errors)]


@dataclass(frozen=True, eq=False)
class _Part:
    """Bytes of a buffer and where they go."""

    start: int
    size: int
    dtype: torch.dtype  # in the file
    to: Tensor  # shape = (numbers,)


@dataclass(eq=False)
class _Stretch:
    """A part of a file that is read at once."""

    path: Path
    start: int
    size: int = 0
    parts: list[_Part] = field(default_factory=list)


def _stretches(parcels: Sequence[Parcel], limit: int) -> Iterator[_Stretch]:
    """Everything there is to read, in the order of the files, at most `limit` bytes at once."""
    stretch: _Stretch | None = None
    spans = [(parcel, *parcel.entry.file.span(parcel.entry.key)) for parcel in parcels]
    for parcel, start, end in sorted(spans, key=lambda span: (span[0].entry.file.path, span[1])):
        path, dtype, flat = parcel.entry.file.path, DTYPES[parcel.entry.dtype], parcel.to.view(-1)
        at = start
        while at < end:
            follows = stretch is not None and (stretch.path, stretch.start + stretch.size) == (path, at)
            room = limit - stretch.size if stretch is not None and follows else 0
            size = end - at if end - at <= room else room - (at + room - start) % ALIGNMENT
            if stretch is None or size <= 0:
                if stretch is not None:
                    yield stretch
                stretch = _Stretch(path, at)
                continue
            numbers = slice((at - start) // dtype.itemsize, (at + size - start) // dtype.itemsize)
            stretch.parts.append(_Part(stretch.size, size, dtype, flat[numbers]))
            stretch.size += size
            at += size
    if stretch is not None:
        yield stretch


class _Reading:
    """The threads' common list of what is to be read."""

    def __init__(self, stretches: Sequence[_Stretch], handles: Mapping[Path, int]) -> None:
        self.errors: dict[int, BaseException] = {}  # by place in the list
        self._left = iter(enumerate(stretches))
        self._handles = handles
        self._lock, self._stopped = threading.Lock(), False

    def stop(self) -> None:
        """Nothing more is begun."""
        self._stopped = True

    def run(self, lane: Lane, inference: bool = False) -> None:
        """Read on until nothing is left or something went wrong. What comes before an error was begun before it.

        inference : whether the places are inference tensors, which no thread outside that mode may write to
        """
        with torch.inference_mode(inference):
            while (taken := self._next()) is not None:
                n, stretch = taken
                try:
                    self._read(stretch, lane)
                except BaseException as error:
                    self.errors[n] = error
                    self.stop()

    def _next(self) -> tuple[int, _Stretch] | None:
        with self._lock:
            return None if self._stopped else next(self._left, None)

    def _read(self, stretch: _Stretch, lane: Lane) -> None:
        memory = lane.buffer.numpy().data[: stretch.size]
        done = 0
        while done < stretch.size:
            try:
                size = os.preadv(self._handles[stretch.path], [memory[done:]], stretch.start + done)
            except OSError as error:
                raise CheckpointError(f"{stretch.path} cannot be read: {error.strerror}") from error
            if size == 0:
                raise CheckpointError(f"{stretch.path} was cut short while it was read")
            done += size
        try:
            for part in stretch.parts:
                lane.copy(part.to, part.start, part.size, part.dtype)
        finally:
            lane.settle()


def _opened(path: Path, files: ExitStack) -> int:
    try:
        return files.enter_context(path.open("rb", buffering=0)).fileno()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
