"""CUDA graphs by key: what was launched once kernel by kernel is launched as one.

A net of a thousand small kernels waits for Python more than for the GPU. A graph replays them with the same arguments
and in the same memory, bit for bit the same result; only the inputs are copied in and the output out.
"""

from __future__ import annotations

import gc
import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

Output = TypeVar("Output", Tensor, tuple[Tensor, ...])
Function = Callable[..., Any]
"""Gives a tensor or a tuple of them."""

log = logging.getLogger(__name__)

IDLE_RUNS = 1000
"""A graph that was not among so many runs of any key gives its place to another key."""


class Recording(Protocol):
    """A recorded function: runs again on inputs of the same shapes. The output is overwritten by later runs."""

    def __call__(self, *inputs: Tensor) -> Any:
        """The output for other inputs."""


class Recorder(Protocol):
    """Records a function by running it on inputs."""

    def __call__(self, function: Function, *inputs: Tensor) -> Recording:
        """Its recording."""


class Graphs:
    """Runs functions, from a graph where their key has come before. Not thread-safe: one thread owns a GPU.

    record : see CudaRecorder
    limit : how many graphs are held; other keys are run plainly
    """

    def __init__(self, record: Recorder, limit: int = 24) -> None:
        self._record, self.limit = record, limit
        self._recordings: OrderedDict[Hashable, Recording] = OrderedDict()  # the one used last comes last
        self._used: dict[Hashable, int] = {}  # in which run each key came last; of so many keys as fit below
        self._runs = 0
        self._failed: dict[Hashable, int] = {}  # in which run recording a key failed

    @property
    def held(self) -> int:
        """How many graphs there are. No __len__: without any yet, it would be falsy."""
        return len(self._recordings)

    def run(self, key: Hashable, function: Callable[..., Output], *inputs: Tensor) -> Output:
        """function(*inputs). A key stands for one function and the shapes of its inputs.

        The first time it runs plainly, which is what must go fast then; the second time it is recorded.
        """
        self._runs += 1
        known = key in self._used
        self._used[key] = self._runs
        recording = self._recordings.get(key)
        if recording is None and known and not self._refused(key) and self._has_place():
            recording = self._recorded(key, function, *inputs)
        if recording is None:
            self._forget()
            return function(*inputs)
        self._recordings.move_to_end(key)
        output: Output = recording(*inputs)
        return output.clone() if isinstance(output, Tensor) else tuple(part.clone() for part in output)

    def _recorded(self, key: Hashable, function: Function, *inputs: Tensor) -> Recording | None:
        """A new recording. None where that fails, mostly for want of memory: the key runs plainly for a while then."""
        try:
            recording = self._recordings[key] = self._record(function, *inputs)
        except Exception as problem:  # what is wrong with the function itself, a plain run will show
            log.warning("not recorded as a CUDA graph: %s: %s", type(problem).__name__, str(problem)[:300])
            self._failed[key] = self._runs
            return None
        return recording

    def _refused(self, key: Hashable) -> bool:
        """Whether recording it failed lately."""
        return key in self._failed and self._runs - self._failed[key] <= IDLE_RUNS

    def _has_place(self) -> bool:
        """Makes place for one more if it can."""
        if len(self._recordings) < self.limit:
            return True
        oldest = next(iter(self._recordings), None)
        if oldest is None or self._runs - self._used[oldest] <= IDLE_RUNS:
            return False
        del self._recordings[oldest], self._used[oldest]
        return True

    def _forget(self) -> None:
        """Keys without a graph are remembered for as long as graphs are, so that rare shapes do not pile up."""
        if len(self._used) > 8 * self.limit:
            old = [key for key in self._used if key not in self._recordings]
            for key in sorted(old, key=self._used.__getitem__)[: len(old) // 2]:
                del self._used[key]
                self._failed.pop(key, None)


class CudaRecorder:
    """Records CUDA graphs. Those of a device share one memory pool: they never run at the same time.

    A function must launch the same kernels whatever its inputs hold: no branch on a value, no copy to the CPU.
    """

    def __init__(self, device: torch.device, warm: bool = True) -> None:
        """warm: run each function once before it is recorded; not for one that changes things and has run before."""
        self.device, self.warm = device, warm
        self.stream = torch.cuda.Stream(device)

    def __call__(self, function: Function, *inputs: Tensor) -> Recording:
        """The graph of `function` on copies of the inputs."""
        return _CudaGraph(self, function, inputs)


@cache
def _pool(device: torch.device) -> tuple[Any, torch.cuda.CUDAGraph]:
    """That of all graphs of a device, with one that does nothing: a pool whose last graph goes cannot be used again.

    One is enough: no two graphs run at the same time, nor is a result needed when another has run.
    """
    handle, held, stream = torch.cuda.graph_pool_handle(), torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
    with torch.cuda.stream(stream), _nothing_collected():
        held.capture_begin(pool=handle, capture_error_mode="thread_local")
        torch.zeros(1, device=device)
        held.capture_end()
    return handle, held


def _give_up(graph: torch.cuda.CUDAGraph, device: torch.device, pool: Any) -> None:
    """End a capture that failed. Where that fails too, its pool cannot be recorded to again: the next take another."""
    try:
        graph.capture_end()
    except RuntimeError:
        # The allocator would wait for ever; no public function tells it.
        with suppress(RuntimeError, AttributeError):
            torch._C._cuda_endAllocateToPool(device.index or 0, pool)
        _pool.cache_clear()


@contextmanager
def _nothing_collected() -> Iterator[None]:
    """Without Python's garbage collection: a graph among the garbage that goes ends a capture on the way."""
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()


class _CudaGraph:
    def __init__(self, recorder: CudaRecorder, function: Function, inputs: tuple[Tensor, ...]) -> None:
        self.inputs = [tensor.clone() for tensor in inputs]
        self.graph = torch.cuda.CUDAGraph()
        stream, (pool, _) = recorder.stream, _pool(recorder.device)
        stream.wait_stream(torch.cuda.current_stream(recorder.device))
        with torch.cuda.stream(stream):
            if recorder.warm:
                function(*self.inputs)  # kernels are compiled and libraries make their plans and workspaces here
            stream.synchronize()
            # What the plain runs have used would otherwise stay beside the graph's own memory, unused.
            torch.cuda.empty_cache()
            with _nothing_collected():
                self.graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                try:
                    self.output = function(*self.inputs)
                    self.graph.capture_end()
                except BaseException:
                    _give_up(self.graph, recorder.device, pool)
                    raise
        torch.cuda.current_stream(recorder.device).wait_stream(stream)

    def __call__(self, *inputs: Tensor) -> Any:
        """The graph's output for other inputs."""
        for kept, given in zip(self.inputs, inputs, strict=True):
            kept.copy_(given)
        self.graph.replay()
        return self.output
