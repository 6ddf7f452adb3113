"""The passes between the decoder's convolutions: the plain ones against torch's, the Triton kernels against those."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.kernels import groupnorm

EPS = 1e-6
GROUPS = 8

# fp32 against fp64, of values that the norm makes about 1; the offset takes some bits.
TOLERANCE = 2e-5


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def torchs(x: Tensor, weight: Tensor, shift: Tensor) -> Tensor:
    """torch's GroupNorm and SiLU, channels last, in fp64."""
    normed = F.group_norm(x.double().permute(0, 3, 1, 2), GROUPS, weight.double(), shift.double(), EPS)
    return F.silu(normed).permute(0, 2, 3, 1).float()


@pytest.mark.parametrize("offset", [0.0, 100.0], ids=["centred", "far off"])
@pytest.mark.parametrize("biased", [False, True])
def test_norm_and_silu_equal_torchs(offset: float, biased: bool) -> None:
    x, weight, shift = random(2, 9, 7, 24) + offset, random(24, seed=1), random(24, seed=2)
    bias = random(24, seed=3) if biased else None
    affine = groupnorm.affine(groupnorm.statistics(x), bias, weight, shift, GROUPS, EPS)
    expected = torchs(x if bias is None else x + bias, weight, shift)
    tolerance = TOLERANCE * max(1.0, offset / 2)
    torch.testing.assert_close(groupnorm.apply(x, affine), expected, atol=tolerance, rtol=tolerance)
    inside = x.clone()
    assert groupnorm.apply(inside, affine, out=inside) is inside
    torch.testing.assert_close(inside, expected, atol=tolerance, rtol=tolerance)


def test_statistics_of_parts_are_those_of_the_whole() -> None:
    x, weight, shift = random(1, 12, 7, 24) + random(1, 12, 1, 1, seed=4), random(24, seed=1), random(24, seed=2)
    parts = torch.cat([groupnorm.statistics(x[:, lines]) for lines in (slice(0, 5), slice(5, 11), slice(11, 12))], 1)
    found = groupnorm.affine(parts, None, weight, shift, GROUPS, EPS)
    expected = groupnorm.affine(groupnorm.statistics(x), None, weight, shift, GROUPS, EPS)
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=TOLERANCE)


def test_sum_has_its_statistics() -> None:
    x, h, bias = random(2, 9, 7, 24), random(2, 9, 7, 24, seed=1), random(24, seed=2)
    y, parts = groupnorm.add(x, h, bias)
    torch.testing.assert_close(y, x + h + bias)
    assert torch.equal(parts, groupnorm.statistics(y))


def test_upsampled_sum_is_torchs() -> None:
    x, h, bias = random(2, 4, 3, 24), random(2, 4, 3, 24, seed=1), random(24, seed=2)
    for other in (h, None):
        small = (x + bias if other is None else x + other + bias).permute(0, 3, 1, 2)
        expected = F.interpolate(small, scale_factor=2.0, mode="nearest").permute(0, 2, 3, 1)
        torch.testing.assert_close(groupnorm.add_upsampled(x, other, bias), expected)


def test_pictures_are_rounded_and_cut() -> None:
    levels = torch.tensor([-300.0, 0.4, 0.6, 127.5, 128.5, 254.6, 1000.0, 12.0])
    x = (levels / 127.5 - 1).view(1, 2, 4, 1).expand(-1, -1, -1, 8).contiguous()
    found = groupnorm.rgb(x, torch.zeros(8))
    assert found.dtype == torch.uint8
    assert found.shape == (1, 2, 4, 3)
    assert found[..., 1].flatten().tolist() == [0, 0, 1, 128, 128, 255, 255, 12]


@pytest.mark.slow
def test_triton_kernels_equal_the_plain_ones() -> None:
    if find_spec("triton") is None:
        pytest.skip("no triton: pip install triton")
    ran = subprocess.run(
        [sys.executable, "-m", "tests.model.compare_groupnorm"],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert ran.returncode == 0, ran.stderr
    assert "softmax torch.float16" in ran.stdout
