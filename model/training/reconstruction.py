"""Trains the autoencoder on drawings: fast pixel losses, then the mean and spread of its latents."""

from __future__ import annotations

import math
import random
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import VAEConfig
from model.training.demo import DEMO_VAE
from model.training.drawing import View, draw, pack
from model.training.feed import HELD_OUT_SEEDS, Feed, SceneStream
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
from model.training.scenes import DATA_VERSION, sample_scene
from model.training.sheets import contact_sheet
from model.vae import VAE

AHEAD = 8  # batches drawn at once: painting many pictures takes the CPU hardly longer than painting few


@dataclass(frozen=True, kw_only=True)
class VAETraining:
    """The settings of a run."""

    out: Path
    minutes: float
    config: VAEConfig = DEMO_VAE
    batch: int = 64
    size: int = 160  # side of the squares that are painted and learnt, pixels
    largest: int = 640  # side of the largest picture that they are windows of
    peak: float = 1.2e-3  # learning rate
    kl: float = 5e-5  # weight of the KL divergence, mean over latents
    average: float = 0.999
    seed: int = 1
    begin: float = 0.0
    end: float = 1.0
    resume: Path | None = None
    compiled: bool = True
    processes: int | None = None


def train_vae(settings: VAETraining, device: torch.device) -> dict[str, float]:
    """Trains, measures and writes weights, a sheet and training.json to `settings.out`; returns the measures."""
    leg = Leg.start(settings.minutes, 15, (settings.begin, settings.end), device)
    log = leg.log
    torch.manual_seed(settings.seed)
    vae = VAE(settings.config).to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    average = Average(vae, settings.average)
    if settings.resume:
        restore(vae, average, settings.resume)
    log.say(f"{sum(p.numel() for p in vae.parameters()):,} parameters on {device_name(device)}")
    steps = Run(settings, vae, average, leg).loop()
    average.swap()
    measures = {"steps": steps, **measure(vae, device, pictures=128 if device.type == "cuda" else 8)}
    log.row(**measures)
    finish(settings, vae, average, measures, log)
    return measures


def restore(vae: VAE, average: Average, folder: Path) -> None:
    """The weights and their average from an earlier run's folder."""
    vae.load_state_dict(load_shards(folder, "live"))
    average.load(load_shards(folder, "vae"))


def load_vae(folder: Path, device: torch.device) -> VAE:
    """The averaged VAE of a run, with its scale and shift."""
    config = read_record(folder)["config"]
    vae = VAE(VAEConfig(**{**config, "channels": tuple(config["channels"])}))
    vae.load_state_dict(load_shards(folder, "vae"))
    return vae.to(device).eval().requires_grad_(False)


def vae_loss(vae: VAE, pixels: Tensor, noise: Tensor, kl_weight: float, late: Tensor | float) -> tuple[Tensor, Tensor]:
    """The training loss, and the mean squared error. Pixels: shape = (batch, 3, h, w); noise: that of the latents.

    L1, and L1 of the differences between neighbours (sharp edges), the squared error growing with `late` (0 to 1).
    """
    mean, logvar = vae.encode(pixels)
    mean, logvar = mean.float(), logvar.float()
    decoded = vae.decode(mean + noise * torch.exp(0.5 * logvar)).float()
    error = decoded - pixels
    squared = error.square().mean()
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return error.abs().mean() + 0.5 * edges + 4 * late * squared + kl_weight * kl, squared.detach()


class Run:
    """The training loop and what it holds."""

    def __init__(self, settings: VAETraining, vae: VAE, average: Average, leg: Leg) -> None:
        self.settings, self.vae, self.average, self.leg = settings, vae, average, leg
        self.clock, self.log, self.device = leg.clock, leg.log, leg.device
        self.optimizer = torch.optim.AdamW(
            vae.parameters(), lr=settings.peak, betas=(0.9, 0.98), weight_decay=0.0, fused=leg.on_gpu
        )
        self.feed = Feed(SceneStream(settings.seed << 32), settings.processes)
        self.random = random.Random(settings.seed)
        self.loss = torch.compile(vae_loss, dynamic=False) if settings.compiled else vae_loss

    def loop(self) -> int:
        """Steps until the clock ends; returns their number."""
        step, seen, errors = 0, 0, []
        since = self.clock.elapsed
        while step == 0 or self.clock.left > 0:
            for pixels in self.pictures():
                errors.append(self.step(pixels, step))
                step += 1
                if step == 3:
                    errors[-1].item()  # waits for the device
                    self.log.say(f"first steps after {self.clock.elapsed:.0f} s")
                    self.clock.run()
                    since, seen = self.clock.elapsed, step
            if step >= 3 and self.clock.elapsed - since > 10:
                since, seen = self._report(errors, step, since, seen)
                errors = []
        return step

    def _report(self, errors: list[Tensor], step: int, since: float, seen: int) -> tuple[float, int]:
        mse = torch.stack(errors).mean().item()  # waits for the device
        if not finite([mse]):
            raise FloatingPointError(f"the loss is {mse} after {step} steps: lower the learning rate")
        now = self.clock.elapsed
        rate = (step - seen) / max(1e-9, now - since)
        self.log.row(step=step, steps_per_s=rate, psnr=decibels(mse), lr=self.optimizer.param_groups[0]["lr"])
        return now, step

    def step(self, pixels: Tensor, step: int) -> Tensor:
        """One optimizer step; returns the mean squared error, still on the device."""
        s, fraction = self.settings, self.clock.fraction
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(s.peak, fraction, step, 200)
        noise = torch.randn(len(pixels), s.config.latent_channels, s.size // 8, s.size // 8, device=self.device)
        late = torch.tensor(min(1.0, 2 * fraction)).to(self.device, non_blocking=True)
        with self.leg.autocast():
            error = self._gradients(pixels, noise, late)
        torch.nn.utils.clip_grad_norm_(self.vae.parameters(), 1.0, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.average.update()
        return error

    def _gradients(self, pixels: Tensor, noise: Tensor, late: Tensor) -> Tensor:
        try:
            loss, error = self.loss(self.vae, pixels, noise, self.settings.kl, late)
            loss.backward()
        except Exception as problem:  # a compiler's errors have no common type; without it the run is only slower
            if self.loss is vae_loss:
                raise
            self.log.say(f"going on without torch.compile: {type(problem).__name__}: {str(problem)[:300]}")
            self.loss = vae_loss
            self.optimizer.zero_grad(set_to_none=True)
            return self._gradients(pixels, noise, late)
        return error

    def pictures(self) -> list[Tensor]:
        """The next batches: windows of pictures of many sizes, painted together."""
        s = self.settings
        count = s.batch * (AHEAD if self.leg.on_gpu else 1)
        sides = [math.exp(self.random.uniform(math.log(s.size), math.log(s.largest))) for _ in range(count)]
        side = torch.tensor(sides).round()
        corner = torch.tensor([[self.random.random(), self.random.random()] for _ in range(count)])
        top, left = ((side - s.size)[:, None] * corner).round().unbind(1)
        pixels = draw(self.feed.take(count).scenes, s.size, s.size, self.device, View(side, side, top, left))
        return list(pixels.contiguous(memory_format=torch.channels_last).split(s.batch))


def decibels(squared_error: float) -> float:
    """PSNR of a mean squared error between pictures from -1 to 1."""
    return 10 * math.log10(4 / max(squared_error, 1e-12))


@torch.no_grad()
def measure(vae: VAE, device: torch.device, pictures: int = 128, size: int = 256) -> dict[str, float]:
    """PSNR on held-out drawings (of `size` and, in part, 512 pixels) and the latents' mean and standard deviation."""
    scenes = pack([sample_scene(HELD_OUT_SEEDS + n) for n in range(pictures)])
    small, latents = _reconstruct(vae, draw(scenes, size, size, device))
    large, _ = _reconstruct(vae, draw(scenes[: max(1, pictures // 8)], 2 * size, 2 * size, device))
    channels = latents.transpose(0, 1).flatten(1)
    return {
        f"psnr_{size}": decibels(small), f"psnr_{2 * size}": decibels(large),
        "latent_mean": latents.mean().item(), "latent_std": latents.std().item(),
        "channel_std_min": channels.std(1).min().item(), "channel_std_max": channels.std(1).max().item(),
        "channel_mean_max": channels.mean(1).abs().max().item(),
    }  # fmt: skip


def _reconstruct(vae: VAE, pixels: Tensor) -> tuple[float, Tensor]:
    """The mean over pictures of the squared error of what an 8-bit picture would show, and the mean latents."""
    errors, latents = [], []
    for part in pixels.split(16):
        mean, _ = vae.encode(part)
        errors.append(F.mse_loss(vae.decode(mean).clamp(-1, 1), part).double() * len(part))
        latents.append(mean)
    return (torch.stack(errors).sum() / len(pixels)).item(), torch.cat(latents)


def finish(settings: VAETraining, vae: VAE, average: Average, measures: dict[str, float], log: Log) -> None:
    """Writes what came out. `vae` holds the average, `average` the live weights."""
    out = settings.out
    save_shards(vae.state_dict(), out, "vae")
    save_shards({**vae.state_dict(), **average.state()}, out, "live")
    config = replace(settings.config, scale=1 / measures["latent_std"], shift=measures["latent_mean"])
    write_record(
        out,
        {
            "what": "vae", "data_version": DATA_VERSION, "config": asdict(config), "metrics": measures,
            "minutes": round(log.clock.elapsed / 60, 2), "seed": settings.seed, "batch": settings.batch,
            "size": settings.size, "resumed": str(settings.resume) if settings.resume else None, "log": log.rows,
        },
    )  # fmt: skip
    write_sheet(vae, out / "vae.png")


@torch.no_grad()
def write_sheet(vae: VAE, path: Path, count: int = 16, size: int = 256) -> None:
    """Drawings above their reconstructions."""
    device = next(vae.parameters()).device
    originals = draw(pack([sample_scene(HELD_OUT_SEEDS + 1000 + n) for n in range(count)]), size, size, device)
    decoded = torch.cat([vae.decode(vae.encode(part)[0]) for part in originals.split(8)])
    rows = [row for pair in zip(originals.split(8), decoded.split(8), strict=True) for row in pair]
    contact_sheet(torch.cat(rows), [""] * (2 * count), columns=8).save(path, optimize=True)
