"""The fast way through the MMDiT beside its plain twin, in fp32 on the CPU: the same but for the order of sums."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.config import MMDiTConfig
from model.embeddings import Text
from model.fast_mmdit import TOGETHER, Choice, Conditions, FastMMDiT
from model.fp8 import Fp8Linear, is_fp8, use_fp8
from model.kernels.elementwise import FP8
from model.mmdit import MMDiT

RUN = tuple(1 - n / 20 for n in range(20))
PLAIN = MMDiTConfig(depth=3, hidden=128, heads=2, context_dim=96, pooled_dim=48, pos_embed_grid=16)
DUAL = MMDiTConfig(depth=3, hidden=128, heads=2, context_dim=96, pooled_dim=48, pos_embed_grid=16, dual_blocks=(0, 1))
UNNORMED = MMDiTConfig(depth=2, hidden=128, heads=2, context_dim=96, pooled_dim=48, pos_embed_grid=16, qk_norm=False)
CHOICES = (Choice(), Choice(apart=True), Choice(mlp_apart=True), Choice(beside=True))


def random_mmdit(config: MMDiTConfig) -> MMDiT:
    torch.manual_seed(0)
    mmdit = MMDiT(config).requires_grad_(False).eval()
    for parameter in mmdit.parameters():
        parameter.normal_(0, 0.1)
    mmdit.pos_embed.normal_()
    return mmdit


def random_texts(count: int) -> list[Text]:
    generator = torch.Generator().manual_seed(1)
    return [
        Text(torch.randn(10, 96, generator=generator), torch.randn(48, generator=generator), ()) for _ in range(count)
    ]


def both(mmdit: MMDiT, sigmas: tuple[float, ...], choice: Choice) -> tuple[Tensor, Tensor]:
    """What the plain twin gives for a batch of pictures of 8 x 12 patches' latents, and what the fast way does."""
    texts = random_texts(len(sigmas))
    x = torch.randn(len(sigmas), 16, 8, 12, generator=torch.Generator().manual_seed(2))
    plain = mmdit(
        x,
        1000 * torch.tensor(sigmas),
        torch.stack([text.context for text in texts]),
        torch.stack([text.pooled for text in texts]),
    )
    fast = FastMMDiT(mmdit)
    conditions = Conditions(fast)
    modulation = torch.stack([conditions.modulation(t, s, RUN) for t, s in zip(texts, sigmas, strict=True)])
    context = torch.stack([conditions.context(text) for text in texts])
    return plain, fast(x, modulation, context, choice)


def apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / one.norm())


@pytest.mark.parametrize("choice", CHOICES, ids=str)
@pytest.mark.parametrize("config", [PLAIN, DUAL, UNNORMED], ids=["plain", "dual", "unnormed"])
def test_the_fast_way_gives_what_the_plain_one_gives(config: MMDiTConfig, choice: Choice) -> None:
    plain, fast = both(random_mmdit(config), (RUN[4], RUN[17]), choice)
    assert apart(plain, fast) < 1e-5  # fp32 sums in another order


@pytest.mark.parametrize("choice", CHOICES[:2], ids=str)
def test_fp8_goes_the_fast_way_as_it_goes_the_plain_one(choice: Choice) -> None:
    mmdit = random_mmdit(DUAL)
    exact, _ = both(mmdit, (RUN[4], RUN[17]), choice)
    use_fp8(mmdit)
    plain, fast = both(mmdit, (RUN[4], RUN[17]), choice)
    # A value at the edge between two of fp8's steps falls to either side; each step is an eighth of its size.
    assert apart(plain, fast) < 0.02
    assert apart(exact, fast) < 0.1


def test_only_the_image_streams_products_are_fp8() -> None:
    mmdit = random_mmdit(DUAL)
    use_fp8(mmdit)
    low = {name for name, parameter in mmdit.named_parameters() if parameter.dtype is FP8}
    assert low == {
        f"joint_blocks.{n}.x_block.{layer}.weight"
        for n in range(3)
        for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "attn2.qkv", "attn2.proj")
        if n in DUAL.dual_blocks or "attn2" not in layer
    }
    assert not is_fp8("joint_blocks.0.context_block.attn.qkv")
    assert all(isinstance(mmdit.get_submodule(name.removesuffix(".weight")), Fp8Linear) for name in low)


def test_sigmas_of_one_run_are_modulated_together_and_kept() -> None:
    calls = []

    class Counting(FastMMDiT):
        def modulation(self, sigmas: Tensor, pooled: Tensor) -> Tensor:
            calls.append(len(sigmas))
            return super().modulation(sigmas, pooled)

    conditions = Conditions(Counting(random_mmdit(PLAIN)))
    (text,) = random_texts(1)
    for sigma in RUN:
        conditions.modulation(text, sigma, RUN)
    assert calls == [TOGETHER, TOGETHER]


def test_a_modulation_is_the_same_bits_whatever_run_asked_for_it() -> None:
    fast = FastMMDiT(random_mmdit(PLAIN))
    (text,) = random_texts(1)
    first = Conditions(fast).modulation(text, RUN[3], RUN)
    other = Conditions(fast).modulation(text, RUN[3], (RUN[3], 0.01))
    assert torch.equal(first, other)


def test_conditions_hold_no_more_than_their_limit() -> None:
    fast = FastMMDiT(random_mmdit(PLAIN))
    conditions = Conditions(fast, limit=40 * 4 * fast.width)
    for text in random_texts(5):
        for sigma in RUN:
            conditions.modulation(text, sigma, RUN)
    assert len(conditions._modulations) <= 40
