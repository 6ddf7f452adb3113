"""A crew whose worker obeys requests that do harm: `python -m tests.torture.hostile`.

A prompt with POISON kills the process. The first picture with the seed FREEZE blocks the GPU thread in its decoding
for FREEZE_S, as a hung GPU would, and then goes on; the file DARKROOM_TEST_FROZEN remembers that it has done so.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.torture import POISON
from worker.contract.store import FolderStore
from worker.intake import Intake
from worker.logs import configure
from worker.settings import WorkerSettings
from worker.supervisor import Slot, Supervisor

FREEZE = 666_013
FREEZE_S = 14.0


class Hostile:
    """A pipeline that does what it is told, whatever that is."""

    def __init__(self, pipeline: Any, frozen: Path) -> None:
        self._pipeline, self._frozen = pipeline, frozen
        self._cold: set[int] = set()  # ids of latents that freeze

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pipeline, name)

    def run(self, batch: Sequence[Any], *limits: int) -> list[Any]:
        first = batch[0]
        if first.stage == "text_encode" and any(POISON in prompt for work in batch for prompt in work.prompts):
            os.kill(os.getpid(), signal.SIGKILL)
        if first.stage == "vae_decode" and id(first.latents) in self._cold and not self._frozen.exists():
            self._frozen.touch()
            time.sleep(FREEZE_S)
        results: list[Any] = self._pipeline.run(batch, *limits)
        if first.stage == "noise":
            self._cold |= {id(latents) for work, latents in zip(batch, results, strict=True) if work.seed == FREEZE}
        return results


def process() -> int:
    """As worker.main.serve, with hostile pipelines."""
    from worker.main import Worker, load_models  # loads torch
    from worker.metrics import WorkerMetrics

    configure()
    settings, metrics = WorkerSettings(), WorkerMetrics()
    frozen = Path(os.environ["DARKROOM_TEST_FROZEN"])
    models: Any = {
        name: replace(model, pipeline=Hostile(model.pipeline, frozen))  # type: ignore[arg-type]
        for name, model in load_models(settings, metrics).items()
    }
    intake = Intake.connect(settings, settings.worker_name)
    worker = Worker(settings, models, intake, FolderStore(settings.store_dir), metrics)
    signal.signal(signal.SIGTERM, lambda *_: worker.stop())
    worker.serve()
    return 0


def supervise() -> int:
    """One hostile worker process after the other."""
    configure()
    settings = WorkerSettings()
    command = (sys.executable, "-m", "tests.torture.hostile", "process")
    return Supervisor(settings, [Slot({})], settings.death_limit, command).run()


if __name__ == "__main__":
    sys.exit(process() if sys.argv[1:] == ["process"] else supervise())
