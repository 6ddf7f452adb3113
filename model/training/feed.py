"""Scenes and captions from a few processes, so that Python never holds up the device."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

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
    """Packed scenes, and their captions' tokens for each encoder. scenes: shape = (batch, drawing.WIDTH); tokens: (batch, length)."""

    scenes: Tensor
    tokens: tuple[Tensor, ...] = ()


class SceneStream(IterableDataset[Batch]):
    """Endless chunks of training scenes; each process has seeds of its own."""

    def __init__(self, seed: int, tokenize: Tokenize | None = None, dropout: float = 0.0) -> None:
        self.seed, self.tokenize, self.dropout = seed, tokenize, dropout

    def __iter__(self) -> Iterator[Batch]:
        torch.set_num_threads(1)
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        seed = self.seed + worker
        while True:
            scenes = [sample_scene((seed + n * workers) % HELD_OUT_SEEDS) for n in range(CHUNK)]
            seed += CHUNK * workers
            yield Batch(pack(scenes), self._tokens(scenes, Random(seed)))

    def _tokens(self, scenes: list[Scene], rng: Random) -> tuple[Tensor, ...]:
        if self.tokenize is None:
            return ()
        captions = ["" if rng.random() < self.dropout else caption(scene, rng) for scene in scenes]
        rows = zip(*(self.tokenize(text) for text in captions), strict=True)
        return tuple(torch.tensor(row, dtype=torch.int32) for row in rows)


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
            prefetch_factor=16 if processes else None,
            multiprocessing_context=context,
        )
        self._chunks = iter(loader)
        self._rest: Batch | None = None

    def take(self, count: int) -> Batch:
        """The next `count` scenes."""
        parts = [self._rest] if self._rest else []
        while sum(len(part.scenes) for part in parts) < count:
            parts.append(next(self._chunks))
        scenes = torch.cat([part.scenes for part in parts])
        tokens = tuple(torch.cat(column) for column in zip(*(part.tokens for part in parts), strict=True))
        self._rest = Batch(scenes[count:], tuple(t[count:] for t in tokens)) if len(scenes) > count else None
        return Batch(scenes[:count], tuple(t[:count] for t in tokens))
