"""What an MMDiT block does between its matrix products, in one pass over memory each.

In bf16 the fused operations round once, at their end, where the twins round after every operation: both are tested
against fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model.kernels import fused
from model.layers import NORM_EPS, modulate, norm

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
SMALLEST_SCALE = 1e-12


class Rows(NamedTuple):
    """A matrix in fp8 with a factor for each row: values of shape = (rows, columns), scales of shape = (rows, 1)."""

    values: Tensor
    scales: Tensor  # fp32

    @property
    def whole(self) -> Tensor:
        """In fp32."""
        return self.values.float() * self.scales


class Branch(NamedTuple):
    """What comes back to the residual stream: gate * (value + bias)."""

    gate: Tensor  # shape = (batch, hidden), rows may lie apart
    value: Tensor  # shape = (batch, tokens, hidden), rows may lie apart
    bias: Tensor | None = None  # shape = (hidden,), of the product that made the value, if it left it out


class Modulated(NamedTuple):
    """How a normed stream is modulated; each of shape = (batch, hidden), rows may lie apart."""

    shift: Tensor
    scale: Tensor


def add_and_norm(
    x: Tensor, branches: Sequence[Branch], wanted: Sequence[Modulated], fp8: bool = False
) -> tuple[Tensor, tuple[Tensor | Rows, ...]]:
    """The residual stream after its branches, and its LayerNorm (without weights), modulated in each wanted way.

    x : shape = (batch, tokens, hidden), contiguous
    branches : at most two, added in their order
    wanted : at most two
    fp8 : whether the modulated streams are wanted as Rows
    returns : the stream, shape = (batch, tokens, hidden), x itself without branches; the modulated, shape =
        (batch * tokens, hidden) each
    """
    if fused(x):
        from model.kernels import triton_kernels

        return triton_kernels.add_and_norm(x, branches, wanted, fp8)
    for gate, value, bias in branches:
        x = x + gate[:, None] * (value if bias is None else value + bias)
    normed = norm(x) if wanted else x
    made = [modulate(normed, shift, scale).flatten(0, 1) for shift, scale in wanted]
    return x, tuple(quantized(y) if fp8 else y for y in made)


def norm_heads(qkv: Tensor, weights: Tensor | None, image: int) -> Tensor:
    """RMSNorm of each head's queries and keys, in place.

    qkv : shape = (batch, tokens, 3, heads, head_dim), contiguous: image tokens first, then text
    weights : shape = (2, 2, head_dim): image, text; queries, keys; None for no norm
    image : how many of the tokens are the image's
    returns : qkv
    """
    if weights is None:
        return qkv
    if fused(qkv) and _tiled(qkv):
        from model.kernels import triton_kernels

        return triton_kernels.norm_heads(qkv, weights, image)
    for stream, part in enumerate((qkv[:, :image], qkv[:, image:])):
        for which in range(2):
            heads = part[:, :, which]
            heads.copy_(F.rms_norm(heads, heads.shape[-1:], weights[stream, which], eps=NORM_EPS))
    return qkv


def joined_heads(image: Tensor, text: Tensor, weights: Tensor | None) -> Tensor:
    """The queries, keys and values of both streams side by side, queries and keys normed as by `norm_heads`.

    image, text : shape = (batch, tokens, 3, heads, head_dim), contiguous
    returns : shape = (batch, image and text tokens, 3, heads, head_dim)
    """
    if fused(image) and _tiled(image):
        from model.kernels import triton_kernels

        return triton_kernels.joined_heads(image, text, weights)
    return norm_heads(torch.cat([image, text], dim=1), weights, image.shape[1])


def _tiled(qkv: Tensor) -> bool:
    """Whether a head is as wide as a tile of Triton's may be: a power of two, as the published models' 64."""
    return qkv.shape[-1].bit_count() == 1


def quantized(x: Tensor) -> Rows:
    """Rows in fp8, each scaled so that its largest value is the format's.

    x : shape = (batch, tokens, width) or (rows, width); only the last axis must be contiguous
    """
    if fused(x):
        from model.kernels import triton_kernels

        return triton_kernels.quantized(x if x.ndim == 3 else x[None], gelu=False)
    return _quantized(x.float())


def gelu_quantized(x: Tensor) -> Rows:
    """The same of GELU (tanh)."""
    if fused(x):
        from model.kernels import triton_kernels

        return triton_kernels.quantized(x if x.ndim == 3 else x[None], gelu=True)
    return _quantized(F.gelu(x.float(), approximate="tanh"))


def _quantized(x: Tensor) -> Rows:
    x = x.reshape(-1, x.shape[-1])
    scales = (x.abs().amax(1, keepdim=True) / FP8_MAX).clamp(min=SMALLEST_SCALE)
    return Rows((x / scales).clamp(-FP8_MAX, FP8_MAX).to(FP8), scales)
