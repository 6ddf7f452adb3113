"""diffusers' nets with our tensors: shared, but for the swapped halves of the last modulations.

And but for weights of convolutions that our fast decoder keeps with the channels last, which would slow theirs down.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from torch import Tensor, nn

from model.keys import Rule, mmdit_rules, vae_rules
from model.mmdit import MMDiT
from model.vae import VAE
from tests.model import tiny


def transformer_of(net: MMDiT) -> SD3Transformer2DModel:
    """Their MMDiT."""
    with torch.device("meta"):
        theirs = tiny.transformer(net.config)
    theirs.load_state_dict(_scattered(net, mmdit_rules(net.config)), strict=True, assign=True)
    return theirs.requires_grad_(False)


def autoencoder_of(net: VAE) -> AutoencoderKL:
    """Their VAE."""
    with torch.device("meta"):
        theirs = tiny.autoencoder(net.config)
    theirs.load_state_dict(_scattered(net, vae_rules(net.config)), strict=True, assign=True)
    return theirs.requires_grad_(False)


def _scattered(net: nn.Module, rules: Sequence[Rule]) -> dict[str, Tensor]:
    state = net.state_dict()
    found: dict[str, Tensor] = {}
    for rule in rules:
        found |= {name: tensor.contiguous() for name, tensor in rule.scatter(state[rule.name]).items()}
    return found
