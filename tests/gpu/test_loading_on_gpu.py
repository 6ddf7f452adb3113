"""Weights onto a real GPU by several threads, and encoders that visit it layer by layer. `-s` shows GB/s."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from model.checkpoint import Components, load_components
from model.loading import Parcel, lanes_to, load
from model.offload import offload
from model.weights import WeightFile, tensors_of
from tests.gpu.nets import full_encoders
from tests.model import tiny
from tests.model.tiny import assert_same_weights

DEVICE = torch.device("cuda:0")
SHARED_MEMORY = Path("/dev/shm")
MATRICES, SIDE = 20, 7_000  # 2 GB

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """2 GB of matrices larger than a buffer, with biases of odd sizes between them."""
    folder = SHARED_MEMORY if SHARED_MEMORY.is_dir() else tmp_path_factory.mktemp("weights")
    path = folder / f"darkroom-{time.time_ns()}.safetensors"
    tensors: dict[str, Tensor] = {}
    for n in range(MATRICES):
        tensors[f"{n:02}.weight"] = torch.randn(SIDE, SIDE, device=DEVICE).to(torch.bfloat16).cpu()
        tensors[f"{n:02}.bias"] = torch.randn(SIDE + n).to(torch.bfloat16)
    try:
        save_file(tensors, path)
        yield path
    finally:
        path.unlink(missing_ok=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny weights: the diffusers layout, and Stability's in its `original` folder."""
    place, pipe = tmp_path_factory.mktemp("tiny"), tiny.pipeline()
    pipe.save_pretrained(place)
    tiny.save_original(pipe, place / "original")
    return place


def parcels(file: Path, dtype: torch.dtype) -> dict[str, Parcel]:
    entries = tensors_of([WeightFile(file)])
    return {name: Parcel(one, torch.empty(one.shape, dtype=dtype, device=DEVICE)) for name, one in entries.items()}


def plainly(file: Path) -> dict[str, Tensor]:
    with safe_open(file, framework="pt", device=str(DEVICE)) as handle:
        return {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118


def seconds(run: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - start


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_every_tensor_arrives_as_safetensors_reads_it(file: Path, dtype: torch.dtype) -> None:
    asked = parcels(file, dtype)
    load(list(asked.values()), lanes_to(DEVICE))
    for name, tensor in plainly(file).items():
        assert torch.equal(asked[name].to, tensor.to(dtype)), name


def test_memory_that_is_still_read_is_not_written_to(file: Path) -> None:
    """The destination was another tensor's, which the calling thread's stream has yet to read."""
    asked = parcels(file, torch.bfloat16)
    name, parcel = next(item for item in asked.items() if item[0].endswith("weight"))
    lanes, entry, shape = lanes_to(DEVICE), parcel.entry, parcel.to.shape
    del asked, parcel
    torch.cuda.empty_cache()
    ones = torch.ones(shape, dtype=torch.bfloat16, device=DEVICE)
    busy = torch.ones(8192, 8192, device=DEVICE)
    for _ in range(20):
        busy = (busy @ busy).clamp(max=1)
    read = ones.float().mean()
    address = ones.data_ptr()
    del ones
    again = Parcel(entry, torch.empty(shape, dtype=torch.bfloat16, device=DEVICE))
    assert again.to.data_ptr() == address
    load([again], lanes)
    assert float(read) == 1.0
    assert torch.equal(again.to, plainly(file)[name])


def test_several_threads_are_faster_than_one(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = file.stat().st_size / 1e9
    plainly(file)
    torch.cuda.empty_cache()
    plain = min(seconds(lambda: plainly(file)) for _ in range(3))
    torch.cuda.empty_cache()

    def by_lanes() -> None:
        load(list(parcels(file, torch.bfloat16).values()), lanes_to(DEVICE))

    first, *later = [seconds(by_lanes) for _ in range(4)]
    with capsys.disabled():
        print(  # noqa: T201
            f"\n{size:.1f} GB: safetensors {size / plain:.1f} GB/s; lanes {size / min(later):.1f} GB/s, "
            f"the first time, with pinning, {size / first:.1f} GB/s"
        )
    assert min(later) < plain


def loaded(folder: Path, encoders: str) -> Components:
    return load_components(folder, DEVICE, torch.bfloat16, encoders=encoders)  # type: ignore[arg-type]


def test_a_checkpoint_on_the_gpu_is_that_on_the_cpu(folder: Path) -> None:
    for path in (folder, folder / "original"):
        found = loaded(path, "gpu")
        for net in (found.mmdit, found.vae, found.text.clip_l, found.text.clip_g, found.text.t5):
            assert net is not None
            assert {tensor.device for tensor in net.state_dict().values()} == {DEVICE}
            net.cpu()
        assert_same_weights(found, load_components(path, "cpu", torch.bfloat16))


@torch.inference_mode()
def test_offloaded_encoders_give_the_same_texts_on_the_gpu_and_leave_nothing_there(folder: Path) -> None:
    resident, away = loaded(folder, "gpu"), loaded(folder, "offload")
    away.text.encode(["warm"], 77)  # workspaces stay
    before = torch.cuda.memory_allocated()
    ours, theirs = away.text.encode(["the red cat"], 77)[0], resident.text.encode(["the red cat"], 77)[0]
    assert torch.equal(ours.context, theirs.context)
    assert torch.equal(ours.pooled, theirs.pooled)
    assert ours.context.device == DEVICE
    assert {p.device.type for p in away.text.t5.parameters()} == {"cpu"}  # type: ignore[union-attr]
    assert all(p.is_pinned() for p in away.text.t5.parameters())  # type: ignore[union-attr]
    size = sum(t.nbytes for text in (ours, theirs) for t in (text.context, text.pooled))
    del ours, theirs
    assert torch.cuda.memory_allocated() <= before + size


@torch.inference_mode()
def test_encoders_on_the_cpu_send_their_texts_to_the_gpu(folder: Path) -> None:
    text = loaded(folder, "cpu").text.encode(["the red cat"], 77)[0]
    assert text.context.device == text.pooled.device == DEVICE


@torch.inference_mode()
def test_t5_of_full_size_visits_the_gpu_in_about_half_a_second(capsys: pytest.CaptureFixture[str]) -> None:
    with torch.device(DEVICE):
        *_, t5 = full_encoders()
    t5 = t5.to(torch.bfloat16).cpu().requires_grad_(False).eval()
    torch.cuda.empty_cache()
    offload(t5, DEVICE)
    ids = torch.ones(1, 256, dtype=torch.long, device=DEVICE)
    t5(input_ids=ids)
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    took = min(seconds(lambda: t5(input_ids=ids)) for _ in range(3))
    peak = (torch.cuda.max_memory_allocated() - held) / 1e9
    with capsys.disabled():
        print(f"\nT5 offloaded: {took:.2f} s a prompt, {peak:.2f} GB of the GPU at most")  # noqa: T201
    assert took < 1.5
    assert peak < 1.0
