"""The Triton kernels of model.kernels.elementwise against their twins in Triton's interpreter.

    TRITON_INTERPRET=1 python -m tests.model.compare_elementwise

In fp32 alone: the interpreter cuts bf16 and fp8 where GPUs round. On a GPU see tests/gpu/test_fast_mmdit_on_gpu.py.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from torch import Tensor

from model.kernels import elementwise, triton_kernels
from model.kernels.elementwise import Branch, Modulated, Rows

BATCH, IMAGE, TEXT, HEAD_DIM = 2, 6, 3, 64
HEADS = (2, 3, 5)
"""Widths of 128, 192 and 320: one full tile, two full ones, and one that is partly empty."""

ROUNDING = 2e-6
FP8_STEP = 0.12  # of a value, cut


def differences(heads: int) -> Iterator[tuple[str, float, float]]:
    """A name, the relative distance of kernel and twin, and what it may be."""
    generator = torch.Generator().manual_seed(heads)
    hidden = heads * HEAD_DIM

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    x, parts = random(BATCH, IMAGE, hidden), random(BATCH, 6 * hidden).split(hidden, dim=1)
    joint = random(BATCH, IMAGE + TEXT, hidden)
    added = [Branch(parts[0], joint[:, :IMAGE], random(hidden)), Branch(parts[1], random(BATCH, IMAGE, hidden))]
    ways = [Modulated(parts[2], parts[3]), Modulated(parts[4], parts[5])]
    for branches in range(3):
        for wanted in range(3):
            given = x, added[:branches], ways[:wanted]
            right, right_made = elementwise.add_and_norm(*given)
            out, made = triton_kernels.add_and_norm(*given, fp8=False)
            _, rows = triton_kernels.add_and_norm(*given, fp8=True)
            name = f"{hidden} wide, {branches} branches, {wanted} modulations"
            yield name, apart(out, right), ROUNDING
            for plain, low, other in zip(made, rows, right_made, strict=True):
                assert isinstance(low, Rows)
                yield name, apart(plain, other), ROUNDING
                yield f"{name}, fp8", apart(low, other), FP8_STEP
    image, text = random(BATCH, IMAGE, 3, heads, HEAD_DIM), random(BATCH, TEXT, 3, heads, HEAD_DIM)
    weights, joint_heads = random(2, 2, HEAD_DIM), torch.cat([image, text], dim=1)
    for normed in (weights, None):
        found, right = (way.joined_heads(image, text, normed) for way in (triton_kernels, elementwise))
        yield f"{heads} heads, {'no ' if normed is None else ''}norm, joined", apart(found, right), ROUNDING
    for name, qkv in (("text", joint_heads), ("no text", image)):
        found, right = (way.norm_heads(qkv.clone(), weights, IMAGE) for way in (triton_kernels, elementwise))
        yield f"{heads} heads, {name}, in place", apart(found, right), ROUNDING
    for gelu, plain_way in ((False, elementwise.quantized), (True, elementwise.gelu_quantized)):
        found, right = triton_kernels.quantized(3 * joint[:, :IMAGE], gelu), plain_way(3 * joint[:, :IMAGE])
        yield f"{hidden} wide, scales", apart(found.scales, right.scales), 1e-5
        yield f"{hidden} wide, fp8", apart(found, right), FP8_STEP


def apart(found: object, right: object) -> float:
    """The relative L2 distance."""
    one, other = (x.whole if isinstance(x, Rows) else x for x in (found, right))
    assert isinstance(one, Tensor)
    assert isinstance(other, Tensor)
    assert one.shape == other.shape
    return float((one - other).norm() / other.norm())


if __name__ == "__main__":
    lines = [(f"{name}: {far:.2g}", far <= most) for heads in HEADS for name, far, most in differences(heads)]
    sys.stdout.write("\n".join(line for line, _ in lines))
    sys.exit("\n".join(line for line, right in lines if not right) or 0)
