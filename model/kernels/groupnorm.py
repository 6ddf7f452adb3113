"""What the VAE's decoder does between its convolutions, on tensors with the channels last, in few passes over memory.

A convolution's bias is left out of the convolution, where it would be a pass of its own, and folded into what reads the
result: "x + bias" below is never written. Statistics are of fp32 sums in an order that shapes alone decide.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from model.kernels import fused


def statistics(x: Tensor) -> Tensor:
    """Means of parts of a tensor and sums of squares of what is off them, each channel alone.

    x : shape = (batch, h, w, channels), contiguous
    returns : shape = (batch, parts, 3, channels), fp32: count, mean, squares; several of one picture may be
        concatenated along `parts`
    """
    if fused(x):
        from model.kernels import triton_groupnorm

        return triton_groupnorm.statistics(x)
    flat = x.flatten(1, 2).float()
    mean = flat.mean(1)
    squares = (flat - mean[:, None]).square().sum(1)
    return torch.stack([torch.full_like(mean, flat.shape[1]), mean, squares], dim=1)[:, None]


def affine(parts: Tensor, bias: Tensor | None, weight: Tensor, shift: Tensor, groups: int, eps: float) -> Tensor:
    """GroupNorm of x + bias as one factor and one term for each channel of x.

    parts : what `statistics` says of x, shape = (batch, parts, 3, channels)
    bias : shape = (channels,) or None
    weight, shift : the norm's own, shape = (channels,)
    returns : shape = (batch, 2, channels), fp32: factor, term
    """
    if fused(parts):
        from model.kernels import triton_groupnorm

        return triton_groupnorm.affine(parts, bias, weight, shift, groups, eps)
    added = torch.zeros_like(weight, dtype=torch.float32) if bias is None else bias.float()
    counts, means, squares = (part.unflatten(-1, (groups, -1)) for part in parts.unbind(2))
    means = means + added.view(groups, -1)
    total = counts.sum((1, 3), keepdim=True)
    mean = (counts * means).sum((1, 3), keepdim=True) / total
    variance = (squares + counts * (means - mean).square()).sum((1, 3), keepdim=True) / total
    factor = (variance + eps).rsqrt()[:, 0] * weight.float().view(groups, -1)
    term = shift.float().view(groups, -1) + (added.view(groups, -1) - mean[:, 0]) * factor
    return torch.stack([factor.flatten(1), term.flatten(1)], dim=1)


def apply(x: Tensor, factor_term: Tensor, silu: bool = True, out: Tensor | None = None) -> Tensor:
    """SiLU (or not) of x times a factor plus a term for each channel.

    x : shape = (batch, h, w, channels), contiguous
    factor_term : shape = (batch, 2, channels), fp32
    out : where it goes, contiguous; absent: to a tensor of its own
    """
    if fused(x):
        from model.kernels import triton_groupnorm

        return triton_groupnorm.apply(x, factor_term, silu, out)
    factor, term = (part[:, None, None] for part in factor_term.unbind(1))
    y = x.float() * factor + term
    y = (F.silu(y) if silu else y).to(x.dtype)
    return y if out is None else out.copy_(y)


def add(x: Tensor, h: Tensor, bias: Tensor | None, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x + h + bias, and its `statistics`.

    x, h : shape = (batch, h, w, channels), contiguous
    bias : shape = (channels,), the sum of all that were left out
    out : where it goes, which may be x or h; absent: to a tensor of its own
    """
    if fused(x):
        from model.kernels import triton_groupnorm

        return triton_groupnorm.add(x, h, bias, out)
    y = _sum(x, h, bias)
    y = y if out is None else out.copy_(y)
    return y, statistics(y)


def add_upsampled(x: Tensor, h: Tensor | None, bias: Tensor | None) -> Tensor:
    """x, + h, + bias, with both sides doubled, nearest neighbour: shape = (batch, 2h, 2w, channels)."""
    if fused(x):
        from model.kernels import triton_groupnorm

        return triton_groupnorm.add_upsampled(x, h, bias)
    return _sum(x, h, bias).repeat_interleave(2, 1).repeat_interleave(2, 2)


def woven(x: Tensor) -> tuple[Tensor, Tensor]:
    """Pixels from what a convolution says of the corners between them, each of its four neighbours; and `statistics`.

    x : shape = (batch, h + 1, w + 1, 4 * channels), contiguous: for the pixels below and right of a corner, below and
        left, above and right, above and left, where the pixels are those of a picture with sides 2h and 2w, and
        corners are where four blocks of four pixels meet
    returns : shape = (batch, 2h, 2w, channels)
    """
    if fused(x):
        from model.kernels import triton_groupnorm

        return triton_groupnorm.woven(x)
    batch, height, width, channels = len(x), x.shape[1] - 1, x.shape[2] - 1, x.shape[3] // 4
    y = x.new_empty((batch, height, 2, width, 2, channels))
    for row in range(2):
        for column in range(2):
            first = (2 * row + column) * channels
            y[:, :, row, :, column] = x[:, row : row + height, column : column + width, first : first + channels]
    y = y.flatten(3, 4).flatten(1, 2)
    return y, statistics(y)


def rgb(x: Tensor, bias: Tensor) -> Tensor:
    """8-bit pictures of x + bias, in about [-1, 1]: (x + 1) * 127.5, rounded and cut to [0, 255].

    x : shape = (batch, h, w, 3 or more channels), contiguous; those after the third are ignored
    bias : shape = (3 or more,)
    returns : shape = (batch, h, w, 3), uint8
    """
    if fused(x):
        from model.kernels import triton_groupnorm

        return triton_groupnorm.rgb(x, bias)
    y = x[..., :3].float() + bias[:3].float()
    return y.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)


def softmax(scores: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """Softmax of scores * scale over the last axis; scores are contiguous, the result is in `dtype`."""
    if fused(scores):
        from model.kernels import triton_groupnorm

        return triton_groupnorm.softmax(scores, scale, dtype)
    return (scores.float() * scale).softmax(-1).to(dtype)


def _sum(x: Tensor, h: Tensor | None, bias: Tensor | None) -> Tensor:
    y = x.float() if h is None else x.float() + h.float()
    return (y if bias is None else y + bias.float()).to(x.dtype)
