"""Low-rank changes of a frozen MMDiT, trainable, and as the file that `model.lowrank` reads."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from model.config import MMDiTConfig
from model.keys import mmdit_rules
from model.lowrank import BIAS, PREFIX, A, B
from model.mmdit import MMDiT


class LowRankLinear(nn.Module):
    """A frozen linear layer and a change of it, which begins as none: (W + B A) x + b + c (LoRA, arXiv:2106.09685).

    parts : pairs, each for an equal block of the rows: q, k and v of a fused projection have one each
    """

    def __init__(self, linear: nn.Linear, rank: int, parts: int = 1) -> None:
        super().__init__()
        rows, columns = linear.weight.shape
        self.register_buffer("weight", linear.weight.detach())
        self.register_buffer("bias", linear.bias.detach())
        self.weight: Tensor
        self.bias: Tensor
        self.a = nn.Parameter(torch.randn(parts, rank, columns) / columns**0.5)
        self.b = nn.Parameter(torch.zeros(parts, rows // parts, rank))
        self.c = nn.Parameter(torch.zeros(rows))

    def forward(self, x: Tensor) -> Tensor:
        """shape = (..., in) -> (..., out)."""
        # Merged first: a change of the weights costs less than three products with every token.
        return F.linear(x, self.weight + (self.b @ self.a).flatten(0, 1), self.bias + self.c)


def adapted(mmdit: MMDiT, rank: int) -> MMDiT:
    """A copy whose linear layers can change by `rank`, modulations by half of it; all else is frozen."""
    student = copy.deepcopy(mmdit).requires_grad_(False)
    sources = {rule.name: rule.sources for rule in mmdit_rules(mmdit.config)}
    for name, module in list(student.named_modules()):
        if isinstance(module, nn.Linear):
            # A modulation is wide, but what it reads differs by timestep and prompt only.
            own_rank = max(1, rank // 2) if "adaLN_modulation" in name else rank
            parent, _, attribute = name.rpartition(".")
            layer = LowRankLinear(module, own_rank, parts=len(sources[f"{name}.weight"]))
            setattr(student.get_submodule(parent), attribute, layer)
    return student


def save_difference(state: dict[str, Tensor], config: MMDiTConfig, path: Path) -> int:
    """Writes a trained change, by the names of `adapted`'s parameters, as diffusers and PEFT have it; in 16 bit.

    Returns the file's bytes.
    """
    tensors: dict[str, Tensor] = {}
    rules = {rule.name: rule for rule in mmdit_rules(config)}
    for name in sorted(name.removesuffix(".a") for name in state if name.endswith(".a")):
        weight, bias = rules[f"{name}.weight"], rules[f"{name}.bias"]
        rows = weight.scatter(state[f"{name}.b"].flatten(0, 1))
        for source, columns in zip(weight.sources, state[f"{name}.a"], strict=True):
            module = PREFIX + source.removesuffix(".weight")
            tensors[module + A], tensors[module + B] = columns, rows[source]
        for source, change in bias.scatter(state[f"{name}.c"]).items():
            tensors[PREFIX + source.removesuffix(".bias") + BIAS] = change
    stored = {key: tensor.detach().to("cpu", torch.float16, copy=True).contiguous() for key, tensor in tensors.items()}
    save_file(stored, path, metadata={"format": "pt"})
    path.chmod(0o644)
    return path.stat().st_size
