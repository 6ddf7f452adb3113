"""The fast decoder and the fast text encoders on a real GPU: their kernels, their graphs, and their errors in bf16."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor

from model.config import VAEConfig
from model.fast_text import FastTextEncoders
from model.fast_vae import FastDecoder
from model.graphs import CudaRecorder, Graphs
from model.text import TextEncoders
from model.tuning import born
from model.vae import VAE
from tests.gpu.nets import tiny_encoders
from tests.model import tiny
from tests.model.compare_groupnorm import TOLERANCES, wrong

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE = torch.device("cuda")

CONFIGS = [tiny.TINY_VAE, VAEConfig()]
NAMES = ["tiny", "published"]

# In bf16 the fast ways round less often than the plain ones, but at other places: each error is a random one.
WORSE = 1.25


@pytest.fixture(autouse=True)
def _exact() -> Iterator[None]:
    """fp32 means fp32."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    with torch.inference_mode():
        yield
    torch.backends.cudnn.allow_tf32 = before


def vae_of(config: VAEConfig) -> VAE:
    vae = VAE(config).eval().requires_grad_(False)
    tiny.randomize(vae, seed=3)
    return vae.to(DEVICE)


def latents(*sides: int, batch: int = 1, seed: int = 0) -> Tensor:
    return torch.randn(batch, 16, *sides, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).abs().mean())


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_kernels_equal_their_twins(dtype: torch.dtype) -> None:
    assert not wrong(DEVICE, [dtype], lambda line: None)


@pytest.mark.parametrize("config", CONFIGS, ids=NAMES)
def test_decoder_equals_the_plain_one_in_fp32(config: VAEConfig) -> None:
    vae = vae_of(config)
    z = latents(24, 16, batch=2)
    expected = vae.to_pixels(z)
    found = FastDecoder(vae).decode(z)
    assert expected.float().std() > 5
    assert (found.int() - expected.int()).abs().max() <= 1
    assert (found != expected).float().mean() < 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("config", CONFIGS, ids=NAMES)
def test_decoder_is_no_further_from_fp32_than_the_plain_one(config: VAEConfig, dtype: torch.dtype) -> None:
    vae = vae_of(config)
    z = latents(64, 48)
    exact = vae.to_pixels(z)
    vae = vae.to(dtype)
    plain = error(vae.to_pixels(z), exact)
    assert error(FastDecoder(vae).decode(z), exact) < WORSE * plain


def test_strips_leave_no_seams() -> None:
    vae = vae_of(CONFIGS[0])
    z = latents(40, 24)
    whole = FastDecoder(vae).decode(z)  # fp32: that weights are folded in it changes nothing
    strips = FastDecoder(vae, max_pixels=1, strip_values=32 * 192 * 32).decode(z)
    assert (whole.int() - strips.int()).abs().max() <= 1
    assert (whole != strips).float().mean() < 1e-3


@pytest.mark.parametrize("strips", [False, True])
@pytest.mark.parametrize("config", CONFIGS, ids=NAMES)
def test_decoder_gives_the_same_bits_again_and_in_a_graph(config: VAEConfig, strips: bool) -> None:
    vae = vae_of(config).bfloat16()
    fast = FastDecoder(vae, max_pixels=1, strip_values=2**20) if strips else FastDecoder(vae)
    graphs = Graphs(CudaRecorder(DEVICE))
    pictures = [latents(32, 40, seed=seed) for seed in range(4)]
    alone = [fast.decode(z) for z in pictures]
    assert all(torch.equal(fast.decode(z), picture) for z, picture in zip(pictures, alone, strict=True))
    recorded = [graphs.run("decode", fast.decode, z) for z in pictures]
    assert graphs.held == 1
    assert all(map(torch.equal, recorded, alone))


@pytest.fixture
def texts() -> tuple[TextEncoders, TextEncoders]:
    """The same encoders in fp32 and in bf16."""
    with born(DEVICE, torch.float32):
        towers: list[Any] = [net.requires_grad_(False).eval() for net in tiny_encoders()]
    for seed, net in enumerate(towers):
        net.cpu()
        tiny.randomize(net, seed)
        net.to(DEVICE)
    tokenizers = (tiny.clip_tokenizer("<|endoftext|>"), tiny.clip_tokenizer("!"), tiny.t5_tokenizer())
    coarse = [deepcopy(net).bfloat16() for net in towers]
    exact = TextEncoders(*towers, tokenizers, tiny.CONTEXT_DIM)
    return exact, TextEncoders(*coarse, tokenizers, tiny.CONTEXT_DIM)


PROMPTS = ["a red cat", "", "The cat, the red CAT! 42"]


def stacked(text: TextEncoders | FastTextEncoders, prompts: list[str]) -> tuple[Tensor, Tensor]:
    found = text.encode(prompts, 80)
    return torch.stack([one.context for one in found]), torch.stack([one.pooled for one in found])


def test_texts_are_no_further_from_fp32_than_the_plain_ones(texts: tuple[TextEncoders, TextEncoders]) -> None:
    exact, coarse = texts
    for one, plain, fast in zip(
        *(stacked(text, PROMPTS) for text in (exact, coarse, FastTextEncoders(coarse))), strict=True
    ):
        assert error(fast, one) < WORSE * error(plain, one)


def test_texts_of_a_graph_are_those_without(texts: tuple[TextEncoders, TextEncoders]) -> None:
    _, coarse = texts
    graphs = Graphs(CudaRecorder(DEVICE))
    fast, recorded = FastTextEncoders(coarse), FastTextEncoders(coarse, graphs)
    for round in range(3):
        for count in (1, 2):
            prompts = [f"a red cat {round} {n}" for n in range(count)]
            assert all(map(torch.equal, stacked(recorded, prompts), stacked(fast, prompts)))
    assert graphs.held == 2
