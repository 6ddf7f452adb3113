"""The fused operations of `groupnorm`, in Triton. A program does some positions with all their channels, in fp32.

Positions are counted in 64 bits: 2048 x 2048 of 512 channels are 2^31 values.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 4096
"""Values that a program of four warps holds at a time."""

STATISTICS_TILE = 2048
"""The same where there are two sums for each of them."""

MAX_PARTS = 640
"""Parts that statistics are of: about as many programs as an H100 runs at once. Shapes alone decide, not the GPU."""

LINE = 4096
"""Scores that a program of the softmax holds at a time."""

ROUNDER = tl.constexpr(12582912.0)
"""1.5 * 2^23: fp32 of this size has no fraction, so adding it rounds, half to even."""


@triton.jit
def _mask(rows, end, columns, CHANNELS: tl.constexpr, COLUMNS: tl.constexpr):
    """What of a tile is there; without a condition on the columns where there need be none, so that loads are wide."""
    mask = (rows < end)[:, None]
    if CHANNELS != COLUMNS:
        mask = mask & (columns < CHANNELS)[None, :]
    return mask


@triton.jit
def _channel(at, columns, CHANNELS: tl.constexpr):
    """One value a channel, in fp32."""
    return tl.load(at + columns, mask=columns < CHANNELS, other=0.0).to(tl.float32)


@triton.jit
def _put_part(parts, part, count, mean, squares, columns, CHANNELS: tl.constexpr):
    """Join what the rows of a tile have seen, and store it.

    count : shape = (rows,); mean, squares : shape = (rows, columns)
    """
    total = tl.sum(count, axis=0)
    joined = tl.sum(mean * count[:, None], axis=0) / total
    off = mean - joined[None, :]
    squares = tl.sum(squares + off * off * count[:, None], axis=0)
    at = parts + part * (3 * CHANNELS) + columns
    there = columns < CHANNELS
    tl.store(at, tl.zeros_like(joined) + total, mask=there)
    tl.store(at + CHANNELS, joined, mask=there)
    tl.store(at + 2 * CHANNELS, squares, mask=there)


@triton.jit
def _woven_at(rows, batch, positions, width, CHANNELS: tl.constexpr):
    """Where the positions of a picture lie among its corners; see groupnorm.woven."""
    position = rows.to(tl.int32)
    y, x = position // width, position % width
    corner = (y // 2 + y % 2).to(tl.int64) * (width // 2 + 1) + x // 2 + x % 2
    corners = (positions // width // 2 + 1).to(tl.int64) * (width // 2 + 1)
    return (batch * corners + corner) * (4 * CHANNELS) + (y % 2 * 2 + x % 2) * CHANNELS


@triton.jit(do_not_specialize=["positions", "share", "width"])
def _statistics_kernel(
    x, h, bias, out, parts, positions, share, width,
    CHANNELS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ADDED: tl.constexpr, BIASED: tl.constexpr, WOVEN: tl.constexpr,
):  # fmt: skip
    """Welford's method in each place of a tile, over the tiles of a part.

    ADDED : x + h is written first; BIASED : and the bias is in it; WOVEN : or x comes from another order
    """
    part, batch = tl.program_id(0), tl.program_id(1)
    first = part.to(tl.int64) * share
    end = tl.minimum(first + share, positions)
    base = batch.to(tl.int64) * positions
    columns = tl.arange(0, COLUMNS)
    count = tl.zeros((ROWS,), tl.float32)
    mean = tl.zeros((ROWS, COLUMNS), tl.float32)
    squares = tl.zeros((ROWS, COLUMNS), tl.float32)
    if BIASED:
        b = _channel(bias, columns, CHANNELS)
    for start in range(0, share, ROWS):
        rows = first + start + tl.arange(0, ROWS)
        mask = _mask(rows, end, columns, CHANNELS, COLUMNS)
        at = (base + rows)[:, None] * CHANNELS + columns[None, :]
        if WOVEN:
            place = _woven_at(rows, batch, positions, width, CHANNELS)[:, None] + columns[None, :]
            value = tl.load(x + place, mask=mask, other=0.0)
            tl.store(out + at, value, mask=mask)
            v = value.to(tl.float32)
        else:
            v = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        if ADDED:
            v += tl.load(h + at, mask=mask, other=0.0).to(tl.float32)
            if BIASED:
                v += b[None, :]
            rounded = v.to(out.dtype.element_ty)
            tl.store(out + at, rounded, mask=mask)
            v = rounded.to(tl.float32)
        count += (rows < end).to(tl.float32)
        off = tl.where(mask, v - mean, 0.0)
        mean += off * (1.0 / tl.maximum(count, 1.0))[:, None]
        squares += tl.where(mask, off * (v - mean), 0.0)
    _put_part(parts, batch * tl.num_programs(0) + part, count, mean, squares, columns, CHANNELS)


@triton.jit(do_not_specialize=["number"])
def _affine_kernel(
    parts, bias, weight, shift, out, number, eps,
    CHANNELS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    """One group of one picture. WIDTH : channels of a group."""
    group, batch = tl.program_id(0), tl.program_id(1)
    columns = tl.arange(0, COLUMNS)
    there = columns < WIDTH
    channels = group * WIDTH + columns
    added = tl.zeros((COLUMNS,), tl.float32)
    if BIASED:
        added += tl.load(bias + channels, mask=there, other=0.0).to(tl.float32)
    base = parts + batch.to(tl.int64) * number * (3 * CHANNELS) + channels[None, :]
    counts = tl.zeros((ROWS, COLUMNS), tl.float32)
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, number, ROWS):
        rows = start + tl.arange(0, ROWS)
        mask = (rows < number)[:, None] & there[None, :]
        at = base + rows[:, None] * (3 * CHANNELS)
        count = tl.load(at, mask=mask, other=0.0)
        counts += count
        sums += count * (tl.load(at + CHANNELS, mask=mask, other=0.0) + added[None, :])
    total = tl.sum(tl.sum(counts, axis=0), axis=0)
    mean = tl.sum(tl.sum(sums, axis=0), axis=0) / total
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, number, ROWS):
        rows = start + tl.arange(0, ROWS)
        mask = (rows < number)[:, None] & there[None, :]
        at = base + rows[:, None] * (3 * CHANNELS)
        off = tl.load(at + CHANNELS, mask=mask, other=0.0) + added[None, :] - mean
        sums += tl.load(at + 2 * CHANNELS, mask=mask, other=0.0) + tl.load(at, mask=mask, other=0.0) * off * off
    variance = tl.sum(tl.sum(sums, axis=0), axis=0) / total
    factor = tl.load(weight + channels, mask=there, other=0.0).to(tl.float32) / tl.sqrt(variance + eps)
    term = tl.load(shift + channels, mask=there, other=0.0).to(tl.float32) + (added - mean) * factor
    tl.store(out + batch * (2 * CHANNELS) + channels, factor, mask=there)
    tl.store(out + batch * (2 * CHANNELS) + CHANNELS + channels, term, mask=there)


@triton.jit(do_not_specialize=["positions"])
def _apply_kernel(
    x, factor_term, out, positions,
    CHANNELS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(1)
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    mask = _mask(rows, positions, columns, CHANNELS, COLUMNS)
    factor = _channel(factor_term + batch * (2 * CHANNELS), columns, CHANNELS)
    term = _channel(factor_term + batch * (2 * CHANNELS) + CHANNELS, columns, CHANNELS)
    at = (batch.to(tl.int64) * positions + rows)[:, None] * CHANNELS + columns[None, :]
    y = tl.load(x + at, mask=mask, other=0.0).to(tl.float32) * factor[None, :] + term[None, :]
    if SILU:
        y = y / (1.0 + tl.exp(-y))
    tl.store(out + at, y.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["positions", "width"])
def _add_upsampled_kernel(
    x, h, bias, out, positions, width,
    CHANNELS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ADDED: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    """Positions of all pictures in one row: the lines of a batch lie one under the other."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    mask = _mask(rows, positions, columns, CHANNELS, COLUMNS)
    at = rows[:, None] * CHANNELS + columns[None, :]
    v = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    if ADDED:
        v += tl.load(h + at, mask=mask, other=0.0).to(tl.float32)
    if BIASED:
        v += _channel(bias, columns, CHANNELS)[None, :]
    y = v.to(out.dtype.element_ty)
    upper = (rows // width) * (4 * width) + (rows % width) * 2
    to = out + upper[:, None] * CHANNELS + columns[None, :]
    below = 2 * CHANNELS * width.to(tl.int64)
    tl.store(to, y, mask=mask)
    tl.store(to + CHANNELS, y, mask=mask)
    tl.store(to + below, y, mask=mask)
    tl.store(to + below + CHANNELS, y, mask=mask)


@triton.jit(do_not_specialize=["positions"])
def _rgb_kernel(x, bias, out, positions, CHANNELS: tl.constexpr, ROWS: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, 4)
    mask = (rows < positions)[:, None] & (columns < 3)[None, :]
    v = tl.load(x + rows[:, None] * CHANNELS + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    v += tl.load(bias + columns, mask=columns < 3, other=0.0).to(tl.float32)[None, :]
    v = tl.minimum(tl.maximum((v + 1.0) * 127.5, 0.0), 255.0)
    rounded = (v + ROUNDER) - ROUNDER
    tl.store(out + rows[:, None] * 3 + columns[None, :], rounded.to(tl.int32).to(tl.uint8), mask=mask)


@triton.jit
def _softmax_kernel(scores, out, number, scale, LINE: tl.constexpr):
    """One row, read twice: for its largest score and the sum, then for what is written."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, LINE)
    largest = tl.full((LINE,), float("-inf"), tl.float32)
    total = tl.zeros((LINE,), tl.float32)
    for start in range(0, number, LINE):
        v = tl.load(scores + row * number + start + columns, mask=start + columns < number, other=float("-inf"))
        v = v.to(tl.float32) * scale
        # A place that has seen no score yet counts from 0, for the difference of two infinities is no number.
        most = tl.maximum(largest, v)
        base = tl.where(most == float("-inf"), 0.0, most)
        total = total * tl.exp(largest - base) + tl.exp(v - base)
        largest = most
    most = tl.max(largest, axis=0)
    inverse = 1.0 / tl.sum(total * tl.exp(largest - most), axis=0)
    for start in range(0, number, LINE):
        mask = start + columns < number
        v = tl.load(scores + row * number + start + columns, mask=mask, other=0.0).to(tl.float32) * scale
        y = tl.exp(v - most) * inverse
        tl.store(out + row * number + start + columns, y.to(out.dtype.element_ty), mask=mask)


def statistics(x: Tensor) -> Tensor:
    """See groupnorm."""
    return _statistics(x, None, None, x)


def add(x: Tensor, h: Tensor, bias: Tensor | None, out: Tensor | None) -> tuple[Tensor, Tensor]:
    """See groupnorm."""
    out = torch.empty_like(x) if out is None else out
    return out, _statistics(x, h, bias, out)


def woven(x: Tensor) -> tuple[Tensor, Tensor]:
    """See groupnorm."""
    batch, below, right, channels = x.shape
    out = x.new_empty((batch, 2 * below - 2, 2 * right - 2, channels // 4))
    return out, _statistics(x, None, None, out, woven=True)


def _statistics(x: Tensor, h: Tensor | None, bias: Tensor | None, out: Tensor, woven: bool = False) -> Tensor:
    batch, height, width, channels = out.shape
    tile = _tile(channels, STATISTICS_TILE)
    positions = height * width
    tiles = triton.cdiv(positions, tile["ROWS"])
    share = triton.cdiv(tiles, MAX_PARTS) * tile["ROWS"]
    number = triton.cdiv(positions, share)
    parts = torch.empty((batch, number, 3, channels), dtype=torch.float32, device=x.device)
    _statistics_kernel[(number, batch)](
        x, x if h is None else h, x if bias is None else bias, out, parts, positions, share, width,
        channels, **tile, ADDED=h is not None, BIASED=bias is not None, WOVEN=woven, num_warps=4,
    )  # fmt: skip
    return parts


def affine(parts: Tensor, bias: Tensor | None, weight: Tensor, shift: Tensor, groups: int, eps: float) -> Tensor:
    """See groupnorm."""
    batch, number, _, channels = parts.shape
    out = torch.empty((batch, 2, channels), dtype=torch.float32, device=parts.device)
    columns = triton.next_power_of_2(channels // groups)
    _affine_kernel[(groups, batch)](
        parts, parts if bias is None else bias, weight, shift, out, number, eps, channels, channels // groups,
        ROWS=max(1, 2048 // columns), COLUMNS=columns, BIASED=bias is not None, num_warps=4,
    )  # fmt: skip
    return out


def apply(x: Tensor, factor_term: Tensor, silu: bool, out: Tensor | None) -> Tensor:
    """See groupnorm."""
    batch, height, width, channels = x.shape
    out = torch.empty_like(x) if out is None else out
    tile = _tile(channels)
    grid = (triton.cdiv(height * width, tile["ROWS"]), batch)
    _apply_kernel[grid](x, factor_term, out, height * width, channels, **tile, SILU=silu, num_warps=4)
    return out


def add_upsampled(x: Tensor, h: Tensor | None, bias: Tensor | None) -> Tensor:
    """See groupnorm."""
    batch, height, width, channels = x.shape
    out = x.new_empty((batch, 2 * height, 2 * width, channels))
    tile = _tile(channels)
    positions = batch * height * width
    _add_upsampled_kernel[(triton.cdiv(positions, tile["ROWS"]),)](
        x, x if h is None else h, x if bias is None else bias, out, positions, width, channels,
        **tile, ADDED=h is not None, BIASED=bias is not None, num_warps=4,
    )  # fmt: skip
    return out


def rgb(x: Tensor, bias: Tensor) -> Tensor:
    """See groupnorm."""
    batch, height, width, channels = x.shape
    out = torch.empty((batch, height, width, 3), dtype=torch.uint8, device=x.device)
    positions = batch * height * width
    _rgb_kernel[(triton.cdiv(positions, 512),)](x, bias, out, positions, channels, ROWS=512, num_warps=4)
    return out


def softmax(scores: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """See groupnorm."""
    number = scores.shape[-1]
    out = torch.empty_like(scores, dtype=dtype)
    line = min(LINE, triton.next_power_of_2(number))
    _softmax_kernel[(scores.numel() // number,)](scores, out, number, scale, LINE=line, num_warps=8)
    return out


def _tile(channels: int, values: int = TILE) -> dict[str, int]:
    """Positions and channels of a tile."""
    columns = triton.next_power_of_2(channels)
    return {"ROWS": max(1, values // columns), "COLUMNS": columns}
