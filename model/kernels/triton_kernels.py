"""The fused operations of `elementwise`, in Triton. One program does one row; all arithmetic is in fp32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.layers import NORM_EPS

if TYPE_CHECKING:
    from model.kernels.elementwise import Branch, Modulated, Rows

FP8_MAX = tl.constexpr(448.0)
SMALLEST_SCALE = tl.constexpr(1e-12)


@triton.jit
def _put(y, values, scales, row, columns, mask, width, QUANTIZED: tl.constexpr):
    """Store a row, in fp8 with its scale if so wanted."""
    at = values + row * width + columns
    if QUANTIZED:
        scale = tl.maximum(tl.max(tl.where(mask, tl.abs(y), 0.0), axis=0) / FP8_MAX, SMALLEST_SCALE)
        y = tl.minimum(tl.maximum(y / scale, -FP8_MAX), FP8_MAX)
        tl.store(scales + row, scale)
    tl.store(at, y.to(values.dtype.element_ty), mask=mask)


@triton.jit
def _added(v, gate, gate_stride, value, batch_stride, row_stride, batch, token, columns, mask):
    g = tl.load(gate + batch * gate_stride + columns, mask=mask, other=0.0).to(tl.float32)
    p = tl.load(value + batch * batch_stride + token * row_stride + columns, mask=mask, other=0.0).to(tl.float32)
    return v + g * p


@triton.jit
def _modulated(normed, shift, scale, stride, batch, columns, mask):
    a = tl.load(scale + batch * stride + columns, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(shift + batch * stride + columns, mask=mask, other=0.0).to(tl.float32)
    return normed * (1.0 + a) + b


@triton.jit(do_not_specialize=["tokens"])
def _add_and_norm_kernel(
    x, out,
    gate_0, gate_stride_0, value_0, batch_stride_0, row_stride_0,
    gate_1, gate_stride_1, value_1, batch_stride_1, row_stride_1,
    shift_0, scale_0, mod_stride_0, made_0, scales_0,
    shift_1, scale_1, mod_stride_1, made_1, scales_1,
    tokens,
    HIDDEN: tl.constexpr, EPS: tl.constexpr, BRANCHES: tl.constexpr, WANTED: tl.constexpr,
    QUANTIZED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    batch, token = row // tokens, row % tokens
    columns = tl.arange(0, BLOCK)
    mask = columns < HIDDEN
    v = tl.load(x + row * HIDDEN + columns, mask=mask, other=0.0).to(tl.float32)
    if BRANCHES >= 1:
        v = _added(v, gate_0, gate_stride_0, value_0, batch_stride_0, row_stride_0, batch, token, columns, mask)
    if BRANCHES == 2:
        v = _added(v, gate_1, gate_stride_1, value_1, batch_stride_1, row_stride_1, batch, token, columns, mask)
    if BRANCHES:
        tl.store(out + row * HIDDEN + columns, v.to(out.dtype.element_ty), mask=mask)
    if WANTED:
        mean = tl.sum(v, axis=0) / HIDDEN
        off = tl.where(mask, v - mean, 0.0)
        normed = off * tl.rsqrt(tl.sum(off * off, axis=0) / HIDDEN + EPS)
        y = _modulated(normed, shift_0, scale_0, mod_stride_0, batch, columns, mask)
        _put(y, made_0, scales_0, row, columns, mask, HIDDEN, QUANTIZED)
        if WANTED == 2:
            y = _modulated(normed, shift_1, scale_1, mod_stride_1, batch, columns, mask)
            _put(y, made_1, scales_1, row, columns, mask, HIDDEN, QUANTIZED)


def add_and_norm(
    x: Tensor, branches: Sequence[Branch], wanted: Sequence[Modulated], fp8: bool
) -> tuple[Tensor, tuple[Tensor | Rows, ...]]:
    """See elementwise."""
    batch, tokens, hidden = x.shape
    out = torch.empty_like(x) if branches else x
    made = [_empty_rows(x, batch * tokens, hidden, fp8) for _ in wanted]
    arguments: list[Any] = [x, out]
    for n in range(2):
        if n < len(branches):
            gate, value = branches[n]
            arguments += [gate, gate.stride(0), value, value.stride(0), value.stride(1)]
        else:
            arguments += [x, 0, x, 0, 0]
    for n in range(2):
        if n < len(wanted):
            shift, scale = wanted[n]
            assert shift.stride(0) == scale.stride(0)
            arguments += [shift, scale, scale.stride(0), *made[n]]
        else:
            arguments += [x, x, 0, x, x]
    _add_and_norm_kernel[(batch * tokens,)](
        *arguments, tokens, hidden, NORM_EPS, len(branches), len(wanted), fp8, **_shape(hidden)
    )
    return out, tuple(rows if fp8 else rows.values for rows in made)


@triton.jit
def _norm_tile(v, weights, stream, which, dims, HEAD_DIM: tl.constexpr, EPS: tl.constexpr):
    """RMSNorm over the last axis of (heads, head_dim)."""
    w = tl.load(weights + (stream * 2 + which) * HEAD_DIM + dims).to(tl.float32)
    return v * tl.rsqrt(tl.sum(v * v, axis=1) / HEAD_DIM + EPS)[:, None] * w[None, :]


@triton.jit(do_not_specialize=["tokens", "image"])
def _norm_heads_kernel(
    qkv, weights, tokens, image,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, EPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, which = tl.program_id(0).to(tl.int64), tl.program_id(1)
    heads, dims = tl.arange(0, BLOCK), tl.arange(0, HEAD_DIM)
    mask = (heads < HEADS)[:, None]
    at = qkv + (row * 3 + which) * (HEADS * HEAD_DIM) + heads[:, None] * HEAD_DIM + dims[None, :]
    v = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    stream = (row % tokens >= image).to(tl.int32)
    v = _norm_tile(v, weights, stream, which, dims, HEAD_DIM, EPS)
    tl.store(at, v.to(qkv.dtype.element_ty), mask=mask)


def norm_heads(qkv: Tensor, weights: Tensor, image: int) -> Tensor:
    """See elementwise."""
    batch, tokens, _, heads, head_dim = qkv.shape
    _norm_heads_kernel[(batch * tokens, 2)](
        qkv, weights, tokens, image, heads, head_dim, NORM_EPS, BLOCK=triton.next_power_of_2(heads), num_warps=4
    )
    return qkv


@triton.jit(do_not_specialize=["image", "text"])
def _joined_heads_kernel(
    image_qkv, text_qkv, weights, out, image, text,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, EPS: tl.constexpr, NORMED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, which = tl.program_id(0).to(tl.int64), tl.program_id(1)
    tokens = image + text
    batch, token = row // tokens, row % tokens
    heads, dims = tl.arange(0, BLOCK), tl.arange(0, HEAD_DIM)
    mask = (heads < HEADS)[:, None]
    tile = heads[:, None] * HEAD_DIM + dims[None, :]
    stream = 0
    if token < image:
        at = ((batch * image + token) * 3 + which) * (HEADS * HEAD_DIM) + tile
        v = tl.load(image_qkv + at, mask=mask, other=0.0).to(tl.float32)
    else:
        stream = 1
        at = ((batch * text + token - image) * 3 + which) * (HEADS * HEAD_DIM) + tile
        v = tl.load(text_qkv + at, mask=mask, other=0.0).to(tl.float32)
    if NORMED:
        if which < 2:
            v = _norm_tile(v, weights, stream, which, dims, HEAD_DIM, EPS)
    tl.store(out + (row * 3 + which) * (HEADS * HEAD_DIM) + tile, v.to(out.dtype.element_ty), mask=mask)


def joined_heads(image: Tensor, text: Tensor | None, weights: Tensor | None) -> Tensor:
    """See elementwise."""
    batch, first, three, heads, head_dim = image.shape
    second = 0 if text is None else text.shape[1]
    out = image.new_empty((batch, first + second, three, heads, head_dim))
    _joined_heads_kernel[(batch * (first + second), 3)](
        image, image if text is None else text, image if weights is None else weights, out, first, second,
        heads, head_dim, NORM_EPS, weights is not None, BLOCK=triton.next_power_of_2(heads), num_warps=4,
    )  # fmt: skip
    return out


@triton.jit
def _tanh(x):
    return 2.0 / (1.0 + tl.exp(-2.0 * x)) - 1.0


@triton.jit
def _quantize_kernel(x, stride, values, scales, WIDTH: tl.constexpr, GELU: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < WIDTH
    v = tl.load(x + row * stride + columns, mask=mask, other=0.0).to(tl.float32)
    if GELU:
        v = 0.5 * v * (1.0 + _tanh(0.7978845608028654 * (v + 0.044715 * v * v * v)))
    _put(v, values, scales, row, columns, mask, WIDTH, True)


def quantized(x: Tensor, gelu: bool) -> Rows:
    """See elementwise."""
    rows, width = x.shape
    made = _empty_rows(x, rows, width, True)
    _quantize_kernel[(rows,)](x, x.stride(0), *made, width, gelu, **_shape(width))
    return made


def _empty_rows(like: Tensor, rows: int, width: int, fp8: bool) -> Rows:
    from model.kernels.elementwise import FP8, Rows

    values = like.new_empty((rows, width), dtype=FP8 if fp8 else like.dtype)
    return Rows(values, like.new_empty((rows, 1), dtype=torch.float32) if fp8 else values)


def _shape(width: int) -> dict[str, int]:
    """The block that holds a row, and the warps that work on it."""
    block = triton.next_power_of_2(width)
    return {"BLOCK": block, "num_warps": 4 if block <= 2048 else 8}
