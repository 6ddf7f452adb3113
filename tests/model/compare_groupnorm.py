"""The Triton kernels of model.kernels.groupnorm against their twins: python -m tests.model.compare_groupnorm

Without a GPU they run in Triton's interpreter (TRITON_INTERPRET=1), which cuts bf16 where GPUs round, so in fp32 and
fp16 only.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from model.kernels import groupnorm

SHAPES = [(2, 13, 10, 128, 32), (1, 9, 8, 96, 32), (2, 7, 5, 64, 32), (1, 3, 11, 512, 32)]
"""Batch, height, width, channels and groups: less than a tile and more, powers of two and not."""

EPS = 1e-6

# Of values of about 1: what fp32 rounds differently in another order; one unit in the last place of the others.
TOLERANCES = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def joined(parts: Tensor) -> Tensor:
    """Count, mean and variance of each channel, from the statistics of any parts; in fp64."""
    count, mean, squares = parts.double().unbind(2)
    total = count.sum(1)
    whole = (count * mean).sum(1) / total
    variance = (squares + count * (mean - whole[:, None]).square()).sum(1) / total
    return torch.stack([total, whole, variance])


def differences(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, float]]:
    """A name and the largest difference for each operation and shape, relative to values of 1 or more."""
    from model.kernels import triton_groupnorm as kernels

    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    def twin(name: str, *arguments: Any) -> Any:
        with mock.patch.object(groupnorm, "fused", return_value=False):
            return getattr(groupnorm, name)(*arguments)

    for batch, height, width, channels, groups in SHAPES:
        x = random(batch, height, width, channels) + 3 * random(channels)
        h, weight, shift = random(batch, height, width, channels), random(channels), random(channels)
        for bias in (None, random(channels), random(channels, dtype=torch.float32)):
            where = f"{dtype} {channels} channels, {'no bias' if bias is None else bias.dtype}"
            parts = twin("statistics", x)
            yield f"statistics {where}", off(joined(kernels.statistics(x)), joined(parts))
            expected = twin("affine", parts, bias, weight, shift, groups, EPS)
            found = kernels.affine(kernels.statistics(x), bias, weight, shift, groups, EPS)
            yield f"affine {where}", off(found, expected)
            for silu in (True, False):
                found = kernels.apply(x, expected, silu, None)
                yield f"apply {where}", off(found, twin("apply", x, expected, silu))
            inside = x.clone()
            kernels.apply(inside, expected, True, inside)
            yield f"apply in place {where}", off(inside, twin("apply", x, expected, True))
            (found, parts), (expected, expected_parts) = kernels.add(x, h, bias, None), twin("add", x, h, bias)
            yield f"add {where}", off(found, expected)
            yield f"statistics of a sum {where}", off(joined(parts), joined(expected_parts))
            for other in (h, None):
                found, expected = kernels.add_upsampled(x, other, bias), twin("add_upsampled", x, other, bias)
                yield f"add_upsampled {where}", off(found, expected)
        corners = random(batch, height, width, 4 * channels)
        (found, parts), (expected, expected_parts) = kernels.woven(corners), twin("woven", corners)
        yield f"woven {dtype} {channels} channels", off(found, expected)
        yield f"statistics of woven {dtype} {channels} channels", off(joined(parts), joined(expected_parts))
    picture, bias = random(2, 17, 9, 8), random(8, dtype=torch.float32)
    apart = (kernels.rgb(picture, bias).int() - twin("rgb", picture, bias).int()).abs()
    yield f"rgb {dtype}", float(apart.float().mean()) + float(apart.max() > 1)
    for number in (77, 5000):
        scores = 20 * random(2, 3, number, dtype=torch.float32)
        yield f"softmax {dtype}", off(kernels.softmax(scores, 0.5, dtype), twin("softmax", scores, 0.5, dtype))


def off(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative where values are large."""
    assert found.shape == expected.shape, (found.shape, expected.shape)
    assert found.dtype == expected.dtype, (found.dtype, expected.dtype)
    return float(((found.double() - expected.double()).abs() / expected.double().abs().clamp(min=1)).max())


def wrong(device: torch.device, dtypes: list[torch.dtype], say: Callable[[str], object]) -> list[str]:
    """Those that are off by more than rounding."""
    found = []
    for dtype in dtypes:
        for name, difference in differences(device, dtype):
            line = f"{name}: {difference:.2g}"
            say(line)
            if not difference <= TOLERANCES[dtype]:
                found.append(line)
    return found


if __name__ == "__main__":
    if torch.cuda.is_available():
        bad = wrong(torch.device("cuda"), list(TOLERANCES), print)
    else:
        os.environ["TRITON_INTERPRET"] = "1"
        from model.kernels import triton_groupnorm

        triton_groupnorm.MAX_PARTS = 3  # several tiles a part, as in large pictures
        triton_groupnorm.STATISTICS_TILE = 512
        bad = wrong(torch.device("cpu"), [torch.float32, torch.float16], print)
    sys.exit("\n".join(bad) or None)
