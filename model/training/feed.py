"""Pictures and captions from a few processes, so that Python never holds up the device."""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from model.training import team
from model.training.sources import Frame, Source

AHEAD = 3
"""Chunks that each process may have ready."""

Tokenize = Callable[[str], tuple[list[int], ...]]
Chunk = tuple[np.ndarray, ...]
"""Pictures and what belongs to them (tokens, labels), one row a picture, as they travel between processes."""


class Reading(Protocol):
    """What a process does for a feed; it is sent there once."""

    def chunk(self, frame: Frame) -> int:
        """How many pictures to read at once."""

    def __call__(self, seeds: range, frame: Frame) -> Chunk:
        """The pictures of some seeds."""


@dataclass(frozen=True)
class Batch:
    """Pictures as they were read, one row each, and their captions' tokens for each encoder, (batch, length)."""

    rows: Tensor
    tokens: tuple[Tensor, ...] = ()

    def part(self, start: int, stop: int | None) -> Batch:
        """Some of the pictures."""
        return Batch(self.rows[start:stop], tuple(ids[start:stop] for ids in self.tokens))


def first_seed(seed: int, begin: float = 0.0) -> int:
    """Where a leg's pictures begin: every seed, every leg of one, and every process has pictures of its own."""
    return ((seed % 256) << 32) + ((team.rank() % 16) << 28) + int(begin * 2**28)


@dataclass(frozen=True)
class Captioned:
    """Reads a source's pictures and, with `tokenize`, their captions' tokens."""

    source: Source
    tokenize: Tokenize | None = None

    def chunk(self, frame: Frame) -> int:
        """As the source has it."""
        return self.source.chunk(frame)

    def __call__(self, seeds: range, frame: Frame) -> Chunk:
        """One chunk."""
        rows, captions = self.source.read(seeds, frame)
        if self.tokenize is None:
            return (rows,)
        columns = zip(*map(self.tokenize, captions), strict=True)
        return rows, *(np.array(column, dtype=np.int32) for column in columns)


class Feed:
    """Endless pictures from a seed on, in batches of any size; each frame's are read ahead.

    processes : that read; None for as many as the machine has room for, 0 for none but this one
    """

    def __init__(self, reading: Reading, seed: int, processes: int | None = None) -> None:
        self.reading, self.seed = reading, seed
        room = (os.cpu_count() or 1) // team.size() - 2
        self.processes = min(14, max(0, room)) if processes is None else processes
        self._rest: dict[Frame, Batch] = {}
        self._ahead: dict[Frame, deque[Future[Chunk]]] = {}
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the tokenizers' threads do not survive a fork
        self._pool: ProcessPoolExecutor | None = None
        if self.processes:
            # Forked: a fresh interpreter each would import torch and transformers a dozen times at once.
            context = multiprocessing.get_context("fork")
            self._pool = ProcessPoolExecutor(self.processes, context, _begin, (self.reading,))

    def take(self, count: int, frame: Frame) -> Batch:
        """The next `count` pictures of a frame. Errors: those of reading."""
        parts = [self._rest.pop(frame)] if frame in self._rest else []
        while sum(len(part.rows) for part in parts) < count:
            rows, *tokens = map(torch.from_numpy, self._chunk(frame))
            parts.append(Batch(rows, tuple(tokens)))
        whole = Batch(
            torch.cat([part.rows for part in parts]),
            tuple(torch.cat(column) for column in zip(*(part.tokens for part in parts), strict=True)),
        )
        if len(whole.rows) > count:
            self._rest[frame] = whole.part(count, None)
        return whole.part(0, count)

    def close(self) -> None:
        """End the processes."""
        if self._pool:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def _chunk(self, frame: Frame) -> Chunk:
        if self._pool is None:
            return self.reading(self._seeds(frame), frame)
        ahead = self._ahead.setdefault(frame, deque())
        while len(ahead) < AHEAD * self.processes:
            ahead.append(self._pool.submit(_read, self._seeds(frame), frame))
        return ahead.popleft().result()

    def _seeds(self, frame: Frame) -> range:
        first = self.seed
        self.seed += self.reading.chunk(frame)
        return range(first, self.seed)


_reading: list[Reading] = []  # of a process of the pool: sent once, by the fork


def _begin(reading: Reading) -> None:
    torch.set_num_threads(1)
    _reading[:] = [reading]


def _read(seeds: range, frame: Frame) -> Chunk:
    return _reading[0](seeds, frame)
