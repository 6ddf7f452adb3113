"""The fast decoder against the plain one, random weights, fp32 on the CPU, where its fused passes are plain."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model import fast_vae
from model.config import VAEConfig
from model.fast_vae import FastDecoder
from model.kernels import groupnorm
from model.vae import VAE
from tests.model import tiny

# Pixels are about 1, after some thirty convolutions whose sums run in another order.
TOLERANCE = 5e-5


def made(config: VAEConfig = tiny.TINY_VAE) -> VAE:
    vae = VAE(config).eval().requires_grad_(False)
    tiny.randomize(vae, seed=3)
    return vae


def latents(*sides: int, batch: int = 1) -> Tensor:
    return torch.randn(batch, 16, *sides, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def pixels(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What the fast decoder rounds, shape = (batch, h, w, 3), in about [-1, 1]."""
    seen: list[Tensor] = []
    rgb = groupnorm.rgb

    def kept(x: Tensor, bias: Tensor) -> Tensor:
        seen.append((x + F.pad(bias, (0, x.shape[-1] - len(bias))))[..., :3])
        return rgb(x, bias)

    monkeypatch.setattr(groupnorm, "rgb", kept)
    return seen


@pytest.mark.parametrize(
    "config",
    [tiny.TINY_VAE, VAEConfig(channels=(32, 64, 32), encoder_blocks=0), VAEConfig(channels=(32, 96), groups=16)],
    ids=["published shape", "one block a level", "96 channels"],
)
@pytest.mark.parametrize("fold", [True, False])
@torch.inference_mode()
def test_fast_equals_plain(config: VAEConfig, fold: bool, pixels: list[Tensor]) -> None:
    vae = made(config)
    z = latents(12, 8, batch=2)
    expected, levels = vae.decode(vae.from_model(z)), vae.to_pixels(z)
    found = FastDecoder(vae, fold=fold).decode(z)
    torch.testing.assert_close(pixels[0].permute(0, 3, 1, 2), expected, atol=TOLERANCE, rtol=TOLERANCE)
    assert expected.std() > 0.1
    assert (found.shape, found.dtype) == (levels.shape, torch.uint8)
    # One level where a value lies between two.
    assert (found.int() - levels.int()).abs().max() <= 1
    assert (found != levels).float().mean() < 1e-3


@pytest.mark.parametrize("strip_values", [1, 7 * 64 * 32, 20 * 64 * 32], ids=["lines", "odd strips", "some"])
@torch.inference_mode()
def test_strips_leave_no_seams(strip_values: int, pixels: list[Tensor]) -> None:
    """The same values as at once, up to the order of sums in a convolution, at seams as elsewhere."""
    vae = made()
    z = latents(9, 8, batch=2)
    FastDecoder(vae).decode(z)
    found = FastDecoder(vae, max_pixels=71 * 64, strip_values=strip_values).decode(z)
    assert found.shape == (2, 72, 64, 3)
    at_once, *in_strips = pixels
    torch.testing.assert_close(torch.cat(in_strips), at_once, atol=TOLERANCE, rtol=TOLERANCE)


@torch.inference_mode()
def test_strips_without_a_sum_before_the_upsampling(pixels: list[Tensor]) -> None:
    vae = made(VAEConfig(channels=(32, 64, 32), encoder_blocks=0))
    z = latents(6, 5)
    expected = vae.decode(vae.from_model(z)).permute(0, 2, 3, 1)
    FastDecoder(vae, max_pixels=1, strip_values=3 * 20 * 64).decode(z)
    torch.testing.assert_close(pixels[0], expected, atol=TOLERANCE, rtol=TOLERANCE)


@torch.inference_mode()
def test_plain_decoder_still_gives_its_pictures() -> None:
    """It shares the weights, which lie in memory in another order now."""
    vae = made()
    z = latents(6, 8)
    expected = vae.decode(z)
    before = {name: tensor.clone() for name, tensor in vae.state_dict().items()}
    FastDecoder(vae)
    torch.testing.assert_close(vae.decode(z), expected, atol=TOLERANCE, rtol=TOLERANCE)
    assert all(torch.equal(tensor, before[name]) for name, tensor in vae.state_dict().items())


def test_weights_are_held_once() -> None:
    vae = made()
    net = vae.decoder
    fast = FastDecoder(vae)
    of_net = {parameter.data_ptr() for parameter in net.parameters()}
    assert FastDecoder(vae).vae is vae
    assert {parameter.data_ptr() for parameter in net.parameters()} == of_net  # a second one moves nothing
    own = [value for value in vars(fast).values() if isinstance(value, Tensor)]
    own += list(fast._biases.values())
    assert sum(one.nbytes for one in fast._folded.values()) < 0.25 * sum(one.nbytes for one in net.parameters())
    assert sum(tensor.nbytes for tensor in own) < 0.05 * sum(parameter.nbytes for parameter in net.parameters())


def test_folded_convolution_is_that_of_the_doubled_picture() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, 8, 5, 7, generator=generator), torch.randn(6, 8, 3, 3, generator=generator)
    expected = F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, padding=1)
    corners = F.conv2d(x, fast_vae.folded(weight), padding=1).permute(0, 2, 3, 1).contiguous()
    found, parts = groupnorm.woven(corners)
    torch.testing.assert_close(found.permute(0, 3, 1, 2), expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(parts, groupnorm.statistics(found))


@pytest.mark.parametrize("queries", [1, 7, 40])
def test_attention_in_parts_equals_torchs(queries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_vae, "MAX_QUERIES", queries)
    q, k, v = torch.randn(2, 35, 3 * 64, generator=torch.Generator().manual_seed(0)).chunk(3, dim=-1)
    expected = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
    torch.testing.assert_close(fast_vae.attention(q, k, v), expected, atol=1e-5, rtol=1e-5)


def test_scores_stay_within_their_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    softmax = groupnorm.softmax

    def watched(scores: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
        seen.append(scores.nbytes)
        return softmax(scores, scale, dtype)

    monkeypatch.setattr(groupnorm, "softmax", watched)
    q = torch.randn(1, 100, 8)
    fast_vae.attention(q, q, q, scores_bytes=4 * 100 * 13)
    assert max(seen) == 4 * 100 * 13
    assert sum(seen) == 4 * 100 * 100


class Held(TorchDispatchMode):
    """The most bytes that tensors made meanwhile held at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self._tensors: list[weakref.ref[Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self._tensors += [weakref.ref(one) for one in tree_leaves((made, args)) if isinstance(one, Tensor)]
        alive = [one for ref in self._tensors if (one := ref()) is not None]
        self._tensors = [weakref.ref(one) for one in alive]
        storages = {one.untyped_storage()._cdata: one.untyped_storage().nbytes() for one in alive}
        self.most = max(self.most, sum(storages.values()))
        return made


@pytest.mark.parametrize("side", [1024, 2048])
@torch.inference_mode()
def test_memory_is_what_the_docstring_says(side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the published shape in bf16, without running it; the fused passes make what the kernels make."""

    def made(x: Tensor, *_: object, out: Tensor | None = None, **__: object) -> Tensor:
        return torch.empty_like(x) if out is None else out

    def added(x: Tensor, h: Tensor, bias: object, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return made(x, out=out), groupnorm.statistics(x)

    def statistics(x: Tensor) -> Tensor:
        return x.new_empty((len(x), 640, 3, x.shape[-1]), dtype=torch.float32)

    def upsampled(x: Tensor, *_: object) -> Tensor:
        return x.new_empty((len(x), 2 * x.shape[1], 2 * x.shape[2], x.shape[3]))

    def softmax(scores: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
        return torch.empty_like(scores, dtype=dtype)

    def conv(x: Tensor, weight: Tensor, padding: tuple[int, int] = (1, 1)) -> Tensor:
        """Torch's own has its channels first on this device, which a copy would correct."""
        off = weight.shape[2] - 1
        return x.new_empty((len(x), x.shape[1] + 2 * padding[0] - off, x.shape[2] + 2 - off, len(weight)))

    def woven(x: Tensor) -> tuple[Tensor, Tensor]:
        y = x.new_empty((len(x), 2 * x.shape[1] - 2, 2 * x.shape[2] - 2, x.shape[3] // 4))
        return y, statistics(y)

    monkeypatch.setattr(fast_vae, "_conv", conv)
    fakes = {"apply": made, "add": added, "statistics": statistics, "add_upsampled": upsampled, "softmax": softmax}
    fakes["woven"] = woven
    for name, fake in fakes.items():
        monkeypatch.setattr(groupnorm, name, fake)
    with torch.device("meta"):
        vae = VAE(VAEConfig()).bfloat16().requires_grad_(False)
        z = torch.empty(1, 16, side // 8, side // 8)
    fast = FastDecoder(vae)
    unit, strip = side * side * 128 * 2, 2 * fast_vae.STRIP_VALUES
    weights = sum(parameter.nbytes for parameter in vae.decoder.parameters())
    with Held() as held:
        fast.decode(z)
    expected = 5 * unit if side == 1024 else 3 * unit + 3 * strip
    assert 0.95 * expected < held.most < 1.05 * expected + weights + 2**24
