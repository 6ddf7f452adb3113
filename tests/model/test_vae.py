"""Our VAE against diffusers' AutoencoderKL, random weights, fp32 on the CPU."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL

from model.keys import vae_rules
from model.vae import VAE
from tests.model import tiny

# Outputs are about 1 and the operations the same, but for the attention's linears, which are convolutions here.
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def pair() -> tuple[VAE, AutoencoderKL]:
    theirs = tiny.autoencoder()
    tiny.randomize(theirs, seed=3)
    state = theirs.state_dict()
    ours = VAE(tiny.TINY_VAE).eval()
    rules = vae_rules(tiny.TINY_VAE)
    ours.load_state_dict({rule.name: rule.gather([state[s] for s in rule.sources]) for rule in rules})
    return ours, theirs


@torch.inference_mode()
def test_moments_equal_diffusers(pair: tuple[VAE, AutoencoderKL]) -> None:
    ours, theirs = pair
    pixels = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
    expected = theirs.encode(pixels).latent_dist
    mean, logvar = ours.encode(pixels)
    assert mean.shape == (2, 16, 8, 12)
    assert expected.mean.std() > 0.1
    torch.testing.assert_close(mean, expected.mean, atol=TOLERANCE, rtol=TOLERANCE)
    torch.testing.assert_close(logvar, expected.logvar, atol=TOLERANCE, rtol=TOLERANCE)


@torch.inference_mode()
def test_pixels_equal_diffusers(pair: tuple[VAE, AutoencoderKL]) -> None:
    ours, theirs = pair
    z = torch.randn(2, 16, 12, 8, generator=torch.Generator().manual_seed(0))
    expected = theirs.decode(z).sample
    assert expected.std() > 0.1
    torch.testing.assert_close(ours.decode(z), expected, atol=TOLERANCE, rtol=TOLERANCE)


def test_latents_are_scaled_and_shifted_as_published(pair: tuple[VAE, AutoencoderKL]) -> None:
    ours, _ = pair
    z = torch.tensor([0.0609, 1.0609])
    torch.testing.assert_close(ours.to_model(z), torch.tensor([0.0, 1.5305]))
    torch.testing.assert_close(ours.from_model(ours.to_model(z)), z)


@torch.inference_mode()
def test_pictures_are_8_bit_and_rounded(pair: tuple[VAE, AutoencoderKL]) -> None:
    ours, theirs = pair
    latents = torch.randn(1, 16, 4, 6, generator=torch.Generator().manual_seed(0))
    expected = (theirs.decode(latents / 1.5305 + 0.0609).sample / 2 + 0.5).clamp(0, 1) * 255
    pixels = ours.to_pixels(latents)
    assert pixels.shape == (1, 32, 48, 3)
    assert pixels.dtype == torch.uint8
    # Half a step of rounding, and fp32's last bits.
    assert (pixels.permute(0, 3, 1, 2).float() - expected).abs().max() < 0.501
