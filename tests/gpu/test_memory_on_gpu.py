"""What Prometheus is told of a GPU's memory."""

from __future__ import annotations

import pytest
import torch

from worker.main import gpu_memory

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_memory_of_a_gpu_is_told_in_bytes() -> None:
    device = torch.device("cuda:0")
    kept = torch.empty(2**20, dtype=torch.float32, device=device)
    told = gpu_memory(device)
    assert kept.nbytes <= told["allocated"] <= told["reserved"] <= told["total"]
