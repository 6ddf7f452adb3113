"""The fused operations between an MMDiT's matrix products: twins against the layers, Triton against the twins."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F

from model.kernels.elementwise import FP8, FP8_MAX, gelu_quantized, norm_heads, quantized


def test_rows_in_fp8_use_the_whole_range_of_the_format() -> None:
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)) * torch.tensor([1e-3, 1, 10, 1e4, 0])[:, None]
    rows = quantized(x)
    assert rows.values.dtype is FP8
    assert rows.values.float().abs().amax(1)[:4].tolist() == [FP8_MAX] * 4
    # A value has three bits behind the leading one: half a step is a sixteenth of it.
    assert ((rows.whole - x).abs() <= x.abs() / 16 + rows.scales / 512).all()


def test_gelu_is_taken_before_the_rounding() -> None:
    x = torch.randn(3, 7, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(gelu_quantized(x).values.float(), quantized(F.gelu(x, approximate="tanh")).values.float())


def test_values_are_not_normed() -> None:
    qkv = torch.randn(2, 9, 3, 2, 8, generator=torch.Generator().manual_seed(0))
    before = qkv.clone()
    after = norm_heads(qkv, torch.ones(2, 2, 8), 6)
    assert after is qkv
    assert torch.equal(after[:, :, 2], before[:, :, 2])
    torch.testing.assert_close(after[:, :, :2].square().mean(-1), torch.ones(2, 9, 2, 2))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")  # of Triton, about its own defaults
def test_what_shows_that_triton_works_compiles_for_gpus_without_fp8() -> None:
    triton = pytest.importorskip("triton", reason="no triton: pip install triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from model.kernels import triton_kernels

    kernel = triton_kernels._joined_heads_kernel
    tensors = {"image_qkv": "*fp32", "text_qkv": "*fp32", "weights": "*fp32", "out": "*fp32"}
    constants = {"HEADS": 1, "HEAD_DIM": 64, "EPS": 1e-6, "NORMED": False, "BLOCK": 1}
    signature = {n: "constexpr" if n in constants else tensors.get(n, "i32") for n in kernel.arg_names}
    where = {(kernel.arg_names.index(n),): value for n, value in constants.items()}
    compiled = triton.compile(ASTSource(kernel, signature, where), target=GPUTarget("cuda", 80, 32))
    assert "sm_80" in compiled.asm["ptx"]


@pytest.mark.slow
def test_triton_kernels_equal_the_plain_ones() -> None:
    if find_spec("triton") is None:
        pytest.skip("no triton: pip install triton")
    ran = subprocess.run(
        [sys.executable, "-m", "tests.model.compare_elementwise"],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert ran.returncode == 0, ran.stderr
    assert "320 wide, fp8" in ran.stdout
