"""Operations that fuse what PyTorch does in several passes over memory, each beside a plain twin.

The fused ones are written in Triton and run on CUDA; a machine without either runs the twins.
"""

from __future__ import annotations

import logging
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

log = logging.getLogger(__name__)


def fused(x: Tensor) -> bool:
    """Whether a tensor's operations run fused."""
    return x.is_cuda and has_triton(x.device)


@cache
def has_triton(device: torch.device) -> bool:
    """Whether Triton is installed and can compile for a device: it needs a C compiler and a folder to write to."""
    if find_spec("triton") is None:
        log.warning("Triton is not installed: plain operations are used, which are slower")
        return False
    try:
        from model.kernels import triton_kernels

        # A kernel without fp8, which GPUs before Ada have not: see fp8.has_fp8.
        ones = torch.ones(1, 1, 3, 1, 64, device=device)
        triton_kernels.joined_heads(ones, ones, None).sum().item()
    except Exception as problem:  # of Triton, of the compiler that it calls, of the driver
        log.warning("Triton does not work here, so plain operations are used, which are slower: %s", str(problem)[:500])
        return False
    return True
