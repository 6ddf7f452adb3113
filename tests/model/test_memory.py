"""The memory plan: its formulas are the nets' own sizes, and it picks what it says that it picks."""

from __future__ import annotations

import pytest
import torch

from model import memory
from model.config import VARIANTS, MMDiTConfig, VAEConfig
from model.memory import ARRANGEMENTS, CARDS, MODELS, MemoryPlan, choose_encoders, mmdit_bytes, mmdit_numbers
from model.mmdit import MMDiT
from model.vae import VAE
from tests.gpu.nets import full_encoders
from tests.model import tiny

GB = 10**9
OTHER = MMDiTConfig(depth=3, hidden=64, heads=4, context_dim=96, pooled_dim=48, pos_embed_grid=8, qk_norm=False,
                    mlp_ratio=3, in_channels=8, patch=4, dual_blocks=(1,))  # fmt: skip
CONFIGS = {name: spec.mmdit for name, spec in VARIANTS.items()} | {"tiny": tiny.MMDIT_X, "other": OTHER}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_numbers_of_an_mmdit_are_those_of_the_net(name: str) -> None:
    with torch.device("meta"):
        net = MMDiT(CONFIGS[name])
    assert mmdit_numbers(CONFIGS[name]) == sum(tensor.numel() for tensor in net.state_dict().values())


@pytest.mark.parametrize("name", CONFIGS)
def test_the_bytes_in_fp8_are_those_of_the_image_streams_linears(name: str) -> None:
    with torch.device("meta"):
        net = MMDiT(CONFIGS[name])
    small = {
        f"joint_blocks.{block}.x_block.{part}.weight"
        for block in range(CONFIGS[name].depth)
        for part in ("attn.qkv", "attn.proj", "attn2.qkv", "attn2.proj", "mlp.fc1", "mlp.fc2")
    }
    sizes = [
        tensor.numel() + 4 * tensor.shape[0] if key in small else 2 * tensor.numel()
        for key, tensor in net.state_dict().items()
    ]
    assert mmdit_bytes(CONFIGS[name], "fp8") == sum(sizes)


def test_the_numbers_of_encoders_and_vae_are_those_of_the_nets() -> None:
    with torch.device("meta"):
        sizes = [sum(p.numel() for p in net.parameters()) for net in (*full_encoders(), VAE(VAEConfig()))]
    assert sizes == [*memory.PUBLISHED.values(), memory.VAE_NUMBERS]


CHOSEN = {
    ("large", 12): None,
    ("large", 16): ("fp8, encoders offloaded", 512),
    ("large", 24): ("bf16, encoders offloaded", 1024),
    ("large", 40): ("bf16, encoders on the GPU", 1024),
    ("medium", 12): ("bf16, encoders offloaded", 1024),
    ("medium", 16): ("bf16, encoders offloaded", 1024),
    ("medium", 24): ("bf16, encoders on the GPU", 1024),
    ("large,medium", 24): ("fp8, encoders offloaded", 1024),
    ("large,medium", 40): ("bf16, encoders on the GPU", 1024),
    ("large,large-turbo,medium", 24): None,
    ("large,large-turbo,medium", 40): ("fp8, encoders offloaded", 1024),
    ("large,large-turbo,medium", 48): ("bf16, encoders offloaded", 1024),
    ("large,large-turbo,medium", 80): ("bf16, encoders on the GPU", 1024),
}


@pytest.mark.parametrize(("models", "card"), CHOSEN)
def test_a_card_gets_the_first_arrangement_that_fits(models: str, card: int) -> None:
    need = MemoryPlan.of(models.split(","), card * GB).chosen
    assert (need and (need.arrangement.title, need.side)) == CHOSEN[models, card]


@pytest.mark.parametrize("models", [["large"], ["medium"], ["large", "medium"], list(MODELS), ["large", "large"]])
@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("host", [None, 4 * GB, 16 * GB])
def test_a_plan_fits_and_nothing_before_it_does(models: list[str], card: int, host: int | None) -> None:
    plan = MemoryPlan.of(models, card * GB, host)
    before = plan.needs if plan.chosen is None else plan.needs[: plan.needs.index(plan.chosen)]
    assert not any(plan.fits(need) for need in before)
    if plan.chosen is not None:
        assert plan.chosen.total <= card * GB
        assert plan.chosen.arrangement.title in plan.why
    else:
        assert plan.why.startswith("Nothing fits: even ")


def test_a_host_without_room_for_t5_goes_without_it() -> None:
    plan = MemoryPlan.of(["large"], 24 * GB, host=4 * GB)
    assert plan.chosen is not None
    assert plan.chosen.arrangement.settings == {"DARKROOM_TEXT_ENCODERS": "gpu", "DARKROOM_T5": "no"}
    assert plan.why == (
        "bf16, encoders on the GPU, without T5, for pictures to 1024x1024, is the first that fits; bf16, encoders on "
        "the GPU would need 31.7 GB of the GPU. Without T5 prompts are understood less well."
    )


def test_each_arrangement_says_what_to_set() -> None:
    assert len({str(arrangement.settings) for arrangement in ARRANGEMENTS}) == len(ARRANGEMENTS)


@pytest.mark.parametrize("models", [[], ["small"], ["large", "demo"]])
def test_other_models_cannot_be_planned_for(models: list[str]) -> None:
    with pytest.raises(ValueError, match="known: large, large-turbo, medium"):
        MemoryPlan.of(models, GB)


@pytest.mark.parametrize(("free", "place"), [(None, "gpu"), (32 * GB, "gpu"), (31 * GB, "offload"), (GB, "offload")])
def test_a_worker_offloads_encoders_where_a_picture_would_not_fit_beside_them(free: int | None, place: str) -> None:
    assert choose_encoders(16_500_000_000, 11_200_000_000, free) == place
