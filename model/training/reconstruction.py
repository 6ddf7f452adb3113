"""Trains the autoencoder: sharp pictures from latents that are easy to model."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from model.card import variant_at
from model.checkpoint import load_components
from model.config import VAEConfig
from model.training import team
from model.training.compiling import load_compiled, save_compiled
from model.training.demo import DEMO_VAE
from model.training.descent import Descent
from model.training.feed import Captioned, Feed, first_seed
from model.training.fidelity import decibels, measure, write_reconstructions
from model.training.loop import (
    Average,
    Leg,
    Log,
    adamw,
    device_name,
    learning_rate,
    load_shards,
    read_record,
    save_shards,
    write_record,
)
from model.training.scenes import DATA_VERSION
from model.training.sources import Drawings, Frame, Source
from model.vae import VAE

AHEAD = 8  # batches drawn at once: painting many pictures takes the CPU hardly longer than painting few


@dataclass(frozen=True)
class Weights:
    """What the autoencoder's loss weighs, besides the pixels."""

    noise: float = 0.2  # standard deviation of the noise on the latents, as a share of theirs
    equivariance: float = 0.5  # of the loss of decoding latents at half size
    kl: float = 5e-5  # of the means' part of the KL divergence, which keeps their scale
    tie: float = 1e-3  # of the squared distance of the log variances to that of the noise


@dataclass(frozen=True, kw_only=True)
class VAETraining:
    """The settings of a run."""

    out: Path
    minutes: float
    config: VAEConfig = DEMO_VAE
    source: Source = field(default_factory=Drawings)
    weights: Weights = field(default_factory=Weights)
    batch: int = 64
    size: int = 160  # side of the squares that are painted and learnt, pixels
    largest: int = 640  # side of the largest picture that they are windows of
    peak: float = 1.2e-3  # learning rate
    average: float = 0.999
    seed: int = 1
    begin: float = 0.0
    end: float = 1.0
    resume: Path | None = None
    cache: Path | None = None  # folder of what was compiled
    compiled: bool = True
    processes: int | None = None
    pictures: int | None = None  # that it is measured on; None for as many as the device measures soon

    def __post_init__(self) -> None:
        if self.size % 16:
            raise ValueError(f"size is {self.size}, expected a multiple of 16")


def train_vae(settings: VAETraining, device: torch.device) -> dict[str, float]:
    """Trains, measures and writes weights, a sheet and training.json to `settings.out`; returns the measures."""
    leg = Leg.start(settings.minutes, 20, (settings.begin, settings.end), device)
    log = leg.log
    torch.manual_seed(settings.seed)
    vae = VAE(settings.config).to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    average = Average(vae, settings.average)
    if settings.resume:
        restore(vae, average, settings.resume)
    load_compiled(settings.cache, log)
    log.say(f"{sum(p.numel() for p in vae.parameters()):,} parameters on {device_name(device)}")
    torch.manual_seed(settings.seed + team.rank())  # the first weights are alike, noise is not
    steps = Run(settings, vae, average, leg).loop()
    if not team.leads():
        return {}
    average.swap()
    pictures = settings.pictures or (256 if leg.on_gpu else 8)
    measures = {"steps": steps, **measure(vae, settings.source, device, pictures)}
    log.row(**measures)
    finish(settings, vae, average, measures, log)
    save_compiled(settings.cache, log)
    return measures


def restore(vae: VAE, average: Average, folder: Path) -> None:
    """The weights and their average from an earlier run's folder."""
    vae.load_state_dict(load_shards(folder, "live"))
    average.load(load_shards(folder, "vae"))


def load_vae(folder: Path, device: torch.device) -> VAE:
    """The averaged VAE of a run with its scale and shift, or that of a bundle or of a variant of one."""
    if (folder / "model_index.json").is_file() or variant_at(folder):
        return load_components(folder, device, torch.float32).vae
    config = read_record(folder)["config"]
    vae = VAE(VAEConfig(**{**config, "channels": tuple(config["channels"])}))
    vae.load_state_dict(load_shards(folder, "vae"))
    return vae.to(device).eval().requires_grad_(False)


def vae_loss(vae: VAE, pixels: Tensor, noise: Tensor, weights: Weights, late: Tensor | float) -> tuple[Tensor, Tensor]:
    """The training loss, and the mean squared error. Pixels: shape = (batch, 3, h, w); noise: that of the latents.

    Noise of a fixed share of the latents' spread makes them smooth: what lies near decodes alike, and a flow's small
    errors do not show. Latents at half size must give the picture at half size (EQ-VAE, Kouzelis et al. 2025,
    arXiv:2502.09509): that rids them of fine patterns that no picture has (Skorokhodov et al. 2025, arXiv:2502.14831).
    """
    mean, logvar = (moment.float() for moment in vae.encode(pixels))
    spread = (weights.noise * mean.detach().std()).clamp(min=1e-4)
    loss, squared = pixel_loss(vae.decode(mean + spread * noise).float(), pixels, late)
    if weights.equivariance:
        half = F.avg_pool2d(mean, 2) + spread * noise[..., ::2, ::2]
        halved, _ = pixel_loss(vae.decode(half).float(), F.avg_pool2d(pixels, 2), late)
        loss = loss + weights.equivariance * halved
    tie = (logvar - 2 * spread.log()).square().mean()
    return loss + weights.kl * 0.5 * mean.square().mean() + weights.tie * tie, squared.detach()


def pixel_loss(decoded: Tensor, pixels: Tensor, late: Tensor | float) -> tuple[Tensor, Tensor]:
    """L1, and L1 of the differences between neighbours (sharp edges), the squared error growing with `late` (0 to 1).

    Returns the loss and the mean squared error.
    """
    error = decoded - pixels
    squared = error.square().mean()
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + 0.5 * edges + 4 * late * squared, squared


class Run:
    """The training loop and what it holds."""

    def __init__(self, settings: VAETraining, vae: VAE, average: Average, leg: Leg) -> None:
        self.settings, self.vae, self.average, self.leg = settings, vae, average, leg
        self.clock, self.log, self.device = leg.clock, leg.log, leg.device
        self.descent = Descent(average, leg, settings.peak, partial(adamw, average, leg))
        self.descent.compiled = settings.compiled
        first = first_seed(settings.seed, settings.begin)
        self.feed = Feed(Captioned(settings.source), first, settings.processes)
        self.loss = torch.compile(vae_loss, dynamic=False) if settings.compiled else vae_loss

    def loop(self) -> int:
        """Steps until the clock ends; returns their number. An error late in a run does not lose the run."""
        try:
            with self.descent.guarded():
                self._loop()
        finally:
            self.feed.close()
        return self.descent.steps

    def _loop(self) -> None:
        seen, since, errors = 0, 0.0, []
        while self.descent.steps == 0 or self.clock.left > 0:
            self.clock.tick()
            for pixels in self.pictures():
                errors.append(self.step(pixels))
                if self.descent.steps == 3:
                    errors[-1].item()  # waits for the device
                    self.log.say(f"first steps after {self.clock.elapsed:.0f} s")
                    self.clock.run()
                    seen, since = self.descent.steps, self.clock.now
            if self.descent.steps >= 3 and self.clock.now - since > 10:
                error = torch.stack(errors).mean().item()  # waits for the device
                rate = (self.descent.steps - seen) / (self.clock.now - since)
                self.descent.report(error, steps_per_s=rate, psnr=decibels(error))
                seen, since, errors = self.descent.steps, self.clock.now, []

    def step(self, pixels: Tensor) -> Tensor:
        """One optimizer step; returns the mean squared error, still on the device."""
        s, fraction = self.settings, self.clock.fraction
        noise = torch.randn(len(pixels), s.config.latent_channels, s.size // 8, s.size // 8, device=self.device)
        late = torch.tensor(min(1.0, 2 * fraction)).to(self.device, non_blocking=True)
        error = self.descent.attempt(lambda: self._backward(pixels, noise, late))
        self.descent.step(learning_rate(self.descent.peak, fraction, self.descent.steps, 50 if s.resume else 200))
        return error

    def _backward(self, pixels: Tensor, noise: Tensor, late: Tensor) -> Tensor:
        self.descent.forget_gradients()
        with self.leg.autocast():
            loss, error = self.loss(self.vae, pixels, noise, self.settings.weights, late)
        loss.backward()
        return error

    def pictures(self) -> list[Tensor]:
        """The next batches: windows of pictures of many sizes, painted together."""
        s = self.settings
        frame = Frame(s.size, s.size, s.largest)
        rows = self.feed.take(s.batch * (AHEAD if self.leg.on_gpu else 1), frame).rows
        pixels = s.source.pixels(rows, frame, self.device)
        return list(pixels.contiguous(memory_format=torch.channels_last).split(s.batch))


def finish(settings: VAETraining, vae: VAE, average: Average, measures: dict[str, float], log: Log) -> None:
    """Writes what came out. `vae` holds the average, `average` the live weights."""
    out = settings.out
    save_shards(vae.state_dict(), out, "vae")
    save_shards({**vae.state_dict(), **average.state()}, out, "live")
    config = replace(settings.config, scale=1 / measures["latent_std"], shift=measures["latent_mean"])
    write_record(
        out,
        {
            "what": "vae", "data_version": DATA_VERSION, "source": settings.source.name, "config": asdict(config),
            "metrics": measures, "minutes": round(log.clock.elapsed / 60, 2), "seed": settings.seed,
            "begin": settings.begin, "end": settings.end, "gpus": team.size(),
            "batch": settings.batch, "size": settings.size,
            "weights": asdict(settings.weights), "resumed": str(settings.resume) if settings.resume else None,
            "device": device_name(next(vae.parameters()).device),
            "log": log.rows[:: max(1, len(log.rows) // 40)],
        },
    )  # fmt: skip
    write_reconstructions(vae, settings.source, out / "vae.png", count=min(24, settings.pictures or 24))
