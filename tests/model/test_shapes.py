"""Configs of the published nets, told from nothing but the shapes of their tensors."""

from __future__ import annotations

import pytest
import torch

from model.config import VARIANTS, VAEConfig
from model.mmdit import MMDiT
from model.shapes import mmdit_config_of, vae_config_of
from model.vae import VAE
from tests.model.tiny import shapes_of


@pytest.mark.parametrize("variant", ["large", "medium"])
def test_config_of_a_published_mmdit_is_read_from_its_shapes(variant: str) -> None:
    config = VARIANTS[variant].mmdit
    with torch.device("meta"):
        assert mmdit_config_of(shapes_of(MMDiT(config))) == config


def test_config_of_the_published_vae_is_read_from_its_shapes() -> None:
    with torch.device("meta"):
        assert vae_config_of(shapes_of(VAE(VAEConfig()))) == VAEConfig()
