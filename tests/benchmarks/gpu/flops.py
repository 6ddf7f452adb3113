"""What a picture costs in floating point operations, from the configurations; a multiply and add are two."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from model.config import MMDiTConfig, VAEConfig
from model.text import CLIP_LENGTH, TextEncoders
from model.vae import VAE


def linear(config: MMDiTConfig, image: int, text: int) -> float:
    """Of the matrix products of one row of one forward, with so many image and text tokens."""
    h, depth, duals = config.hidden, config.depth, len(config.dual_blocks)
    a_token = 2 * (4 + 2 * config.mlp_ratio) * h * h  # of qkv, projection and MLP
    blocks = depth * a_token * image + (depth - 1) * a_token * text
    blocks += duals * 2 * 4 * h * h * image + 2 * 3 * h * h * text  # second attentions; the last block's text
    patches = 2 * 2 * config.patch**2 * config.in_channels * h * image  # in and out
    modulations = 2 * h * h * (12 * (depth - 1) + 8 + 3 * duals + 2)
    return blocks + patches + modulations + 2 * config.context_dim * h * text


def attention(config: MMDiTConfig, image: int, text: int) -> float:
    """Of the attentions of one row of one forward."""
    joint = config.depth * (image + text) ** 2
    return 4 * config.hidden * (joint + len(config.dual_blocks) * image**2)


def decode(config: VAEConfig, side: int) -> float:
    """Of decoding one square picture, counted on a decoder without memory."""
    latent = side // 2 ** (len(config.channels) - 1)
    with torch.device("meta"):
        vae = VAE(config).requires_grad_(False)
        z = torch.empty(1, config.latent_channels, latent, latent)
    with FlopCounterMode(display=False) as counter:
        vae.decode(z)
    return float(counter.get_total_flops())


def encode(text: TextEncoders, t5_length: int) -> float:
    """Of the linear layers for one prompt: the rest is a hundredth."""
    towers = ((text.clip_l, CLIP_LENGTH), (text.clip_g, CLIP_LENGTH), (text.t5, t5_length))
    return sum(2.0 * tokens * _weights(tower) for tower, tokens in towers if tower is not None)


def _weights(net: nn.Module) -> int:
    return sum(module.weight.numel() for module in net.modules() if isinstance(module, nn.Linear))
