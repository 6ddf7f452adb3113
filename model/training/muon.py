"""Muon: momentum whose update is made orthogonal (Jordan et al. 2024, kellerjordan.github.io/posts/muon)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic, as published
STEPS = 5


class Muon(torch.optim.Optimizer):
    """For matrices alone. Updates have the size that AdamW's have, so its learning rates serve (Liu et al. 2025,
    arXiv:2502.16982, section 2.2); torch.optim.Muon with adjust_lr_fn="match_rms_adamw" does the same.

    All matrices of one shape are made orthogonal together: a small net has a hundred of them, and one by one they would
    take longer than its forward and backward pass.

    A group's `parts` says into how many matrices each of its parameters is cut by rows: 3 for a fused q, k, v.
    """

    def __init__(
        self, params: Iterable[Any], lr: float | Tensor = 1e-3, momentum: float = 0.95, weight_decay: float = 0.1
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "parts": 1})
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim != 2 or len(p) % group["parts"]:
                    raise ValueError(f"Muon takes matrices of whole parts, found shape {tuple(p.shape)}")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step from the parameters' gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        stacks: dict[tuple[Any, ...], list[tuple[Tensor, Tensor]]] = defaultdict(list)
        rates = {id(group["lr"]): group["lr"] for group in self.param_groups}
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            updates = self._updates(group, params)
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            for p, update in zip(params, updates, strict=True):
                for part, matrix in zip(p.chunk(group["parts"]), update.chunk(group["parts"]), strict=True):
                    stacks[(part.shape, part.device, id(group["lr"]))].append((part, matrix))
        for (shape, _, which), pairs in stacks.items():
            deltas = orthogonal(torch.stack([matrix for _, matrix in pairs]))
            scaled = deltas.mul_(-rates[which] * 0.2 * max(shape) ** 0.5).to(pairs[0][0].dtype)
            torch._foreach_add_([part for part, _ in pairs], list(scaled))
        return loss

    def _updates(self, group: dict[str, Any], params: list[Tensor]) -> list[Tensor]:
        """Nesterov's momentum."""
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        momenta = [self.state[p]["momentum"] for p in params]
        grads = [p.grad for p in params if p.grad is not None]
        torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
        return list(torch._foreach_lerp(grads, momenta, group["momentum"]))


def orthogonal(matrices: Tensor) -> Tensor:
    """Nearly orthogonal matrices by Newton and Schulz's iteration; shape = (batch, rows, columns), in and out.

    With U S V' for each matrix: U S' V', where S' is about 1 (0.7 to 1.2).
    """
    a, b, c = COEFFICIENTS
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = (matrices.mT if tall else matrices).to(torch.bfloat16 if matrices.is_cuda else torch.float32)
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def new_optimizers(net: nn.Module, kind: str, peak: float, fused: bool) -> list[torch.optim.Optimizer]:
    """AdamW for all that is trained, or Muon for the matrices inside the blocks and AdamW for the rest.

    kind : adamw | muon
    """
    trained = [(name, p) for name, p in net.named_parameters() if p.requires_grad]
    matrices = dict(trained if kind == "muon" else [])
    matrices = {name: p for name, p in matrices.items() if is_inner(name, p)}
    rest = [p for name, p in trained if name not in matrices]
    lr = adjustable(peak, rest[0].device)
    adamw = torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.01, fused=fused, capturable=fused)
    if not matrices:
        return [adamw]
    qkv = [p for name, p in matrices.items() if name.endswith("qkv.weight")]
    others = [p for name, p in matrices.items() if not name.endswith("qkv.weight")]
    return [adamw, Muon([{"params": qkv, "parts": 3}, {"params": others}] if qkv else others, lr=lr)]


def adjustable(peak: float, device: torch.device) -> float | Tensor:
    """A learning rate that an optimizer recorded in a CUDA graph can be given: a number on the device."""
    return torch.tensor(peak, device=device) if device.type == "cuda" else peak


def is_inner(name: str, parameter: Tensor) -> bool:
    """Whether a parameter is a matrix between hidden layers: not an embedding, a modulation, an input or an output."""
    inside = any(part in name for part in ("joint_blocks.", ".layers.", ".block."))
    apart = any(part in name for part in ("adaLN_modulation", "embed", "relative_attention_bias"))
    return parameter.ndim == 2 and inside and not apart
