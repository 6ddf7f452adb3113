"""Several GPUs that train one set of weights: each learns from pictures of its own, and all step by the mean gradient.

`torchrun --nproc-per-node 4 -m model.training ...` starts a process for each GPU; without torchrun one is alone, and
each function here does nothing or gives back what it was given.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

PATIENCE = timedelta(minutes=3)
"""How long the others are waited for: one may compile longer than the rest."""


def join() -> None:
    """Meet the processes that torchrun started. To be called before anything asks for a GPU."""
    if "LOCAL_RANK" not in os.environ:
        return
    # Each process sees one GPU, its first: what is compiled for one then serves all.
    seen = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(int(os.environ["LOCAL_WORLD_SIZE"]))))
    os.environ["CUDA_VISIBLE_DEVICES"] = seen.split(",")[int(os.environ["LOCAL_RANK"])]
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=PATIENCE)


def leave() -> None:
    """The end of what `join` began."""
    if dist.is_initialized():
        dist.destroy_process_group()


def size() -> int:
    """How many processes train."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is, from 0 on."""
    return dist.get_rank() if dist.is_initialized() else 0


def leads() -> bool:
    """Whether this is the one that prints and writes files."""
    return rank() == 0


def agree(number: float) -> float:
    """The leader's number."""
    if size() == 1:
        return number
    told = torch.tensor(number, dtype=torch.float64)
    dist.broadcast(told, 0)
    return float(told)


def mean(number: float) -> float:
    """Over all processes."""
    if size() == 1:
        return number
    total = torch.tensor(number, dtype=torch.float64)
    dist.all_reduce(total)
    return float(total) / size()


@torch.no_grad()
def average(gradients: Sequence[Tensor]) -> None:
    """Put the mean over all processes in the place of each tensor."""
    if size() == 1 or not gradients:
        return
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    means = (flat / size()).split([gradient.numel() for gradient in gradients])
    shaped = [part.view_as(gradient) for part, gradient in zip(means, gradients, strict=True)]
    torch._foreach_copy_(list(gradients), shaped)


@torch.no_grad()
def share(tensors: Sequence[Tensor]) -> None:
    """Put the leader's values in the place of each tensor's."""
    if size() == 1 or not tensors:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.broadcast(flat, 0)
    parts = flat.split([tensor.numel() for tensor in tensors])
    torch._foreach_copy_(list(tensors), [part.view_as(t) for part, t in zip(parts, tensors, strict=True)])
