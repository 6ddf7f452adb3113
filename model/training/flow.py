"""Trains the MMDiT and its text encoders by flow matching (Lipman et al. 2022; Esser et al. 2024, arXiv:2403.03206)."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from model.config import MMDiTConfig
from model.sampling import shifted
from model.training import team
from model.training.compiling import load_compiled, save_compiled
from model.training.demo import DEMO_MMDIT
from model.training.descent import Descent
from model.training.feed import Captioned, Feed, first_seed
from model.training.loop import (
    Average,
    Leg,
    device_name,
    learning_rate,
    read_record,
    save_shards,
    what_came_before,
    write_record,
)
from model.training.muon import new_optimizers
from model.training.net import FlowNet, bundle_net, new_net, run_net, save_tokenizers, saved_tokenizers
from model.training.plan import Phase, Plan, demo_plan, phase_at
from model.training.reconstruction import load_vae
from model.training.reservoir import Encoder, Reservoir
from model.training.samples import write_samples
from model.training.scenes import DATA_VERSION
from model.training.sources import Drawings, Source
from model.training.tokenizers import count_words, tokenizers_of
from model.training.validation import Validation


@dataclass(frozen=True, kw_only=True)
class FlowTraining:
    """The settings of a run."""

    out: Path
    vae: Path  # a run's folder or a bundle
    minutes: float
    config: MMDiTConfig = DEMO_MMDIT
    start: Path | None = None  # a bundle to train further
    source: Source = field(default_factory=Drawings)
    plan: Plan = field(default_factory=demo_plan)
    optimizer: str = "muon"  # muon | adamw
    peak: float = 1.5e-3  # learning rate
    warmup: int = 200  # steps; a quarter of it after a resume
    average: float = 0.999
    dropout: float = 0.1  # share of captions that are left empty, for guidance
    uniform: float = 0.2  # share of noise levels drawn evenly, so that the lowest are learnt too
    reuse: float = 4.0  # how often a drawn and encoded picture is trained on, each time with other noise
    memory: int = 12_000_000_000  # bytes for encoded pictures
    seed: int = 1
    begin: float = 0.0
    end: float = 1.0
    resume: Path | None = None
    cache: Path | None = None  # folder of what was compiled
    compiled: bool = True
    processes: int | None = None
    pictures: int | None = None  # of the validation; None for as many as the device measures soon
    prompts: tuple[str, ...] | None = None  # of the sample sheets: None for the drawings', empty for no sheets


def train_flow(settings: FlowTraining, device: torch.device) -> dict[str, float]:
    """Trains and writes weights, sample sheets and training.json to `settings.out`; returns the measures."""
    leg = Leg.start(settings.minutes, 28 if settings.prompts != () else 8, (settings.begin, settings.end), device)
    torch.backends.cudnn.benchmark = False  # the autoencoder sees every size seldom: trying kernels out does not pay
    torch.manual_seed(settings.seed)  # of the first weights; noise differs between processes
    net = first_net(settings).to(device)
    average = Average(net, settings.average)
    if settings.resume:
        average.restore(settings.resume, "flow")
    load_compiled(settings.cache, leg.log)
    vae = load_vae(settings.vae, device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    leg.log.say(f"{net.count:,} parameters on {device_name(device)}, {settings.source.name}")
    torch.manual_seed(settings.seed + team.rank())
    run = Run(settings, net, average, Encoder(settings.source, vae, leg), leg)
    measures = run.loop()
    if not team.leads():
        return measures
    run.save(measures)
    save_compiled(settings.cache, leg.log)
    if settings.prompts != ():
        average.swap()
        with torch.compiler.set_stance("force_eager"):
            write_samples(net, vae, settings.out, settings.prompts)
        leg.log.say(f"samples after {leg.clock.elapsed:.0f} s")
    return measures


def first_net(settings: FlowTraining) -> FlowNet:
    """An earlier leg's net (its weights yet to be restored), a bundle's, or a new one."""
    if settings.resume:
        return run_net(settings.resume)
    if settings.start:
        return bundle_net(settings.start)
    if isinstance(settings.source, Drawings):
        return new_net(settings.config)
    return new_net(settings.config, tokenizers_of(count_words(settings.source.captions())))


def sample_sigma(count: int, shift: float, uniform: float, device: torch.device) -> Tensor:
    """Noise levels: logit-normal and shifted, some of them evenly drawn. shape = (count,), from 0 to 1."""
    t = torch.sigmoid(torch.randn(count, device=device))
    even = torch.rand(count, device=device)
    return torch.where(torch.rand(count, device=device) < uniform, even, shifted(t, shift))


class Dropout:
    """Leaves out captions: their tokens become those of the empty one."""

    def __init__(self, read: Callable[[str], tuple[list[int], ...]], share: float, device: torch.device) -> None:
        self.share, self.empty = share, tuple(torch.tensor(ids, device=device) for ids in read(""))

    def __call__(self, tokens: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Tokens of each encoder, shape = (batch, length); the same captions are left out for all."""
        gone = torch.rand(len(tokens[0]), 1, device=tokens[0].device) < self.share
        return tuple(torch.where(gone, empty, ids) for empty, ids in zip(self.empty, tokens, strict=True))


class Run:
    """The training loop and what it holds."""

    def __init__(self, settings: FlowTraining, net: FlowNet, average: Average, encoder: Encoder, leg: Leg) -> None:
        self.settings, self.net, self.average, self.leg = settings, net, average, leg
        self.clock, self.log, self.device = leg.clock, leg.log, leg.device
        self.random = random.Random(settings.seed)
        self.descent = Descent(average, leg, settings.peak, self._new_optimizers)
        self.descent.compiled = settings.compiled
        self.pictures, self.validated = 0, 0.0
        earlier = settings.resume or settings.start
        self.before = what_came_before(earlier) if earlier and (earlier / "training.json").is_file() else None
        reader = net.reader()
        self.dropout = Dropout(reader, settings.dropout, self.device)
        self.feed = Feed(
            Captioned(settings.source, reader), first_seed(settings.seed, settings.begin), settings.processes
        )
        sizes = {size for phase in settings.plan for size in phase.sizes}
        self.reservoir = Reservoir(encoder, self.feed, settings.reuse, settings.memory, len(sizes))
        pictures = settings.pictures or (64 if leg.on_gpu else 8)
        self.validation = Validation(settings.source, encoder, leg, pictures)
        if settings.compiled:
            for block in net.mmdit.joint_blocks:
                block.compile(dynamic=True)  # once for all sizes: a minute each would be more than it saves

    def _new_optimizers(self, peak: float) -> list[torch.optim.Optimizer]:
        return new_optimizers(self.net, self.settings.optimizer, peak, fused=self.leg.on_gpu)

    @property
    def phase(self) -> Phase:
        """That of the moment."""
        return phase_at(self.settings.plan, self.clock.fraction)

    def loop(self) -> dict[str, float]:
        """Steps until the clock ends; returns figures of the leg. An error late in a run does not lose the run."""
        try:
            with self.descent.guarded():
                self._loop()
        finally:
            self.feed.close()
        return self._figures(self.descent.last_loss)

    def _loop(self) -> None:
        losses: list[Tensor] = []
        since, seen = 0.0, 0
        first = len(set(self.phase.sizes)) + 2  # steps that compile
        while self.descent.steps == 0 or self.clock.left > 0:
            self.clock.tick()
            losses.append(self.step())
            if self.descent.steps == first:
                losses[-1].item()  # waits for the device
                self.log.say(f"first steps after {self.clock.elapsed:.0f} s")
                self.clock.run()
                since, seen = self.clock.now, self.pictures
            elif self.descent.steps > first and self.clock.now - since > 10:
                loss = torch.stack(losses).mean().item()
                per_s = (self.pictures - seen) / (self.clock.now - since)
                self.descent.report(loss, pictures=self.pictures, per_s=per_s)
                if self.clock.now - self.validated > 60:
                    self.save(self._figures(loss))
                self.clock.tick()
                since, seen, losses = self.clock.now, self.pictures, []

    def _figures(self, loss: float) -> dict[str, float]:
        return {"steps": self.descent.steps, "pictures": self.pictures, "loss": loss, **self.validate()}

    def validate(self) -> dict[str, float]:
        """Held-out losses of the averaged weights at the phase's first size, logged."""
        frame = self.phase.sizes[0].frame
        figures = self.validation.losses(self.net, self.average, frame)
        self.validated = self.clock.now
        named = {f"held_out_{frame.width}x{frame.height}_{name}": value for name, value in figures.items()}
        self.log.row(step=self.descent.steps, **named)
        return named

    def step(self) -> Tensor:
        """One optimizer step; returns the loss, still on the device."""
        s, fraction, sizes = self.settings, self.clock.fraction, self.phase.sizes
        first = list(dict.fromkeys(sizes))  # each once, so that what must be compiled is so before the clock counts
        step = self.descent.steps
        size = first[step] if step < len(first) else self.random.choice(sizes)
        latents, tokens = self.reservoir.take(size)
        noise, sigma = torch.randn_like(latents), sample_sigma(len(latents), size.shift, s.uniform, self.device)
        dropped = self.dropout(tokens)
        (loss,) = self.descent.gradients(size, self._loss, latents, noise, sigma, *dropped)
        self.descent.step(learning_rate(self.descent.peak, fraction, step, s.warmup // 4 if s.resume else s.warmup))
        self.pictures += len(latents) * team.size()
        return loss

    def _loss(self, latents: Tensor, noise: Tensor, sigma: Tensor, *tokens: Tensor) -> tuple[Tensor]:
        return (self.net(latents, noise, sigma, tokens),)

    def save(self, measures: dict[str, float]) -> None:
        """The weights, their average (what is used later) and the record."""
        if not team.leads():
            return
        s = self.settings
        save_shards(self.average.state(), s.out, "flow")
        save_shards(dict(zip(self.average.names, self.average.live, strict=True)), s.out, "live")
        own = saved_tokenizers(s.resume) is not None if s.resume else not (s.start or isinstance(s.source, Drawings))
        if own:
            save_tokenizers(self.net, s.out)
        start = read_record(s.resume).get("start") if s.resume else s.start
        write_record(
            s.out,
            {
                "what": "flow", "data_version": DATA_VERSION, "source": s.source.name,
                "start": str(start) if start else None, "config": asdict(self.net.mmdit.config),
                "t5_length": self.net.t5_length, "metrics": measures, "minutes": round(self.clock.elapsed / 60, 2),
                "seed": s.seed, "begin": s.begin, "end": s.end, "optimizer": s.optimizer, "peak": s.peak,
                "reuse": s.reuse, "plan": [asdict(phase) for phase in s.plan], "device": device_name(self.device),
                "gpus": team.size(),
                "resumed": str(s.resume) if s.resume else None, "before": self.before, "vae": str(s.vae),
                "log": self.log.rows[:: max(1, len(self.log.rows) // 60)],
            },
        )  # fmt: skip
