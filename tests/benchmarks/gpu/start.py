"""A process that loads a model as a worker does and makes pictures: how soon, and whether the first ones are slower."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from tests.tiny_bundle import CARD

STEPS, LATER = 4, 5


@dataclass(frozen=True)
class Told:
    """What the process says of itself; seconds."""

    ready_s: float  # since it was started
    import_s: float
    load_s: float  # files to weights, without the picture that warms up
    first_s: float
    later_s: list[float]
    other_s: list[float]  # at another size: the first one, and later ones
    gigabytes: float = 0.0


def measured(pipeline: Any, size: Any, device: torch.device) -> Told:
    """Write the weights, and start a process that loads them; the files were just written, so memory holds them."""
    from tests.gpu.nets import released, written

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "bench"
        gigabytes = written(pipeline, folder) / 1e9
        if size.side != 1024:
            (folder / "darkroom.json").write_text(json.dumps(CARD))
        pipeline.mmdit, pipeline.vae, pipeline.text = None, None, None  # its memory is the process's now
        released(device)
        command = [sys.executable, "-W", "ignore", "-m", "tests.benchmarks.gpu.start", str(folder)]
        command += ["--side", str(size.side), "--scale", str(size.guidance_scale), "--spawned", str(time.time())]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=300)
    return Told(**json.loads(done.stdout.splitlines()[-1]) | {"gigabytes": gigabytes})


def main() -> None:
    """The process itself."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--side", type=int, required=True)
    parser.add_argument("--scale", type=float, required=True)
    parser.add_argument("--spawned", type=float, required=True)
    chosen = parser.parse_args()
    from model.params import GenerationParams
    from model.pipeline import run
    from model.work import generate
    from worker import models
    from worker.settings import ModelSource, WorkerSettings

    imported = time.time()
    loading = [0.0]
    load = models.load_components

    def timed(*arguments: Any, **named: Any) -> Any:
        started = time.time()
        try:
            return load(*arguments, **named)
        finally:
            loading[0] += time.time() - started

    models.load_components = timed  # type: ignore[assignment]
    settings = WorkerSettings(t5=False, dtype="bf16")
    pipeline = models.Loader(settings).load(ModelSource("bench", chosen.folder)).pipeline
    ready = time.time()

    def request(side: int, n: int) -> float:
        started = time.perf_counter()
        params = GenerationParams(
            prompt=f"a red cat, {n}", width=side, height=side, steps=STEPS, guidance_scale=chosen.scale, seed=n
        )
        run(generate(params, pipeline.shift), pipeline)  # ends with a picture on the CPU
        return time.perf_counter() - started

    first, *later = [request(chosen.side, n) for n in range(1 + LATER)]
    other = [request(chosen.side // 2, n) for n in range(3)]
    spawned = chosen.spawned
    print(json.dumps(asdict(Told(ready - spawned, imported - spawned, loading[0], first, later, other))))


if __name__ == "__main__":
    main()
