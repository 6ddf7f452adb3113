"""Linear layers in fp8: weights and inputs in e4m3 with a factor for each row, products in bf16.

Only the image stream's large matrices are: modulation, embedders, the text stream and the final layer are small or
decide too much.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.kernels.elementwise import Rows, quantized

SCALES = "scales"
"""What the factors of a weight are called beside it."""

STREAM = ".x_block."
LAYERS = ("attn.qkv", "attn.proj", "attn2.qkv", "attn2.proj", "mlp.fc1", "mlp.fc2")


class Fp8Linear(nn.Module):
    """A linear layer whose weight is fp8."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """weight : in any precision, shape = (out, in)."""
        super().__init__()
        rows = quantized(weight)
        self.weight = nn.Parameter(rows.values, requires_grad=False)  # shape = (out, in), e4m3
        self.scales: Tensor
        self.register_buffer("scales", rows.scales)  # shape = (out, 1), fp32
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """shape = (..., in) -> (..., out)."""
        rows = quantized(x.flatten(0, -2))
        out = x.new_empty((len(rows.values), len(self.weight)))
        return self.product(rows, out).unflatten(0, x.shape[:-1])

    def product(self, x: Rows, out: Tensor) -> Tensor:
        """shape = (rows, in) -> (rows, out), of quantised rows."""
        if out.is_cuda:
            factors = (x.values, self.weight.t(), x.scales, self.scales.t())
            return torch._scaled_mm(*factors, bias=self.bias, out_dtype=out.dtype, use_fast_accum=True, out=out)
        bias = None if self.bias is None else self.bias.float()
        return out.copy_(F.linear(x.whole, self.weight.float() * self.scales, bias))


def is_fp8(name: str) -> bool:
    """Whether a layer of the MMDiT, by its name, is kept in fp8 where that is asked for."""
    return STREAM in name and name.endswith(LAYERS)


def use_fp8(mmdit: nn.Module) -> None:
    """Put fp8 layers in the places of those that may be; their weights are then gone."""
    for name, layer in list(mmdit.named_modules()):
        if isinstance(layer, nn.Linear) and is_fp8(name):
            parent, _, leaf = name.rpartition(".")
            setattr(mmdit.get_submodule(parent), leaf, Fp8Linear(layer.weight, layer.bias))


def has_fp8(device: torch.device) -> bool:
    """Whether a device multiplies fp8 matrices: Hopper and later, Ada too; a CPU does so slowly, in fp32."""
    return device.type == "cpu" or torch.cuda.get_device_capability(device) >= (8, 9)
