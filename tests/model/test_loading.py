"""Weights read by several threads: each tensor as safetensors itself reads it, and errors that leave nothing behind."""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from model import checkpoint, loading
from model.card import FILE
from model.checkpoint import Components, load_components
from model.loading import Lane, Parcel, load
from model.weights import CheckpointError, WeightFile, tensors_of
from tests.model import tiny
from tests.model.tiny import assert_same_weights

CPU = torch.device("cpu")
FP8 = torch.float8_e4m3fn


def lanes(count: int = 3, size: int = 256) -> list[Lane]:
    return [Lane(CPU, size) for _ in range(count)]


def state() -> dict[str, Tensor]:
    """Odd sizes, none, one, larger than a buffer, and every kind of number; the file orders them by alignment."""
    made = torch.Generator().manual_seed(0)
    sizes: dict[str, tuple[int, ...]] = {
        "none": (0,), "flat": (3, 0, 5), "point": (), "one": (1,), "odd": (7, 3), "row": (256,), "large": (13, 41),
    }  # fmt: skip
    kinds = (torch.float64, torch.float32, torch.float16, torch.bfloat16, FP8, torch.float8_e5m2)
    return {
        f"{name}.{str(kind).removeprefix('torch.')}": torch.randn(shape, generator=made).to(kind)
        for name, shape in sizes.items()
        for kind in kinds
    }


@pytest.fixture
def files(tmp_path: Path) -> list[WeightFile]:
    """Two shards."""
    tensors = state()
    for n in range(2):
        names = sorted(tensors)[n::2]
        save_file({name: tensors[name] for name in names}, tmp_path / f"{n}.safetensors", metadata={"format": "pt"})
    return [WeightFile(tmp_path / f"{n}.safetensors") for n in range(2)]


def parcels(files: Sequence[WeightFile], dtype: torch.dtype | None = None) -> dict[str, Parcel]:
    """A place for every tensor, filled with what it must not keep."""
    entries = tensors_of(reversed(files))
    return {
        name: Parcel(entry, torch.full(entry.shape, 77.0).to(dtype or loading.DTYPES[entry.dtype]))
        for name, entry in entries.items()
    }


def opened(files: Sequence[WeightFile]) -> Iterator[tuple[str, Tensor]]:
    for file in files:
        with safe_open(file.path, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118
                yield name, handle.get_tensor(name)


def same(ours: Tensor, theirs: Tensor) -> bool:
    return (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape) and ours.equal(theirs)


@pytest.mark.parametrize("size", [8, 24, 256, 2**20])
@pytest.mark.parametrize("count", [1, 5])
def test_every_tensor_is_as_safetensors_reads_it(files: list[WeightFile], size: int, count: int) -> None:
    asked = parcels(files)
    load(list(asked.values()), lanes(count, size))
    for name, tensor in opened(files):
        assert (
            same(asked[name].to.view(torch.uint8), tensor.view(torch.uint8))
            if tensor.ndim
            else same(asked[name].to.float(), tensor.float())
        ), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [8, 256])
def test_numbers_are_converted_as_torch_converts_them(files: list[WeightFile], dtype: torch.dtype, size: int) -> None:
    asked = parcels(files, dtype)
    load(list(asked.values()), lanes(size=size))
    for name, tensor in opened(files):
        assert same(asked[name].to, tensor.to(dtype)), name


def test_some_tensors_of_a_file_are_read_in_its_order_and_no_others(files: list[WeightFile]) -> None:
    asked = {name: parcel for name, parcel in parcels(files).items() if name.startswith(("odd", "large"))}
    load(list(asked.values())[::-1], lanes())
    for name, tensor in opened(files):
        assert name not in asked or same(asked[name].to.float(), tensor.float())
    stretches = list(loading._stretches(list(asked.values()), 256))
    assert [(s.path, s.start) for s in stretches] == sorted((s.path, s.start) for s in stretches)
    assert max(s.size for s in stretches) <= 256
    assert sum(s.size for s in stretches) == sum(parcel.to.nbytes for parcel in asked.values())


def test_neighbours_are_read_at_once(files: list[WeightFile]) -> None:
    asked = list(parcels(files).values())
    assert len(list(loading._stretches(asked, 2**20))) == len(files)


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("load")]


def test_a_file_cut_short_meanwhile_is_told_and_no_thread_is_left(files: list[WeightFile]) -> None:
    asked = parcels(files)
    os.truncate(files[1].path, files[1].path.stat().st_size - 100)
    with pytest.raises(CheckpointError, match=r"1\.safetensors was cut short while it was read"):
        load(list(asked.values()), lanes())
    assert not threads()


def test_a_file_that_went_is_told(files: list[WeightFile]) -> None:
    asked = parcels(files)
    files[0].path.unlink()
    with pytest.raises(CheckpointError, match=r"0\.safetensors cannot be read: No such file"):
        load(list(asked.values()), lanes())


def test_of_several_errors_the_first_of_the_files_is_told(
    files: list[WeightFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    met = threading.Barrier(2)
    asked = list(parcels(files).values())
    first, second = [stretch.start for stretch in loading._stretches(asked, 256)][:2]

    def fail(handle: int, buffers: object, start: int) -> int:
        met.wait(timeout=10)  # both are begun
        if start == first:
            threading.Event().wait(0.05)  # and this one fails last
        raise OSError(errno.EIO, f"broken at {'first' if start == first else 'second'}")

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(CheckpointError, match=r"0\.safetensors cannot be read: broken at first"):
        load(asked, lanes(2))
    assert second > first
    assert not threads()


def test_a_device_that_fails_ends_the_reading(files: list[WeightFile]) -> None:
    class Broken(Lane):
        def copy(self, *_: object) -> None:
            raise MemoryError("no more")

    with pytest.raises(MemoryError, match="no more"):
        load(list(parcels(files).values()), [Broken(CPU, 256), Broken(CPU, 256)])
    assert not threads()


def test_reads_may_be_short(files: list[WeightFile], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = os.preadv
    monkeypatch.setattr(os, "preadv", lambda handle, buffers, start: whole(handle, [buffers[0][:5]], start))
    asked = parcels(files)
    load(list(asked.values()), lanes())
    for name, tensor in opened(files):
        assert same(asked[name].to.float(), tensor.float()), name


def test_no_lanes_lead_to_the_cpu() -> None:
    assert loading.lanes_to(CPU) == []


def test_where_no_memory_can_be_pinned_there_are_no_lanes(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> Lane:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(loading, "Lane", refuse)
    assert loading.lanes_to(torch.device("cuda")) == []


@pytest.fixture
def by_lanes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints are read as they are to a GPU."""
    monkeypatch.setattr(checkpoint, "lanes_to", lambda device: lanes(4, 4096))


def plain(path: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> Components:
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "lanes_to", lambda device: [])
        return load_components(path, "cpu", dtype)


@pytest.mark.usefixtures("by_lanes")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_both_layouts_load_by_lanes_as_they_do_plainly(
    diffusers_folder: Path, original_file: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    for path in (diffusers_folder, original_file):
        assert_same_weights(load_components(path, "cpu", dtype), plain(path, dtype, monkeypatch))


@pytest.mark.usefixtures("by_lanes")
def test_shards_load_by_lanes(pipe: StableDiffusion3Pipeline, components: Components, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path, max_shard_size="1MB")
    assert_same_weights(load_components(tmp_path, "cpu", torch.float32), components)


@pytest.mark.usefixtures("by_lanes")
def test_a_net_whose_file_is_cut_short_meanwhile_is_not_loaded(
    diffusers_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "preadv", lambda *_: 0)
    with pytest.raises(CheckpointError, match="was cut short while it was read"):
        load_components(diffusers_folder, "cpu", torch.float32)
    assert not threads()


@pytest.mark.usefixtures("by_lanes")
def test_scaled_fp8_and_tensors_beside_it_load_by_their_ways(
    original_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in ("text_encoders", "tokenizer", "tokenizer_2", "tokenizer_3"):
        (tmp_path / place).symlink_to(original_file.parent / place)
    tensors = load_file(original_file)
    name = "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"
    tensors[name] = (tensors[name] / 0.5).to(FP8)
    tensors[name.replace("weight", "scale_weight")] = torch.tensor(0.5)
    save_file(tensors, tmp_path / original_file.name)
    path = tmp_path / original_file.name
    assert_same_weights(load_components(path, "cpu", torch.float32), plain(path, torch.float32, monkeypatch))


@pytest.mark.usefixtures("by_lanes")
def test_what_a_difference_changes_and_what_it_leaves_load_by_their_ways(
    diffusers_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "base").symlink_to(diffusers_folder)
    folder = tmp_path / "variant"
    folder.mkdir()
    (folder / "darkroom.json").write_text(json.dumps({"base": "../base"}))
    width, name = tiny.MMDIT_X.hidden, "transformer.transformer_blocks.1.attn.to_k.lora_{}.weight"
    made = torch.Generator().manual_seed(1)
    pair = {name.format("A"): torch.randn(2, width, generator=made), name.format("B"): torch.ones(width, 2)}
    save_file(pair, folder / FILE)
    ours, base = (load_components(path, "cpu", torch.bfloat16) for path in (folder, diffusers_folder))
    assert_same_weights(ours, plain(folder, torch.bfloat16, monkeypatch))
    key = "joint_blocks.1.x_block.attn.qkv.weight"
    assert not torch.equal(ours.mmdit.state_dict()[key], base.mmdit.state_dict()[key])
