"""Trains the MMDiT and its text encoders by flow matching (Lipman et al. 2022; Esser et al. 2024, arXiv:2403.03206)."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import MMDiTConfig
from model.mmdit import MMDiT
from model.training.demo import DEMO_MMDIT, T5_LENGTH, Reader, TextTower, new_mmdit, new_tower
from model.training.drawing import draw
from model.training.feed import Batch, Feed, SceneStream
from model.training.loop import (
    Average,
    Leg,
    Log,
    device_name,
    finite,
    learning_rate,
    load_shards,
    read_record,
    save_shards,
    write_record,
)
from model.training.reconstruction import load_vae
from model.training.samples import write_samples
from model.training.scenes import DATA_VERSION
from model.vae import VAE

Size = tuple[int, int, int]  # height, width, batch


@dataclass(frozen=True)
class Phase:
    """A part of the schedule: until which fraction, on which sizes (one a step), with which timestep shift."""

    until: float
    sizes: tuple[Size, ...]
    shift: float


# Where a picture's colours and places are decided: the larger it is, the more noise leaves them visible, so the larger
# the shift must be for the training to see the levels that decide. Small pictures first: they are four times as many.
PLAN = (
    Phase(0.45, ((256, 256, 256),), 3.0),
    Phase(1.00, ((512, 512, 64), (512, 512, 64), (512, 512, 64), (512, 768, 42), (768, 512, 42)), 5.0),
)


@dataclass(frozen=True, kw_only=True)
class FlowTraining:
    """The settings of a run."""

    out: Path
    vae: Path
    minutes: float
    config: MMDiTConfig = DEMO_MMDIT
    plan: tuple[Phase, ...] = PLAN
    peak: float = 1.5e-3  # learning rate
    warmup: int = 200  # steps
    average: float = 0.999
    dropout: float = 0.1  # share of captions that are left empty, for guidance
    uniform: float = 0.2  # share of noise levels drawn evenly, so that the lowest are learnt too
    reuse: int = 2  # how often a drawn and encoded picture is trained on, each time with other noise
    seed: int = 1
    begin: float = 0.0
    end: float = 1.0
    resume: Path | None = None
    compiled: bool = True
    processes: int | None = None
    samples: bool = True

    def phase(self, fraction: float) -> Phase:
        """The phase at a fraction of the schedule."""
        return next((phase for phase in self.plan if fraction < phase.until), self.plan[-1])


def train_flow(settings: FlowTraining, device: torch.device) -> dict[str, float]:
    """Trains and writes weights, sample sheets and training.json to `settings.out`; returns the measures."""
    leg = Leg.start(settings.minutes, 30 if settings.samples else 5, (settings.begin, settings.end), device)
    log = leg.log
    torch.manual_seed(settings.seed)
    net = FlowNet(new_mmdit(settings.config), new_tower()).to(device)
    average = Average(net, settings.average)
    if settings.resume:
        restore(average, settings.resume)
    vae = load_vae(settings.vae, device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    log.say(f"{net.count:,} parameters on {device_name(device)}")
    measures = Run(settings, net, average, vae, leg).loop()
    average.swap()
    finish(settings, net, average, measures, log)
    if settings.samples:
        with torch.compiler.set_stance("force_eager"):
            write_samples(net.mmdit, vae, net.tower, settings.out)
        log.say(f"samples after {leg.clock.elapsed:.0f} s")
    return measures


class FlowNet(nn.Module):
    """All that flow matching trains."""

    def __init__(self, mmdit: MMDiT, tower: TextTower) -> None:
        super().__init__()
        self.mmdit, self.tower = mmdit, tower

    @property
    def count(self) -> int:
        """Parameters."""
        return sum(p.numel() for p in self.parameters())

    def forward(self, latents: Tensor, noise: Tensor, sigma: Tensor, tokens: tuple[Tensor, ...]) -> Tensor:
        """The flow matching loss, a scalar. Latents and noise: shape = (batch, 16, h/8, w/8); sigma: (batch,)."""
        context, pooled = self.tower(*tokens)
        level = sigma[:, None, None, None]
        velocity = self.mmdit((1 - level) * latents + level * noise, 1000 * sigma, context, pooled)
        return F.mse_loss(velocity.float(), noise - latents)


def new_net(config: MMDiTConfig = DEMO_MMDIT) -> FlowNet:
    """Random weights."""
    return FlowNet(new_mmdit(config), new_tower())


def restore(average: Average, folder: Path) -> None:
    """Into the average and the weights that it follows, those of an earlier leg's folder."""
    state = load_shards(folder, "live")
    with torch.no_grad():
        for name, parameter in zip(average.names, average.live, strict=True):
            parameter.copy_(state[name])
    average.load(load_shards(folder, "flow"))


def load_average(net: FlowNet, folder: Path) -> None:
    """The averaged weights of a run, in place."""
    state = load_shards(folder, "flow")
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(state[name])


def sample_sigma(count: int, shift: float, uniform: float, device: torch.device) -> Tensor:
    """Noise levels: logit-normal and shifted, some of them evenly drawn. shape = (count,), from 0 to 1."""
    t = torch.sigmoid(torch.randn(count, device=device))
    shifted = shift * t / (1 + (shift - 1) * t)
    even = torch.rand(count, device=device)
    return torch.where(torch.rand(count, device=device) < uniform, even, shifted)


class Latents:
    """Pictures, encoded, with their captions' tokens; each is handed out `reuse` times."""

    def __init__(self, settings: FlowTraining, vae: VAE, feed: Feed, leg: Leg) -> None:
        self.settings, self.vae, self.feed, self.leg = settings, vae, feed, leg
        self.pools: dict[Size, deque[tuple[int, Batch, Tensor]]] = {}
        self.encoder: Callable[[Tensor], Tensor] = vae.encoder
        if settings.compiled:
            self.encoder = torch.compile(vae.encoder, dynamic=False)

    def take(self, size: Size) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Latents of shape = (batch, 16, h/8, w/8) as the MMDiT sees them, and tokens, on the device."""
        pool = self.pools.setdefault(size, deque())
        if len(pool) < 8 or self.settings.reuse < 2:
            batch = self.feed.take(size[2])
            uses, latents = self.settings.reuse, self._encode(batch, size)
        else:
            uses, batch, latents = pool.popleft()
        if uses > 1:
            pool.append((uses - 1, batch, latents))
        return latents, tuple(ids.to(self.leg.device, torch.long, non_blocking=True) for ids in batch.tokens)

    @torch.no_grad()
    def _encode(self, batch: Batch, size: Size) -> Tensor:
        height, width, _ = size
        pixels = draw(batch.scenes, height, width, self.leg.device).contiguous(memory_format=torch.channels_last)
        # Compiling pays for the sizes that come most often.
        encoder = self.encoder if height == width else self.vae.encoder
        with self.leg.autocast():
            try:
                moments = encoder(pixels)
            except Exception as problem:  # a compiler's errors have no common type
                if encoder is self.vae.encoder:
                    raise
                self.leg.log.say(f"encoding without torch.compile: {type(problem).__name__}: {str(problem)[:300]}")
                self.encoder = self.vae.encoder
                moments = self.encoder(pixels)
        return self.vae.to_model(moments.chunk(2, dim=1)[0].float())


class Run:
    """The training loop and what it holds."""

    def __init__(self, settings: FlowTraining, net: FlowNet, average: Average, vae: VAE, leg: Leg) -> None:
        self.settings, self.net, self.average, self.leg = settings, net, average, leg
        self.clock, self.log, self.device = leg.clock, leg.log, leg.device
        self.random = random.Random(settings.seed)
        self.peak, self.step_count, self.pictures = settings.peak, 0, 0
        self.optimizer = self._new_optimizer()
        self.safe: list[Tensor] | None = None  # average and weights when the loss was last a number
        self.last_loss = float("nan")
        first_seed = (settings.seed << 32) + int(settings.begin * 2**30)  # a later leg has other scenes
        stream = SceneStream(first_seed, Reader(net.tower.encoders()), settings.dropout)
        self.latents = Latents(settings, vae, Feed(stream, settings.processes), leg)
        self.compiled = settings.compiled
        if settings.compiled:
            torch._dynamo.config.recompile_limit = 64  # one for every kind of block and size
            for block in net.mmdit.joint_blocks:
                block.compile(dynamic=False)

    def _new_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            self.average.live, lr=self.peak, betas=(0.9, 0.98), weight_decay=0.01, fused=self.leg.on_gpu
        )

    def loop(self) -> dict[str, float]:
        """Steps until the clock ends; returns figures of the leg. An error late in a run does not lose the run."""
        try:
            self._loop()
        except Exception as problem:
            if self.safe is None:
                raise
            self.log.say(f"stopped early: {type(problem).__name__}: {str(problem)[:600]}")
            self._go_back()
        return {"steps": self.step_count, "pictures": self.pictures, "loss": self.last_loss}

    def _loop(self) -> None:
        losses: list[Tensor] = []
        since, seen = self.clock.elapsed, 0
        while self.clock.left > 0:
            losses.append(self.step())
            if self.step_count == 3:
                losses[-1].item()  # waits for the device
                self.log.say(f"first steps after {self.clock.elapsed:.0f} s")
                self.clock.run()
                since, seen = self.clock.elapsed, self.pictures
            elif self.step_count > 3 and self.clock.elapsed - since > 10:
                loss = torch.stack(losses).mean().item()
                now = self.clock.elapsed
                self._report(loss, (self.pictures - seen) / (now - since))
                since, seen, losses = now, self.pictures, []

    def _report(self, loss: float, rate: float) -> None:
        self.log.row(
            step=self.step_count, pictures=self.pictures, per_s=rate, loss=loss, lr=self.optimizer.param_groups[0]["lr"]
        )
        if finite([loss]):
            self.last_loss = loss
            self.safe = [v.detach().clone() for v in (*self.average.values, *self.average.live)]
            return
        if self.safe is None:
            raise FloatingPointError(f"the loss is {loss} after {self.step_count} steps: lower the learning rate")
        self.peak /= 2
        self.log.say(f"the loss is {loss}: back to the last good weights with half the learning rate")
        self._go_back()
        self.optimizer = self._new_optimizer()

    @torch.no_grad()
    def _go_back(self) -> None:
        for target, kept in zip((*self.average.values, *self.average.live), self.safe or (), strict=True):
            target.copy_(kept)

    def step(self) -> Tensor:
        """One optimizer step; returns the loss, still on the device."""
        s, fraction = self.settings, self.clock.fraction
        phase = s.phase(fraction)
        latents, tokens = self.latents.take(self.random.choice(phase.sizes))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.peak, fraction, self.step_count, s.warmup)
        noise = torch.randn_like(latents)
        loss = self._gradients(latents, noise, sample_sigma(len(latents), phase.shift, s.uniform, self.device), tokens)
        torch.nn.utils.clip_grad_norm_(self.average.live, 1.0, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.average.update()
        self.step_count += 1
        self.pictures += len(latents)
        return loss

    def _gradients(self, latents: Tensor, noise: Tensor, sigma: Tensor, tokens: tuple[Tensor, ...]) -> Tensor:
        try:
            return self._backward(latents, noise, sigma, tokens)
        except Exception as problem:  # a compiler's errors have no common type; without it the run is only slower
            if not self.compiled:
                raise
            self.log.say(f"going on without torch.compile: {type(problem).__name__}: {str(problem)[:300]}")
        self.compiled = False
        torch.compiler.set_stance("force_eager")
        self.optimizer.zero_grad(set_to_none=True)
        return self._backward(latents, noise, sigma, tokens)

    def _backward(self, latents: Tensor, noise: Tensor, sigma: Tensor, tokens: tuple[Tensor, ...]) -> Tensor:
        with self.leg.autocast():
            loss: Tensor = self.net(latents, noise, sigma, tokens)
        loss.backward()
        return loss.detach()


def finish(settings: FlowTraining, net: FlowNet, average: Average, measures: dict[str, float], log: Log) -> None:
    """Writes what came out. `net` holds the average, `average` the live weights."""
    out = settings.out
    averaged = {name: p for name, p in net.named_parameters() if p.requires_grad}
    save_shards(averaged, out, "flow")
    save_shards(average.state(), out, "live")
    plan = [asdict(phase) for phase in settings.plan]
    write_record(
        out,
        {
            "what": "flow", "data_version": DATA_VERSION, "config": asdict(settings.config), "t5_length": T5_LENGTH,
            "metrics": measures, "minutes": round(log.clock.elapsed / 60, 2), "seed": settings.seed,
            "begin": settings.begin, "end": settings.end, "peak": settings.peak, "plan": plan,
            "device": device_name(next(net.parameters()).device),
            "resumed": str(settings.resume) if settings.resume else None, "vae": read_record(settings.vae)["metrics"],
            "log": log.rows[:: max(1, len(log.rows) // 40)],
        },
    )  # fmt: skip
