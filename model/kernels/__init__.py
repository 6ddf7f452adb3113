"""Operations that fuse what PyTorch does in several passes over memory, each beside a plain twin.

The fused ones are written in Triton and run on CUDA; a machine without either runs the twins.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

from torch import Tensor


@cache
def has_triton() -> bool:
    """Whether Triton is installed."""
    return find_spec("triton") is not None


def fused(x: Tensor) -> bool:
    """Whether a tensor's operations run fused."""
    return x.is_cuda and has_triton()
