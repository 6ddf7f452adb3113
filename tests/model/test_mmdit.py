"""Our MMDiT against diffusers' SD3Transformer2DModel, random weights, fp32 on the CPU."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor

from model.config import MMDiTConfig
from model.keys import mmdit_rules
from model.layers import position_table
from model.mmdit import MMDiT
from tests.model import tiny

PLAIN = replace(tiny.MMDIT_X, dual_blocks=())
WITHOUT_NORM = replace(PLAIN, qk_norm=False)

# Outputs are about 1, and both sides are within 3e-6 of fp64: the rounding of fp32 sums. A wrong chunk, swap or
# position is off by 0.1 or more.
TOLERANCE = 2e-5


@cache
def pair(config: MMDiTConfig) -> tuple[MMDiT, SD3Transformer2DModel]:
    theirs = tiny.transformer(config)
    tiny.randomize(theirs, seed=1)
    state = theirs.state_dict()
    ours = MMDiT(config).eval()
    ours.load_state_dict({rule.name: rule.gather([state[s] for s in rule.sources]) for rule in mmdit_rules(config)})
    return ours, theirs


def inputs(config: MMDiTConfig, height: int, width: int, batch: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {
        "x": torch.randn(batch, 16, height, width, generator=generator),
        "timestep": torch.tensor([857.69234, 8.92857, 602.15054, 1000.0])[:batch],
        "context": torch.randn(batch, 21, config.context_dim, generator=generator),
        "pooled": torch.randn(batch, config.pooled_dim, generator=generator),
    }


def their_output(net: SD3Transformer2DModel, given: dict[str, Tensor]) -> Tensor:
    return net(
        hidden_states=given["x"],
        timestep=given["timestep"],
        encoder_hidden_states=given["context"],
        pooled_projections=given["pooled"],
        return_dict=False,
    )[0]


@pytest.mark.parametrize("config", [PLAIN, tiny.MMDIT_X, WITHOUT_NORM], ids=["plain", "dual", "without_qk_norm"])
@pytest.mark.parametrize(("height", "width"), [(16, 16), (12, 20), (22, 14)])
@torch.inference_mode()
def test_velocity_equals_diffusers(config: MMDiTConfig, height: int, width: int) -> None:
    ours, theirs = pair(config)
    given = inputs(config, height, width)
    expected = their_output(theirs, given)
    assert 0.3 < expected.std() < 3
    torch.testing.assert_close(ours(**given), expected, atol=TOLERANCE, rtol=TOLERANCE)


@torch.inference_mode()
def test_rows_of_mixed_sigmas_equal_the_same_rows_alone() -> None:
    ours, _ = pair(tiny.MMDIT_X)
    given = inputs(tiny.MMDIT_X, 12, 20, batch=4)
    alone = [ours(**{name: tensor[i : i + 1] for name, tensor in given.items()}) for i in range(4)]
    torch.testing.assert_close(ours(**given), torch.cat(alone), atol=TOLERANCE, rtol=TOLERANCE)


def test_picture_larger_than_the_position_table_is_refused() -> None:
    with pytest.raises(ValueError, match="25 x 8 patches do not fit"), torch.inference_mode():
        MMDiT(PLAIN)(**inputs(PLAIN, 50, 16))


def test_position_table_spans_the_published_coordinates() -> None:
    hidden, grid = 8, 192
    table = position_table(hidden, grid).view(grid, grid, hidden)
    row, column = 64 + 6, 64 + 20  # coordinates 1.5 and 5, in the central 64 x 64 patches that span 0 to 15.75
    omega = torch.tensor([1.0, 0.01], dtype=torch.float64)
    halves = [torch.cat([(at * omega).sin(), (at * omega).cos()]) for at in (5.0, 1.5)]
    torch.testing.assert_close(table[row, column], torch.cat(halves).float())
