"""Scenes and captions from a few processes, so that Python never holds up the device."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from model.training.captions import caption
from model.training.drawing import pack
from model.training.scenes import Scene, sample_scene

CHUNK = 64
HELD_OUT_SEEDS = 1 << 40
"""Scenes from this seed on are for looking and measuring, never for training."""

Tokenize = Callable[[str], tuple[list[int], ...]]


@dataclass(frozen=True)
class Batch:
    """Packed scenes, shape = (batch, drawing.WIDTH), and their captions' tokens for each encoder, (batch, length)."""

    scenes: Tensor
    tokens: tuple[Tensor, ...] = ()

    def rows(self, start: int, stop: int | None) -> Batch:
        """Some of the scenes."""
        return Batch(self.scenes[start:stop], tuple(ids[start:stop] for ids in self.tokens))


Chunk = tuple[np.ndarray, ...]
"""Packed scenes and tokens between processes: as plain bytes, for shared tensors would each hold a file open."""


class SceneStream(IterableDataset[Chunk]):
    """Endless chunks of training scenes; each process has seeds of its own."""

    def __init__(self, seed: int, tokenize: Tokenize | None = None, dropout: float = 0.0) -> None:
        self.seed, self.tokenize, self.dropout = seed, tokenize, dropout

    def __iter__(self) -> Iterator[Chunk]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        seed = self.seed + worker
        while True:
            scenes = [sample_scene((seed + n * workers) % HELD_OUT_SEEDS) for n in range(CHUNK)]
            seed += CHUNK * workers
            yield pack(scenes).numpy(), *self._tokens(scenes, Random(seed))

    def _tokens(self, scenes: list[Scene], rng: Random) -> Chunk:
        if self.tokenize is None:
            return ()
        captions = ["" if rng.random() < self.dropout else caption(scene, rng) for scene in scenes]
        rows = zip(*(self.tokenize(text) for text in captions), strict=True)
        return tuple(np.array(row, dtype=np.int32) for row in rows)


class Feed:
    """Batches of any size out of the stream's chunks."""

    def __init__(self, stream: SceneStream, processes: int | None = None) -> None:
        if processes is None:
            processes = min(12, max(0, (os.cpu_count() or 1) - 2))
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the tokenizers' threads do not survive a fork
        # Forked: a fresh interpreter each would import torch and transformers a dozen times at once.
        context = "fork" if processes else None
        loader = DataLoader(
            stream,
            batch_size=None,
            num_workers=processes,
            prefetch_factor=4 if processes else None,
            collate_fn=_unchanged,  # type: ignore[arg-type]
            multiprocessing_context=context,
        )
        self._chunks = iter(loader)
        self._rest: Batch | None = None

    def take(self, count: int) -> Batch:
        """The next `count` scenes."""
        parts = [self._rest] if self._rest else []
        while sum(len(part.scenes) for part in parts) < count:
            scenes, *tokens = map(torch.from_numpy, next(self._chunks))
            parts.append(Batch(scenes, tuple(tokens)))
        whole = Batch(
            torch.cat([part.scenes for part in parts]),
            tuple(torch.cat(column) for column in zip(*(part.tokens for part in parts), strict=True)),
        )
        self._rest = whole.rows(count, None) if len(whole.scenes) > count else None
        return whole.rows(0, count)


def _unchanged(chunk: Chunk) -> Chunk:
    return chunk
