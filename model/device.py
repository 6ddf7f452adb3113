"""The GPU that a thread works on."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def on(device: torch.device) -> AbstractContextManager[object]:
    """In it, a GPU is the thread's own: Triton launches there, whatever device its tensors are on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
