"""The fused operations of `elementwise`, in Triton. One program does one row; all arithmetic is in fp32.

Programs begin with the last rows, which whoever wrote the input wrote last: those are still in the L2 cache. So the
first rows are written last, with which the matrix product that comes next begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels import elementwise
from model.kernels.elementwise import FP8, Branch, Modulated, Rows
from model.layers import NORM_EPS

FP8_MAX = tl.constexpr(elementwise.FP8_MAX)
SMALLEST_SCALE = tl.constexpr(elementwise.SMALLEST_SCALE)

# A row is held as two tiles, MAIN and REST, whose widths are powers of two: one tile of the next power of two would be
# two fifths empty for rows of 2,432 or 9,728. REST is 0 where the row is a power of two.


@triton.jit
def _newest_first():
    return (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64)


@triton.jit
def _load(at, columns, mask):
    return tl.load(at + columns, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _added(v, gate, value, bias, columns, mask, BIASED: tl.constexpr):
    p = _load(value, columns, mask)
    if BIASED:
        p += _load(bias, columns, mask)
    return v + _load(gate, columns, mask) * p


@triton.jit
def _modulated(normed, shift, scale, columns, mask):
    return normed * (1.0 + _load(scale, columns, mask)) + _load(shift, columns, mask)


@triton.jit
def _largest(y, mask):
    return tl.max(tl.where(mask, tl.abs(y), 0.0), axis=0)


@triton.jit
def _put(y, factor, at, columns, mask, QUANTIZED: tl.constexpr):
    if QUANTIZED:
        y = tl.minimum(tl.maximum(y * factor, -FP8_MAX), FP8_MAX)
    tl.store(at + columns, y.to(at.dtype.element_ty), mask=mask)


@triton.jit
def _put_row(
    main, rest, values, scales, row, c_main, m_main, c_rest, m_rest,
    WIDTH: tl.constexpr, QUANTIZED: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Store a row, in fp8 with its scale if so wanted."""
    factor = 1.0
    if QUANTIZED:
        largest = _largest(main, m_main)
        if REST:
            largest = tl.maximum(largest, _largest(rest, m_rest))
        scale = tl.maximum(largest / FP8_MAX, SMALLEST_SCALE)
        tl.store(scales + row, scale)
        factor = 1.0 / scale
    _put(main, factor, values + row * WIDTH, c_main, m_main, QUANTIZED)
    if REST:
        _put(rest, factor, values + row * WIDTH, c_rest, m_rest, QUANTIZED)


@triton.jit(do_not_specialize=["tokens"])
def _add_and_norm_kernel(
    x, out,
    gate_0, gate_stride_0, value_0, batch_stride_0, row_stride_0, bias_0,
    gate_1, gate_stride_1, value_1, batch_stride_1, row_stride_1, bias_1,
    shift_0, scale_0, mod_stride_0, made_0, scales_0,
    shift_1, scale_1, mod_stride_1, made_1, scales_1,
    tokens,
    HIDDEN: tl.constexpr, EPS: tl.constexpr, BRANCHES: tl.constexpr, WANTED: tl.constexpr,
    BIASED_0: tl.constexpr, BIASED_1: tl.constexpr, QUANTIZED: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    row = _newest_first()
    batch, token = row // tokens, row % tokens
    c, d = tl.arange(0, MAIN), MAIN + tl.arange(0, REST if REST else 1)
    m, n = c < HIDDEN, d < HIDDEN
    v = _load(x + row * HIDDEN, c, m)
    w = _load(x + row * HIDDEN, d, n)
    if BRANCHES >= 1:
        gate, value = gate_0 + batch * gate_stride_0, value_0 + batch * batch_stride_0 + token * row_stride_0
        v = _added(v, gate, value, bias_0, c, m, BIASED_0)
        w = _added(w, gate, value, bias_0, d, n, BIASED_0)
    if BRANCHES == 2:
        gate, value = gate_1 + batch * gate_stride_1, value_1 + batch * batch_stride_1 + token * row_stride_1
        v = _added(v, gate, value, bias_1, c, m, BIASED_1)
        w = _added(w, gate, value, bias_1, d, n, BIASED_1)
    if BRANCHES:
        tl.store(out + row * HIDDEN + c, v.to(out.dtype.element_ty), mask=m)
        tl.store(out + row * HIDDEN + d, w.to(out.dtype.element_ty), mask=n)
    if WANTED:
        mean = (tl.sum(v, axis=0) + tl.sum(w, axis=0)) / HIDDEN
        v, w = v - mean, tl.where(n, w - mean, 0.0)
        factor = tl.rsqrt((tl.sum(v * v, axis=0) + tl.sum(w * w, axis=0)) / HIDDEN + EPS)
        v, w = v * factor, w * factor
        shift, scale = shift_0 + batch * mod_stride_0, scale_0 + batch * mod_stride_0
        y, z = _modulated(v, shift, scale, c, m), _modulated(w, shift, scale, d, n)
        _put_row(y, z, made_0, scales_0, row, c, m, d, n, HIDDEN, QUANTIZED, REST)
        if WANTED == 2:
            shift, scale = shift_1 + batch * mod_stride_1, scale_1 + batch * mod_stride_1
            y, z = _modulated(v, shift, scale, c, m), _modulated(w, shift, scale, d, n)
            _put_row(y, z, made_1, scales_1, row, c, m, d, n, HIDDEN, QUANTIZED, REST)


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
            gate, value, bias = branches[n]
            arguments += [gate, gate.stride(0), value, value.stride(0), value.stride(1), x if bias is None else bias]
        else:
            arguments += [x, 0, x, 0, 0, x]
    for n in range(2):
        if n < len(wanted):
            shift, scale = wanted[n]
            assert shift.stride(0) == scale.stride(0)
            arguments += [shift, scale, scale.stride(0), *made[n]]
        else:
            arguments += [x, x, 0, x, x]
    biased = [n < len(branches) and branches[n].bias is not None for n in range(2)]
    _add_and_norm_kernel[(batch * tokens,)](
        *arguments, tokens, hidden, NORM_EPS, len(branches), len(wanted), *biased, fp8, **_shape(hidden)
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
    program = _newest_first()
    row, which = program // 2, program % 2
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
    _norm_heads_kernel[(batch * tokens * 2,)](
        qkv, weights, tokens, image, heads, head_dim, NORM_EPS, BLOCK=triton.next_power_of_2(heads), num_warps=4
    )
    return qkv


@triton.jit(do_not_specialize=["image", "text"])
def _joined_heads_kernel(
    image_qkv, text_qkv, weights, out, image, text,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, EPS: tl.constexpr, NORMED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = _newest_first()
    row, which = program // 3, program % 3
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


def joined_heads(image: Tensor, text: Tensor, weights: Tensor | None) -> Tensor:
    """See elementwise."""
    batch, first, three, heads, head_dim = image.shape
    second = text.shape[1]
    out = image.new_empty((batch, first + second, three, heads, head_dim))
    _joined_heads_kernel[(batch * (first + second) * 3,)](
        image, text, image if weights is None else weights, out, first, second,
        heads, head_dim, NORM_EPS, weights is not None, BLOCK=triton.next_power_of_2(heads), num_warps=4,
    )  # fmt: skip
    return out


@triton.jit
def _gelu(v, EXACT: tl.constexpr):
    """By one instruction for tanh, which is right to 11 bits; exactly only where there is no such instruction."""
    u = 0.7978845608028654 * (v + 0.044715 * v * v * v)
    if EXACT:
        tanh = 2.0 / (1.0 + tl.exp(-2.0 * u)) - 1.0
    else:
        tanh = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [u], tl.float32, is_pure=True, pack=1)
    return 0.5 * v * (1.0 + tanh)


@triton.jit(do_not_specialize=["tokens"])
def _quantize_kernel(
    x, batch_stride, row_stride, values, scales, tokens,
    WIDTH: tl.constexpr, GELU: tl.constexpr, EXACT: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    row = _newest_first()
    at = x + row // tokens * batch_stride + row % tokens * row_stride
    c, d = tl.arange(0, MAIN), MAIN + tl.arange(0, REST if REST else 1)
    m, n = c < WIDTH, d < WIDTH
    v, w = _load(at, c, m), _load(at, d, n)
    if GELU:
        v, w = _gelu(v, EXACT), _gelu(w, EXACT)
    _put_row(v, w, values, scales, row, c, m, d, n, WIDTH, True, REST)


def quantized(x: Tensor, gelu: bool) -> Rows:
    """See elementwise."""
    batch, tokens, width = x.shape
    made = _empty_rows(x, batch * tokens, width, True)
    _quantize_kernel[(batch * tokens,)](
        x, x.stride(0), x.stride(1), *made, tokens, width, gelu, not x.is_cuda, **_shape(width)
    )
    return made


def _empty_rows(like: Tensor, rows: int, width: int, fp8: bool) -> Rows:
    values = like.new_empty((rows, width), dtype=FP8 if fp8 else like.dtype)
    return Rows(values, like.new_empty((rows, 1), dtype=torch.float32) if fp8 else values)


def _shape(width: int) -> dict[str, int]:
    """The tiles that hold a row, and the warps that work on it."""
    main = triton.next_power_of_2(width + 1) // 2
    rest = triton.next_power_of_2(width - main) if width > main else 0
    return {"MAIN": main, "REST": rest, "num_warps": 4 if main <= 2048 else 8}
