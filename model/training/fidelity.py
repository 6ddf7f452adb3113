"""How well an autoencoder keeps pictures, and how easy its latents are to model."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from model.training.scenes import sample_scene
from model.training.sheets import contact_sheet
from model.training.sources import HELD_OUT_SEEDS, Drawings, Frame, Source
from model.vae import VAE

NOISES = (0.2, 0.5)
"""Strengths of the noise that latents are measured with, as shares of their standard deviation."""


def decibels(squared_error: float) -> float:
    """PSNR of a mean squared error between pictures from -1 to 1."""
    return 10 * math.log10(4 / max(squared_error, 1e-12))


@torch.no_grad()
def measure(vae: VAE, source: Source, device: torch.device, pictures: int = 128, side: int = 256) -> dict[str, float]:
    """Figures on held-out pictures of `side` (and, of some, twice as many) pixels.

    psnr_* : dB, as 8-bit pictures would show it; of each style; with noise on the latents (20 and 50 % of their
        standard deviation); `eq`: of decoding the latents at half size against the picture at half size
    latent_* : mean and standard deviation; channel_* : their range over channels
    high_frequencies : share of the latents' power above half of the highest frequency
    """
    seeds = range(HELD_OUT_SEEDS, HELD_OUT_SEEDS + pictures)
    pixels = held_out(source, seeds, Frame(side, side), device)
    latents = torch.cat([vae.encode(part)[0].float() for part in pixels.split(16)])
    errors = _errors(vae, latents, pixels)
    few = pixels[: max(1, pictures // 2)]
    spread = latents.std() * torch.randn(latents[: len(few)].shape, generator=torch.Generator().manual_seed(0)).to(
        device
    )
    noisy = {share: _errors(vae, latents[: len(few)] + share * spread, few) for share in NOISES}
    halved = _errors(vae, F.avg_pool2d(latents[: len(few)], 2), F.avg_pool2d(few, 2))
    twice = held_out(source, seeds[: max(1, pictures // 8)], Frame(2 * side, 2 * side), device)
    large = torch.cat([vae.encode(part)[0].float() for part in twice.split(4)])
    channels = latents.transpose(0, 1).flatten(1)
    styles = _by_style(source, seeds, errors.tolist())
    return {
        f"psnr_{side}": decibels(errors.mean().item()),
        f"psnr_{2 * side}": decibels(_errors(vae, large, twice).mean().item()),
        **{f"psnr_{style}": decibels(error) for style, error in styles.items()},
        **{f"psnr_noise_{round(100 * share)}": decibels(error.mean().item()) for share, error in noisy.items()},
        "psnr_eq": decibels(halved.mean().item()), "high_frequencies": high_frequencies(large),
        "latent_mean": latents.mean().item(), "latent_std": latents.std().item(),
        "channel_std_min": channels.std(1).min().item(), "channel_std_max": channels.std(1).max().item(),
        "channel_mean_max": channels.mean(1).abs().max().item(),
    }  # fmt: skip


def held_out(source: Source, seeds: Sequence[int], frame: Frame, device: torch.device) -> Tensor:
    """Pictures of seeds, shape = (seeds, 3, height, width)."""
    rows, _ = source.read(seeds, frame)
    return source.pixels(torch.from_numpy(rows), frame, device)


def high_frequencies(latents: Tensor) -> float:
    """The share of the power, constant parts left out, at frequencies above half of the highest in either axis."""
    power = torch.fft.fft2(latents.float()).abs().square().mean((0, 1))
    power[0, 0] = 0
    high, wide = (torch.fft.fftfreq(side, device=latents.device).abs() for side in power.shape)
    above = torch.maximum(high[:, None], wide[None, :]) > 0.25
    return (power[above].sum() / power.sum().clamp(min=1e-12)).item()


def _errors(vae: VAE, latents: Tensor, pixels: Tensor) -> Tensor:
    """The mean squared error of each picture that raw latents give; shape = (batch,)."""
    parts = zip(latents.split(16), pixels.split(16), strict=True)
    return torch.cat([(vae.decode(z).float().clamp(-1, 1) - x).square().mean((1, 2, 3)) for z, x in parts])


def _by_style(source: Source, seeds: Sequence[int], errors: Sequence[float]) -> dict[str, float]:
    """The mean error of each style of our drawings."""
    if not isinstance(source, Drawings):
        return {}
    styles: dict[str, list[float]] = defaultdict(list)
    for seed, error in zip(seeds, errors, strict=True):
        styles[sample_scene(seed).style].append(error)
    return {style: sum(those) / len(those) for style, those in sorted(styles.items())}


@torch.no_grad()
def write_reconstructions(vae: VAE, source: Source, path: Path, count: int = 24, side: int = 256) -> None:
    """A sheet of held-out pictures, each row above its reconstructions."""
    device = next(vae.parameters()).device
    originals = held_out(source, range(HELD_OUT_SEEDS + 1000, HELD_OUT_SEEDS + 1000 + count), Frame(side, side), device)
    decoded = torch.cat([vae.decode(vae.encode(part)[0]).float() for part in originals.split(8)])
    rows = [row for pair in zip(originals.split(8), decoded.split(8), strict=True) for row in pair]
    contact_sheet(torch.cat(rows), [""] * (2 * count), columns=8).save(path, optimize=True)
