"""What this GPU can do: matrix products and attention alone, measured when first asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cache, cached_property

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from model.config import MMDiTConfig
from tests.benchmarks.gpu import flops
from tests.benchmarks.gpu.timing import Call, in_a_row, interleaved

BUDGET_S = 0.3  # of one shape
CALLS = 10


class Ceilings:
    """Rates in FLOP a second, and times of attention, in bf16 on random data."""

    def __init__(self, device: torch.device, small: bool) -> None:
        self.device, self.side = device, 256 if small else 8192
        self.attention = cache(self._attention)

    @cached_property
    def gemm(self) -> float:
        """Of a large square product."""
        return self.product(self.side, self.side, self.side)

    def product(self, m: int, k: int, n: int) -> float:
        """Of x w with x of shape (m, k) and a linear's weight."""
        x, w = self._random(m, k), self._random(n, k)
        return 2.0 * m * k * n / self._seconds(lambda: F.linear(x, w))

    def _attention(self, rows: int, heads: int, tokens: int, width: int) -> dict[str, float]:
        """Seconds of each backend that can do it; q, k and v are views as a packed projection leaves them."""
        q, k, v = (self._random(rows, tokens, heads, width) for _ in range(3))
        found: dict[str, float] = {}
        for name, (within, call) in _backends(q, k, v).items():
            try:
                with within:
                    found[name] = self._seconds(call)
            except Exception as error:  # of a library that is not of this GPU or torch
                print(f"  attention by {name} cannot be measured: {str(error)[:200]}")
        return found

    def attention_s(self, config: MMDiTConfig, rows: int, tokens: int) -> float:
        """Of the fastest backend."""
        return min(self.attention(rows, config.heads, tokens, config.head_dim).values())

    def forward_s(self, config: MMDiTConfig, rows: int, image: int, text: int) -> float:
        """The least that a forward of so many rows could take, at these rates."""
        attending = config.depth * self.attention_s(config, rows, image + text)
        if config.dual_blocks:
            attending += len(config.dual_blocks) * self.attention_s(config, rows, image)
        return rows * flops.linear(config, image, text) / self.gemm + attending

    def products(self, config: MMDiTConfig, tokens: int) -> Iterator[tuple[str, float, float]]:
        """The linears of a block for so many tokens: name, FLOP and rate."""
        h, wide = config.hidden, config.mlp_ratio * config.hidden
        for name, k, n in (("qkv", h, 3 * h), ("proj", h, h), ("fc1", h, wide), ("fc2", wide, h)):
            yield name, 2.0 * tokens * k * n, self.product(tokens, k, n)

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=torch.bfloat16)

    @torch.inference_mode()
    def _seconds(self, call: Call) -> float:
        return interleaved({"it": call}, in_a_row(self.device, CALLS), BUDGET_S)["it"].median


def _backends(q: Tensor, k: Tensor, v: Tensor) -> dict[str, tuple[AbstractContextManager[object], Call]]:
    """Ways to attend; q, k and v of shape = (rows, tokens, heads, width)."""
    heads_first = [t.transpose(1, 2) for t in (q, k, v)]

    def sdpa() -> Tensor:
        return F.scaled_dot_product_attention(*heads_first)

    found: dict[str, tuple[AbstractContextManager[object], Call]] = {"default": (nullcontext(), sdpa)}
    if q.is_cuda:
        found["cuDNN"] = sdpa_kernel(SDPBackend.CUDNN_ATTENTION), sdpa
        found["flash"] = sdpa_kernel(SDPBackend.FLASH_ATTENTION), sdpa
        if (fa3 := _fa3()) is not None:
            found["FA3"] = nullcontext(), lambda: fa3(q, k, v)
    return found


def _fa3() -> Callable[..., object] | None:
    """FlashAttention 3 of the wheel `fa3-fwd`, where it is installed."""
    try:
        from fa3_fwd_interface import flash_attn_func
    except (ImportError, OSError):
        return None
    return flash_attn_func
