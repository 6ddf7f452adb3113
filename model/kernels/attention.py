"""Softmax attention without mask, by the backend that is fastest for a shape.

FlashAttention-3 (Shah et al. 2024, arXiv:2407.08608) comes with the optional package fa3-fwd, for Hopper alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

BACKENDS = ("default", "cudnn", "fa3")


def attend(backend: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of all queries over all keys.

    q, k, v : shape = (batch, tokens, heads, head_dim); only the last axis must be contiguous
    returns : shape = (batch, queries, heads * head_dim)
    """
    if backend == "fa3":
        made = _fa3()(q, k, v)
        return (made[0] if isinstance(made, tuple) else made).flatten(2)
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    if backend == "default":
        attended = F.scaled_dot_product_attention(q, k, v)
    else:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            attended = F.scaled_dot_product_attention(q, k, v)
    return attended.transpose(1, 2).flatten(2)


@cache
def backends(device: torch.device) -> tuple[str, ...]:
    """Those that a device has."""
    if device.type != "cuda":
        return BACKENDS[:1]
    hopper = torch.cuda.get_device_capability(device) == (9, 0)
    return BACKENDS if hopper and find_spec("fa3_fwd_interface") else BACKENDS[:2]


@cache
def _fa3() -> Callable[..., Any]:
    """Some versions give the sums beside the result."""
    from fa3_fwd_interface import flash_attn_func

    return flash_attn_func  # type: ignore[no-any-return]
