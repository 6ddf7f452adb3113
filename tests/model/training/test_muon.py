"""Muon's update against torch's own, and which parameters it is given."""

from __future__ import annotations

import pytest
import torch

from model.config import MMDiTConfig
from model.training.demo import new_mmdit
from model.training.muon import Muon, is_inner, new_optimizers, orthogonal


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 48, 16), (2, 16, 48)])
def test_singular_values_come_close_to_one(shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonal(torch.randn(shape)))
    assert values.min() > 0.4
    assert values.max() < 1.3


def test_steps_are_those_of_torchs_own_muon() -> None:
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    torch.manual_seed(0)
    ours = [
        torch.randn(24, 16).requires_grad_(),
        torch.randn(24, 16).requires_grad_(),
        torch.randn(8, 8).requires_grad_(),
    ]
    theirs = [p.detach().clone().requires_grad_() for p in ours]
    before = [p.detach().clone() for p in ours]
    optimizers = (
        Muon(ours, lr=0.02, weight_decay=0.1),
        torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    )
    for _ in range(3):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn_like(mine)
            other.grad = mine.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for mine, other, start in zip(ours, theirs, before, strict=True):
        moved, wanted = (mine - start).detach(), (other - start).detach()
        assert torch.cosine_similarity(moved.flatten(), wanted.flatten(), dim=0) > 0.99  # theirs iterates in bf16
        assert moved.norm().item() == pytest.approx(wanted.norm().item(), rel=0.05)


def test_a_fused_matrix_moves_as_its_parts_would() -> None:
    torch.manual_seed(0)
    fused, grad = torch.randn(24, 8), torch.randn(24, 8)
    whole = fused.clone().requires_grad_()
    parts = [part.clone().requires_grad_() for part in fused.chunk(3)]
    whole.grad = grad
    for part, own in zip(parts, grad.chunk(3), strict=True):
        part.grad = own.clone()
    Muon([{"params": [whole], "parts": 3}]).step()
    Muon(parts).step()
    torch.testing.assert_close(whole, torch.cat(parts))


def test_a_vector_is_refused() -> None:
    with pytest.raises(ValueError, match=r"found shape \(3,\)"):
        Muon([torch.zeros(3, requires_grad=True)])


def test_only_matrices_between_hidden_layers_are_given_to_muon() -> None:
    mmdit = new_mmdit(MMDiTConfig(depth=2, hidden=64, heads=1, context_dim=8, pooled_dim=8, pos_embed_grid=4))
    adamw, muon = new_optimizers(mmdit, "muon", 1e-3, fused=False)
    given = {id(p) for group in muon.param_groups for p in group["params"]}
    names = {name for name, p in mmdit.named_parameters() if id(p) in given}
    assert "joint_blocks.0.x_block.attn.qkv.weight" in names
    assert "joint_blocks.0.context_block.mlp.fc2.weight" in names
    assert not any("adaLN" in name or "embedder" in name or "final_layer" in name for name in names)
    total = sum(len(group["params"]) for o in (adamw, muon) for group in o.param_groups)
    assert total == len(list(mmdit.parameters()))
    assert len(new_optimizers(mmdit, "adamw", 1e-3, fused=False)) == 1
    assert is_inner("encoder.block.0.layer.0.SelfAttention.q.weight", torch.zeros(2, 2))
