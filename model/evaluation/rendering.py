"""Makes many pictures: in batches on a GPU, in a few processes of few threads on a CPU."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from model.evaluation.subject import Subject, load_subject
from model.params import GenerationParams
from model.pipeline import Pipeline
from model.work import Decode, NonFiniteLatents, Work, generate

MAX_PROCESSES = 4
PIXELS_AT_ONCE = 32 * 512 * 512
"""A batch on a GPU has about so many pixels."""

Picture = tuple[int, Tensor]  # which of the asked ones, and its pixels: shape = (h, w, 3), uint8, on the CPU
Go = Callable[[GenerationParams], bool]
"""Whether there is time left for a picture; asked before each is begun."""


class Renderer(Protocol):
    """Makes pictures and gives each when it is there, in any order; leaves out those for which `go` says no."""

    dtype: str
    lanes: int  # pictures at a time that hardly slow one another down

    def render(self, wanted: Sequence[GenerationParams], go: Go) -> Iterator[Picture]:
        """Pictures, as they become ready."""
        ...

    def close(self) -> None:
        """Ends what runs beside this process."""
        ...


class Batches:
    """One process, one pipeline."""

    def __init__(self, pipeline: Pipeline, dtype: str) -> None:
        self.pipeline, self.dtype, self.lanes = pipeline, dtype, 1

    def render(self, wanted: Sequence[GenerationParams], go: Go) -> Iterator[Picture]:
        """In the order asked for; pictures of one size share batches."""
        start = 0
        while start < len(wanted) and go(wanted[start]):
            first = wanted[start]
            most = max(1, PIXELS_AT_ONCE // (first.width * first.height))
            batch = wanted[start : start + most]
            yield from zip(range(start, start + len(batch)), together(batch, self.pipeline), strict=True)
            start += len(batch)

    def close(self) -> None:
        """There is nothing to end."""


def together(batch: Sequence[GenerationParams], pipeline: Pipeline) -> list[Tensor]:
    """Pictures made at the same time: their equal steps share batches. One that went wrong is black."""
    generators = [generate(params, pipeline.shift) for params in batch]
    works: dict[int, Work] = {n: next(generator) for n, generator in enumerate(generators)}
    pixels: dict[int, Tensor] = {}
    while works:
        key = _key(next(iter(works.values())))
        some = [n for n, work in works.items() if _key(work) == key]
        for n, result in zip(some, pipeline.run([works.pop(n) for n in some]), strict=True):
            try:
                works[n] = generators[n].throw(result) if isinstance(result, Exception) else generators[n].send(result)
            except StopIteration as end:
                pixels[n] = end.value.pixels
            except NonFiniteLatents:
                pixels[n] = black(batch[n])
    return [pixels[n] for n in range(len(batch))]


def black(params: GenerationParams) -> Tensor:
    """What stands for a picture that could not be made: nothing on it is right. shape = (h, w, 3), uint8."""
    return torch.zeros(params.height, params.width, 3, dtype=torch.uint8)


def _key(work: Work) -> Hashable:
    """Pictures are decoded one after another in the pipeline itself: for the order here they are all alike."""
    return work.stage if isinstance(work, Decode) else work.key


class Processes:
    """Each process has the model and makes one picture at a time: on few cores faster than threads that share one."""

    def __init__(self, path: Path, dtype: str, count: int | None = None) -> None:
        cores = os.cpu_count() or 1
        self.dtype, self.lanes = dtype, count or min(MAX_PROCESSES, cores)
        self._pool = ProcessPoolExecutor(
            self.lanes,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_begin,
            initargs=(path, dtype, max(1, cores // self.lanes)),
        )

    def render(self, wanted: Sequence[GenerationParams], go: Go) -> Iterator[Picture]:
        """As they become ready."""
        waiting = list(enumerate(wanted))[::-1]
        running: dict[Future[np.ndarray], int] = {}
        while waiting or running:
            while waiting and len(running) < self.lanes:
                n, params = waiting.pop()
                if not go(params):
                    waiting.clear()
                    break
                running[self._pool.submit(_make, params)] = n
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield running.pop(future), torch.from_numpy(future.result())

    def close(self) -> None:
        """Ends the processes, whatever they are doing."""
        children = multiprocessing.active_children()
        self._pool.shutdown(wait=False, cancel_futures=True)
        for child in children:
            child.terminate()
            child.join()


_subject: Subject | None = None  # of a process of the pool


def _begin(path: Path, dtype: str, threads: int) -> None:
    global _subject
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C reaches all: these end without a word
    torch.set_num_threads(threads)
    _subject = load_subject(path, torch.device("cpu"), dtype)


def _make(params: GenerationParams) -> np.ndarray:
    assert _subject is not None
    return together([params], _subject.pipeline)[0].numpy()
