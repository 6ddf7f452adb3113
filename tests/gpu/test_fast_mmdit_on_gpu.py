"""The fused kernels and CUDA graphs on a real GPU, beside their plain twins."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from model.config import VARIANTS, MMDiTConfig
from model.fast_mmdit import Choice, FastMMDiT, gelu_product
from model.fp8 import use_fp8
from model.graphs import CudaRecorder, Graphs
from model.kernels import elementwise
from model.kernels.attention import attend, backends
from model.tuning import random_mmdit

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CUDA = torch.device("cuda")
DTYPES = {torch.float32: 1e-5, torch.bfloat16: 8e-3}
"""And how far apart, by relative L2: bf16 rounds to 8 bits, the twins several times."""


def apart(one: Tensor, other: Tensor) -> float:
    return float((one.float() - other.float()).norm() / other.float().norm())


def random(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, device=CUDA).to(dtype)


def twin(function: Callable[..., object], *arguments: object) -> object:
    """The plain function on the CPU in fp32."""

    def moved(x: object) -> object:
        if isinstance(x, Tensor):
            return x.float().cpu()
        if isinstance(x, tuple | list):
            made = [moved(y) for y in x]
            return type(x)(*made) if hasattr(x, "_fields") else type(x)(made)
        return x

    return function(*[moved(argument) for argument in arguments])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [192, 1536, 2432])
@pytest.mark.parametrize("branches", [0, 1, 2])
@pytest.mark.parametrize("wanted", [1, 2])
def test_add_and_norm(dtype: torch.dtype, hidden: int, branches: int, wanted: int) -> None:
    batch, tokens, others = 2, 37, 5
    x = random(batch, tokens, hidden, dtype=dtype)
    table = random(batch, 6 * hidden, dtype=dtype)
    parts = table.split(hidden, dim=1)
    joint = random(batch, tokens + others, hidden, dtype=dtype)
    added = [
        elementwise.Branch(parts[0], joint[:, :tokens]),
        elementwise.Branch(parts[1], torch.flip(x, [1]), parts[5][0]),
    ]
    mods = [elementwise.Modulated(parts[2], parts[3]), elementwise.Modulated(parts[4], parts[5])]
    out, made = elementwise.add_and_norm(x, added[:branches], mods[:wanted])
    right, right_made = twin(elementwise.add_and_norm, x, added[:branches], mods[:wanted])  # type: ignore[misc]
    assert apart(out.cpu(), right) < DTYPES[dtype]
    for one, other in zip(made, right_made, strict=True):
        assert apart(one.cpu(), other) < DTYPES[dtype]
    _, rows = elementwise.add_and_norm(x, added[:branches], mods[:wanted], fp8=True)
    for one, other in zip(rows, right_made, strict=True):
        assert apart(one.whole.cpu(), other) < 0.04


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "width"), [(3, 64), (24, 64), (38, 64), (4, 48)])
def test_heads_are_joined_and_normed(dtype: torch.dtype, heads: int, width: int) -> None:
    image, text = random(2, 19, 3, heads, width, dtype=dtype), random(2, 7, 3, heads, width, dtype=dtype)
    weights = random(2, 2, width, dtype=dtype)
    right = twin(elementwise.joined_heads, image, text, weights)
    assert isinstance(right, Tensor)
    assert apart(elementwise.joined_heads(image, text, weights).cpu(), right) < DTYPES[dtype]
    joined = torch.cat([image, text], dim=1)
    assert apart(elementwise.norm_heads(joined, weights, 19).cpu(), right) < DTYPES[dtype]


@pytest.mark.parametrize("width", [192, 2432, 9728])
def test_rows_are_quantised(width: int) -> None:
    x = random(33, width, dtype=torch.bfloat16)
    for function in (elementwise.quantized, elementwise.gelu_quantized):
        rows = function(x)
        right = twin(function, x)
        assert isinstance(right, elementwise.Rows)
        assert rows.values.dtype is elementwise.FP8
        assert apart(rows.whole.cpu(), right.whole) < 2e-2  # a value between two of fp8's falls to either
        assert torch.allclose(rows.scales.cpu(), right.scales, rtol=1e-5)


def test_gelu_in_the_products_epilogue_is_the_tanh_form() -> None:
    layer = torch.nn.Linear(1536, 6144, device=CUDA, dtype=torch.bfloat16).requires_grad_(False)
    x = random(1024, 1536, dtype=torch.bfloat16)
    exact = torch.nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double())
    tanh = torch.nn.functional.gelu(exact, approximate="tanh")
    assert apart(gelu_product(layer, x, x.new_empty(1024, 6144)), tanh) < 5e-3


@pytest.mark.parametrize("tokens", [141 + 1024, 333 + 4096])
def test_every_backend_attends(tokens: int) -> None:
    q, k, v = random(2, tokens, 3, 4, 64, dtype=torch.bfloat16).unbind(2)
    right = torch.nn.functional.scaled_dot_product_attention(*(t.float().transpose(1, 2) for t in (q, k, v)))
    for backend in backends(CUDA):
        assert apart(attend(backend, q, k, v), right.transpose(1, 2).flatten(2)) < 6e-3, backend


def inputs(fast: FastMMDiT, rows: int, height: int, width: int, text: int = 77) -> tuple[Tensor, Tensor, Tensor]:
    return (
        random(rows, 16, height, width, dtype=torch.bfloat16),
        0.5 * random(rows, fast.width, dtype=torch.bfloat16),
        random(rows, text, fast.config.hidden, dtype=torch.bfloat16),
    )


SMALL = MMDiTConfig(
    depth=4, hidden=384, heads=6, context_dim=256, pooled_dim=192, pos_embed_grid=96, dual_blocks=(0, 1)
)
CHOICES = [
    Choice(attention, apart_, apart_, beside) for attention in ("cudnn", "fa3") for apart_ in (False, True)
    for beside in (False, True)
]  # fmt: skip


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize("choice", CHOICES, ids=str)
@torch.inference_mode()
def test_a_graph_gives_what_its_kernels_give_bit_for_bit(choice: Choice, fp8: bool) -> None:
    if choice.attention not in backends(CUDA):
        pytest.skip(f"needs {choice.attention}")
    mmdit = random_mmdit(SMALL, CUDA)
    if fp8:
        use_fp8(mmdit)
    fast = FastMMDiT(mmdit)
    run = partial(fast, choice=choice)
    given, other = inputs(fast, 2, 64, 48), inputs(fast, 2, 64, 48)
    recording = CudaRecorder(CUDA)(run, *given)
    for those in (given, other, given):
        assert torch.equal(recording(*those), run(*those))


@torch.inference_mode()
def test_a_failed_capture_leaves_the_next_ones_in_order() -> None:
    record, side = CudaRecorder(CUDA, warm=False), torch.cuda.Stream()

    def broken(x: Tensor) -> Tensor:
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            x + 1
        raise torch.OutOfMemoryError("none left")

    with pytest.raises(torch.OutOfMemoryError, match="none left"):
        record(broken, torch.ones(4, device=CUDA))
    torch.cuda.empty_cache()
    recording = record(lambda x: 2 * x, torch.ones(4, device=CUDA))
    assert recording(torch.full((4,), 3.0, device=CUDA)).tolist() == [6.0] * 4


def test_graphs_that_have_become_garbage_do_not_end_a_capture() -> None:
    def busy(x: Tensor) -> Tensor:
        made = [[n] for n in range(100_000)]  # enough to start the collection, were it on
        return x + len(made)

    record = CudaRecorder(CUDA, warm=False)  # a run before the recording would collect already
    busy(torch.ones(4, device=CUDA))
    forgotten: list[object] = [record(lambda x: 2 * x, torch.ones(4, device=CUDA))]
    forgotten.append(forgotten)
    del forgotten
    recording = record(busy, torch.ones(4, device=CUDA))
    assert recording(torch.zeros(4, device=CUDA)).tolist() == [100_000.0] * 4
    assert gc.isenabled()


@torch.inference_mode()
def test_many_shapes_leave_no_growth() -> None:
    fast = FastMMDiT(random_mmdit(SMALL, CUDA))
    graphs = Graphs(CudaRecorder(CUDA), limit=12)
    shapes = [(rows, 32 + 8 * n, 40) for rows in (1, 2, 4, 8) for n in range(10)]

    def requests() -> int:
        for n in range(200):
            given = inputs(fast, *shapes[n * 7 % 40])
            graphs.run((given[0].shape,), partial(fast, choice=Choice("cudnn")), *given)
        torch.cuda.synchronize()
        return torch.cuda.memory_reserved()

    requests()
    torch.cuda.empty_cache()
    first = requests()
    second = requests()
    assert graphs.held == 12
    assert second <= first


@pytest.mark.parametrize("name", ["medium", "large"])
@torch.inference_mode()
def test_a_published_size_goes_the_fast_way_as_it_goes_the_plain_one(name: str) -> None:
    mmdit = random_mmdit(VARIANTS[name].mmdit, CUDA)
    fast = FastMMDiT(mmdit)
    context, pooled = random(2, 333, 4096, dtype=torch.bfloat16), random(2, 2048, dtype=torch.bfloat16)
    x, sigmas = random(2, 16, 64, 64, dtype=torch.bfloat16), torch.tensor([0.9, 0.4], device=CUDA)
    plain = mmdit(x, 1000 * sigmas, context, pooled)
    modulation = torch.cat([fast.modulation(sigmas[n : n + 1].expand(16), pooled[n])[:1] for n in range(2)])
    made = fast(x, modulation, fast.embed(context), Choice("cudnn"))
    assert apart(made, plain) < 2e-2  # two ways of bf16 rounding, each about 1e-2 from fp32
