"""The key tables against diffusers' own modules, at full size on the meta device."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.loaders.single_file_utils import (
    convert_ldm_vae_checkpoint,
    convert_sd3_transformer_checkpoint_to_diffusers,
)

from model.config import VARIANTS, VAEConfig
from model.keys import Rule, Shape, mmdit_rules, vae_rules
from model.mmdit import MMDiT
from model.vae import VAE
from tests.model import tiny


def source_shapes(rules: tuple[Rule, ...], ours: dict[str, Shape]) -> dict[str, Shape]:
    return {source: rule.source_shape(ours[rule.name]) for rule in rules for source in rule.sources}


@pytest.mark.parametrize(
    ("variant", "parameters", "tensors", "their_tensors"),
    [("large", 8_056_627_520, 923, 1227), ("medium", 2_243_171_520, 665, 909)],
)
def test_full_size_mmdit_has_the_published_parameters_and_every_key_of_both_layouts(
    variant: str, parameters: int, tensors: int, their_tensors: int
) -> None:
    config = VARIANTS[variant].mmdit
    with torch.device("meta"):
        ours, theirs = MMDiT(config), tiny.transformer(config)
    assert isinstance(theirs, SD3Transformer2DModel)
    rules = mmdit_rules(config)
    assert sum(parameter.numel() for parameter in ours.parameters()) == parameters
    assert {rule.name for rule in rules} == set(ours.state_dict())
    assert len(rules) == tensors
    assert source_shapes(rules, tiny.shapes_of(ours)) == tiny.shapes_of(theirs)
    assert len(theirs.state_dict()) == their_tensors


def test_full_size_vae_has_the_published_parameters_and_every_key_of_both_layouts() -> None:
    config = VAEConfig()
    with torch.device("meta"):
        ours, theirs = VAE(config), tiny.autoencoder(config)
    assert isinstance(theirs, AutoencoderKL)
    rules = vae_rules(config)
    assert sum(parameter.numel() for parameter in ours.parameters()) == 83_819_683
    assert {rule.name for rule in rules} == set(ours.state_dict())
    assert source_shapes(rules, tiny.shapes_of(ours)) == tiny.shapes_of(theirs)


@pytest.mark.parametrize(
    ("rule", "shape"),
    [
        (Rule("a", ("b",)), (4, 3)),
        (Rule("a", ("q", "k", "v"), "stack"), (6, 2)),
        (Rule("a", ("b",), "swap"), (4, 3)),
        (Rule("a", ("b",), "squeeze"), (4, 3, 1, 1)),
    ],
)
def test_gather_undoes_scatter(rule: Rule, shape: Shape) -> None:
    tensor = torch.randn(shape)
    sources = rule.scatter(tensor)
    assert all(tuple(source.shape) == rule.source_shape(shape) for source in sources.values())
    assert torch.equal(rule.gather([sources[key] for key in rule.sources]), tensor)


def test_only_the_two_chunk_modulations_swap_their_halves() -> None:
    swapped = {rule.name for rule in mmdit_rules(VARIANTS["medium"].mmdit) if rule.op == "swap"}
    owners = ("final_layer", "joint_blocks.23.context_block")
    assert swapped == {f"{owner}.adaLN_modulation.1.{leaf}" for owner in owners for leaf in ("weight", "bias")}


def test_diffusers_own_converters_agree_with_the_tables(pipe: StableDiffusion3Pipeline) -> None:
    state = tiny.original_state(pipe)
    converted = convert_sd3_transformer_checkpoint_to_diffusers(state.copy())
    expected = pipe.transformer.state_dict()
    assert all(torch.equal(converted[key], tensor) for key, tensor in expected.items())
    converted = convert_ldm_vae_checkpoint(state.copy(), pipe.vae.config)
    expected = pipe.vae.state_dict()
    assert converted.keys() == expected.keys()
    assert all(torch.equal(converted[key], tensor) for key, tensor in expected.items())
