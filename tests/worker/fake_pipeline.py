"""A pipeline without arithmetic, and an engine over it with a clock of its own."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model.embeddings import Text
from model.pipeline import Lookups
from model.sampling import Shift
from model.work import Begin, Decode, Denoise, Encode, Latents, Work
from tests.worker.jobs import make_job
from worker.engine import Engine
from worker.metrics import WorkerMetrics
from worker.settings import WorkerSettings
from worker.task import Task


@dataclass
class Clock:
    """Seconds that pass only when somebody says so."""

    seconds: float = 0.0

    def __call__(self) -> float:
        return self.seconds


class FakePipeline:
    """Records each batch; `fault` may raise for one; a batch takes `seconds[stage]` of its clock.

    ahead : whether that time passes in `settle`, as a GPU's does, instead of in `run`
    """

    shift = Shift()
    t5_length = 256
    device = torch.device("cpu")

    def __init__(self, fault: Callable[[Sequence[Work]], None] = lambda batch: None, *, ahead: bool = True) -> None:
        self.ahead, self._running_s = ahead, 0.0
        self.batches: list[list[Work]] = []
        self.max_rows: list[int | None] = []
        self.lookups = Lookups()
        self.largest = (0, 0)
        self.fault = fault
        self.clock = Clock()
        self.seconds = {"text_encode": 0.05, "noise": 0.001, "denoise": 0.1, "vae_decode": 0.05}
        self.previewed: list[Latents] = []
        self._made: list[weakref.ref[Tensor]] = []

    def run(self, batch: Sequence[Work], max_rows: int | None = None) -> list[Any]:
        self.batches.append(list(batch))
        self.max_rows.append(max_rows)
        self._running_s += self.seconds.get(batch[0].stage, 0.0)
        if not self.ahead:
            self.settle()
        self.fault(batch)
        return [self._one(work) for work in batch]

    def settle(self) -> None:
        self.clock.seconds, self._running_s = self.clock.seconds + self._running_s, 0.0

    def preview(self, latents: Latents) -> Tensor:
        self.previewed.append(latents)
        return torch.zeros(8, 8, 3, dtype=torch.uint8)

    def _one(self, work: Work) -> Any:
        match work:
            case Encode():
                self.lookups.misses += len(work.prompts)
                return [Text(self.noted(torch.zeros(4, 8)), torch.zeros(8)) for _ in work.prompts]
            case Begin():
                return Latents(self.noted(torch.full((16, work.height // 8, work.width // 8), float(work.seed))))
            case Denoise():
                return None
            case Decode():
                self.largest = max(self.largest, (8 * work.shape[1], 8 * work.shape[0]))
                return torch.zeros(8, 8, 3, dtype=torch.uint8)

    def noted(self, tensor: Tensor) -> Tensor:
        """Count a tensor for as long as it lives."""
        self._made.append(weakref.ref(tensor))
        return tensor

    def alive(self) -> int:
        """The tensors of latents and texts that something still holds."""
        return sum(tensor() is not None for tensor in self._made)

    def sizes(self, kind: type) -> list[int]:
        """Batch sizes of one kind of work."""
        return [len(batch) for batch in self.batches if isinstance(batch[0], kind)]


def seed_of(work: Work) -> int:
    """Whose work this is: the seed of its picture, which fakes keep in the latents."""
    if isinstance(work, Denoise | Decode):
        return int(work.latents.x.flatten()[0])
    return work.seed if isinstance(work, Begin) else -1


class Bench:
    """An engine driven step by step, over pipelines that share a clock."""

    def __init__(
        self,
        pipeline: FakePipeline | None = None,
        *,
        now: Callable[[], float] | None = None,
        others: dict[str, FakePipeline] | None = None,
        **settings: Any,
    ) -> None:
        self.pipeline = pipeline or FakePipeline()
        self.clock = self.pipeline.clock
        self.ended: list[Task] = []
        self.metrics = WorkerMetrics()
        pipelines = {"tiny": self.pipeline, **(others or {})}
        for other in pipelines.values():
            other.clock = self.clock
        self.engine = Engine(
            pipelines,  # type: ignore[arg-type]
            settings=WorkerSettings(**{"token_budget": 100_000, **settings}),
            metrics=self.metrics,
            ended=self.ended.append,
            clock=self.clock,
            **({"now": now} if now else {}),
        )

    def submit(self, **asked: Any) -> Task:
        task = Task(make_job(**asked))
        self.engine.submit(task)
        return task

    def steps(self, turns: int) -> None:
        for _ in range(turns):
            self.engine.step()

    def drain(self) -> None:
        self.engine.stop()
        self.engine.run()

    def metric(self, name: str, **labels: str) -> float:
        self.metrics.refresh()
        return self.metrics.registry.get_sample_value(f"darkroom_{name}", labels) or 0.0
