"""The parts of the MMDiT. Parameter names are those of the published checkpoints."""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORM_EPS = 1e-6


class QKV(NamedTuple):
    """Queries, keys and values, each of shape = (batch, heads, tokens, head_dim)."""

    q: Tensor
    k: Tensor
    v: Tensor


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x * (1 + scale) + shift; x of shape = (batch, tokens, hidden), shift and scale of shape = (batch, hidden)."""
    return x * (1 + scale[:, None]) + shift[:, None]


def norm(x: Tensor) -> Tensor:
    """LayerNorm without weights over the last axis."""
    return F.layer_norm(x, x.shape[-1:], eps=NORM_EPS)


def attend(qkv: QKV) -> Tensor:
    """Softmax attention without mask; shape = (batch, tokens, heads * head_dim)."""
    return F.scaled_dot_product_attention(qkv.q, qkv.k, qkv.v).transpose(1, 2).flatten(2)


def timestep_embedding(timestep: Tensor, dim: int) -> Tensor:
    """Sinusoids of a timestep, cosines first; shape = (batch,) -> (batch, dim), in fp32.

    Always fp32: in bf16 the timestep 857.69 would become 856.
    """
    half = dim // 2
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half, dtype=torch.float32, device=timestep.device) / half)
    angles = timestep.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def position_table(hidden: int, grid: int) -> Tensor:
    """The fixed 2-D sine-cosine table of the published weights; shape = (1, grid * grid, hidden), fp32.

    The central 64x64 patches span coordinates 0 to 15.75; the first half of the channels encodes the column, the
    second the row.
    """
    coordinates = torch.arange(grid, dtype=torch.float64) / 4 - (grid - 64) / 8
    omega = 10_000 ** -(torch.arange(hidden // 4, dtype=torch.float64) / (hidden // 4))
    angles = coordinates[:, None] * omega
    axis = torch.cat([angles.sin(), angles.cos()], dim=-1)  # (grid, hidden / 2)
    columns = axis[None, :, :].expand(grid, grid, -1)
    rows = axis[:, None, :].expand(grid, grid, -1)
    return torch.cat([columns, rows], dim=-1).reshape(1, grid * grid, hidden).float()


class PatchEmbed(nn.Module):
    """Latents to patch tokens, row by row."""

    def __init__(self, in_channels: int, hidden: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden, kernel_size=patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        """shape = (batch, channels, h, w) -> (batch, h/patch * w/patch, hidden)."""
        return self.proj(x).flatten(2).transpose(1, 2)


class Embedder(nn.Module):
    """Linear, SiLU, Linear: for the timestep's sinusoids and for the pooled text."""

    def __init__(self, in_dim: int, hidden: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(in_dim, hidden), nn.SiLU(), nn.Linear(hidden, hidden))

    def forward(self, x: Tensor) -> Tensor:
        """shape = (batch, in_dim) -> (batch, hidden)."""
        return self.mlp(x)


class Modulation(nn.Sequential):
    """adaLN: SiLU and Linear from the conditioning vector to `chunks` vectors of the hidden width."""

    def __init__(self, hidden: int, chunks: int) -> None:
        super().__init__(nn.SiLU(), nn.Linear(hidden, chunks * hidden))
        self.chunks = chunks

    def forward(self, c: Tensor) -> tuple[Tensor, ...]:
        """shape = (batch, hidden) -> `chunks` times (batch, hidden)."""
        return super().forward(c).chunk(self.chunks, dim=-1)


class Attention(nn.Module):
    """The projections of one stream's attention; the attending itself is joint, outside."""

    def __init__(self, hidden: int, heads: int, qk_norm: bool, projected: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(hidden, 3 * hidden)
        head_dim = hidden // heads
        self.ln_q = nn.RMSNorm(head_dim, eps=NORM_EPS) if qk_norm else nn.Identity()
        self.ln_k = nn.RMSNorm(head_dim, eps=NORM_EPS) if qk_norm else nn.Identity()
        if projected:
            self.proj = nn.Linear(hidden, hidden)

    def project(self, x: Tensor) -> QKV:
        """shape = (batch, tokens, hidden) -> queries, keys and values."""
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # (batch, tokens, 3, heads, head_dim)
        q, k, v = qkv.unbind(2)
        return QKV(self.ln_q(q).transpose(1, 2), self.ln_k(k).transpose(1, 2), v.transpose(1, 2))


class MLP(nn.Module):
    """Linear, GELU (tanh), Linear."""

    def __init__(self, hidden: int, ratio: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden, ratio * hidden)
        self.fc2 = nn.Linear(ratio * hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """shape = (batch, tokens, hidden), in and out."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class StreamBlock(nn.Module):
    """One stream (image or context) of a joint block: its modulation, attention projections and MLP."""

    def __init__(
        self, hidden: int, heads: int, *, qk_norm: bool, mlp_ratio: int, dual: bool, last_context: bool
    ) -> None:
        super().__init__()
        chunks = 2 if last_context else 9 if dual else 6
        self.adaLN_modulation = Modulation(hidden, chunks)
        self.attn = Attention(hidden, heads, qk_norm, projected=not last_context)
        if dual:
            self.attn2 = Attention(hidden, heads, qk_norm)
        if not last_context:
            self.mlp = MLP(hidden, mlp_ratio)

    def finish_mlp(self, x: Tensor, mlp: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """The MLP's residual; `mlp` is its shift, scale and gate."""
        shift, scale, gate = mlp
        return x + gate[:, None] * self.mlp(modulate(norm(x), shift, scale))


class JointBlock(nn.Module):
    """Image and context streams with weights of their own that attend over both at once."""

    def __init__(self, hidden: int, heads: int, *, qk_norm: bool, mlp_ratio: int, dual: bool, last: bool) -> None:
        super().__init__()
        stream = partial(StreamBlock, hidden, heads, qk_norm=qk_norm, mlp_ratio=mlp_ratio)
        self.x_block = stream(dual=dual, last_context=False)
        self.context_block = stream(dual=False, last_context=last)
        self.dual, self.last = dual, last

    def forward(self, x: Tensor, context: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """x of shape = (batch, n, hidden), context of shape = (batch, m, hidden), c of shape = (batch, hidden).

        The last block returns its context unchanged: nobody reads it after.
        """
        x_mod, context_mod = self.x_block.adaLN_modulation(c), self.context_block.adaLN_modulation(c)
        if self.last:
            context_shift, context_scale = context_mod
        else:
            context_shift, context_scale, context_gate, *context_mlp = context_mod
        x_shift, x_scale, x_gate, *x_mlp = x_mod[:6]

        normed = norm(x)
        image = self.x_block.attn.project(modulate(normed, x_shift, x_scale))
        text = self.context_block.attn.project(modulate(norm(context), context_shift, context_scale))
        joint = attend(QKV(*(torch.cat(pair, dim=2) for pair in zip(image, text, strict=True))))
        image_attended, text_attended = joint.split([x.shape[1], context.shape[1]], dim=1)

        x_after = x + x_gate[:, None] * self.x_block.attn.proj(image_attended)
        if self.dual:
            # The second attention sees the same normed input as the first, not its result.
            shift2, scale2, gate2 = x_mod[6:]
            attended2 = attend(self.x_block.attn2.project(modulate(normed, shift2, scale2)))
            x_after = x_after + gate2[:, None] * self.x_block.attn2.proj(attended2)
        x_after = self.x_block.finish_mlp(x_after, tuple(x_mlp))
        if self.last:
            return x_after, context
        context = context + context_gate[:, None] * self.context_block.attn.proj(text_attended)
        return x_after, self.context_block.finish_mlp(context, tuple(context_mlp))


class FinalLayer(nn.Module):
    """Modulated norm and projection from tokens back to patches."""

    def __init__(self, hidden: int, patch: int, out_channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden, patch * patch * out_channels)
        self.adaLN_modulation = Modulation(hidden, 2)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """shape = (batch, tokens, hidden) -> (batch, tokens, patch * patch * channels)."""
        shift, scale = self.adaLN_modulation(c)
        return self.linear(modulate(norm(x), shift, scale))
