"""What all trainings share: the clock that ends them, the learning rate, the running average, files and log."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from model.training import team
from model.training.muon import adjustable

SHARD_BYTES = 15 * 1024 * 1024


@dataclass
class Clock:
    """How far a leg of training is, by elapsed time: the schedule follows it, so that every leg ends where it should.

    begin, end : the leg's share of the whole schedule, as fractions
    """

    minutes: float  # from `started` to the end of the leg, compiling and saving included
    reserve: float = 0.0  # seconds at the end for measuring and saving
    begin: float = 0.0
    end: float = 1.0
    started: float = field(default_factory=time.monotonic)
    now: float = 0.0  # seconds from the start, as of the last tick
    running: float | None = None  # when the first steps (and with them compiling) were done

    def __post_init__(self) -> None:
        if not 0 <= self.begin < self.end <= 1:
            raise ValueError(f"begin is {self.begin:g} and end {self.end:g}, expected 0 <= begin < end <= 1")

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started

    def tick(self) -> None:
        """Once a step: what is decided by the time until the next is decided alike by all that train together."""
        self.now = team.agree(self.elapsed)

    @property
    def left(self) -> float:
        """Seconds left for training."""
        return 60 * self.minutes - self.reserve - self.now

    def run(self) -> None:
        """Count from now."""
        self.tick()
        self.running = self.now

    @property
    def fraction(self) -> float:
        """Of the whole schedule, `begin` to `end`."""
        if self.running is None:
            return self.begin
        ran = self.now - self.running
        share = ran / max(1e-6, ran + self.left)
        return self.begin + (self.end - self.begin) * min(1.0, max(0.0, share))


def learning_rate(peak: float, fraction: float, step: int, warmup: int) -> float:
    """Linear warm-up by steps, then a cosine to 2 % of the peak by fraction."""
    return peak * min(1.0, (step + 1) / max(1, warmup)) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * fraction)))


class Average:
    """An exponential moving average of parameters, faster at the start."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay, self.steps = decay, 0
        self.live: list[Tensor] = [p for p in module.parameters() if p.requires_grad]
        self.names = [name for name, p in module.named_parameters() if p.requires_grad]
        self.values = [p.detach().clone() for p in self.live]
        self.kept: list[Tensor] = []  # average and weights when the loss was last a number

    def keep(self) -> None:
        """Remember the average and the weights."""
        self.kept = [v.detach().clone() for v in (*self.values, *self.live)]

    @torch.no_grad()
    def go_back(self) -> None:
        """To what was kept last."""
        for target, kept in zip((*self.values, *self.live), self.kept, strict=True):
            target.copy_(kept)

    @torch.no_grad()
    def update(self) -> None:
        """After an optimizer step."""
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(self.values, self.live, 1 - decay)
        self.steps += 1

    @torch.no_grad()
    def swap(self) -> None:
        """Put the average in the module's place and keep its weights; again to undo."""
        for kept, live in zip(self.values, self.live, strict=True):
            held = live.detach().clone()
            live.copy_(kept)
            kept.copy_(held)

    def state(self) -> dict[str, Tensor]:
        """The average by the parameters' names."""
        return dict(zip(self.names, self.values, strict=True))

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """Continue from a saved average. Errors: KeyError for a parameter that it lacks."""
        for name, value in zip(self.names, self.values, strict=True):
            value.copy_(state[name])
        self.steps = 10_000_000  # no fast start again

    @torch.no_grad()
    def restore(self, folder: Path, name: str) -> None:
        """Its own weights, saved under `name`, and the live ones that it follows, of an earlier leg's folder."""
        state = load_shards(folder, "live")
        for key, parameter in zip(self.names, self.live, strict=True):
            parameter.copy_(state[key])
        self.load(load_shards(folder, name))


def save_shards(state: Mapping[str, Tensor], folder: Path, name: str, dtype: torch.dtype = torch.float16) -> list[Path]:
    """Tensors as `name-00001.safetensors` …, each below 16 MiB, in 16 bit. Returns the files."""
    shards: list[dict[str, Tensor]] = [{}]
    room = SHARD_BYTES
    for key, tensor in state.items():
        value = tensor.detach().to("cpu", dtype).contiguous()
        if value.nbytes > room and shards[-1]:
            shards.append({})
            room = SHARD_BYTES
        shards[-1][key] = value
        room -= value.nbytes
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob(f"{name}-*.safetensors"):
        old.unlink()
    paths = [folder / f"{name}-{n:05d}.safetensors" for n in range(1, len(shards) + 1)]
    for shard, path in zip(shards, paths, strict=True):
        save_file(shard, path)
    return paths


def load_shards(folder: Path, name: str) -> dict[str, Tensor]:
    """What `save_shards` wrote, in float32. Errors: FileNotFoundError where there is nothing."""
    paths = sorted(folder.glob(f"{name}-*.safetensors"))
    if not paths:
        raise FileNotFoundError(f"no {name}-*.safetensors in {folder}")
    return {key: value.float() for path in paths for key, value in load_file(path).items()}


class Log:
    """Progress as lines on the terminal and as rows for the training's record."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.rows: list[dict[str, Any]] = []

    def row(self, **figures: Any) -> None:
        """Note and print some figures."""
        figures = {"seconds": round(self.clock.elapsed, 1), "fraction": round(self.clock.fraction, 4), **figures}
        self.rows.append(figures)
        self.say("  ".join(f"{name} {_short(value)}" for name, value in figures.items()))

    def say(self, words: str) -> None:
        """Print a line, of several processes only the one that leads."""
        if team.leads():
            # One write: print makes two when Python is unbuffered, and the processes of a team share the terminal.
            sys.stdout.write(words + "\n")
            sys.stdout.flush()


@dataclass(frozen=True)
class Leg:
    """One run of a training: its clock, its log, and where it computes."""

    clock: Clock
    log: Log
    device: torch.device

    @classmethod
    def start(cls, minutes: float, reserve: float, span: tuple[float, float], device: torch.device) -> Leg:
        """From now on; `span` is the leg's share of the schedule, `reserve` the seconds kept for what comes after."""
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
        clock = Clock(minutes, reserve, *span)
        return cls(clock, Log(clock), device)

    @property
    def on_gpu(self) -> bool:
        """Whether there is a GPU: fused optimizers, bf16."""
        return self.device.type == "cuda"

    def autocast(self) -> torch.autocast:
        """bf16 arithmetic where there is a GPU."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.on_gpu)


def adamw(average: Average, leg: Leg, peak: float) -> list[torch.optim.Optimizer]:
    """One for all the weights that an average follows, for a peak of the learning rate."""
    lr, gpu = adjustable(peak, leg.device), leg.on_gpu
    return [torch.optim.AdamW(average.live, lr, (0.9, 0.98), weight_decay=0.0, fused=gpu, capturable=gpu)]


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """training.json: what made the weights beside it."""
    alone = team.size() == 1
    start = "python -m model.training" if alone else f"torchrun --nproc-per-node {team.size()} -m model.training"
    record = {"command": " ".join([start, *sys.argv[1:]]), "torch": torch.__version__, **record}
    (folder / "training.json").write_text(json.dumps(record, indent=1) + "\n")


def read_record(folder: Path) -> dict[str, Any]:
    """The training.json of a folder."""
    record: dict[str, Any] = json.loads((folder / "training.json").read_text())
    return record


def what_came_before(folder: Path) -> dict[str, Any]:
    """The record of an earlier leg, or of a bundle's flow, for the record of what goes on from it: without its log."""
    record = read_record(folder)
    return {name: value for name, value in record.get("flow", record).items() if name != "log"}


def device_name(device: torch.device) -> str:
    """What the training ran on."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def finite(losses: Iterable[float]) -> bool:
    """Whether all are numbers."""
    return all(math.isfinite(loss) for loss in losses)
