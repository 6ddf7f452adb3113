"""Models side by side: what they have in common is held once, and what does not fit is said before it is read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.checkpoint import Components, load_components
from model.room import NoRoom
from model.shelf import Shelf
from model.weights import CheckpointError

VAE, T5 = "vae/diffusion_pytorch_model.safetensors", "text_encoder_3/model.safetensors"


def load(path: Path, shelf: Shelf, **options: object) -> Components:
    return load_components(path, "cpu", torch.float32, shelf=shelf, **options)  # type: ignore[arg-type]


def nudged(file: Path, tensor: Callable[[dict[str, Tensor]], str] = min) -> None:
    """The same file, but for the last number of one tensor."""
    state = load_file(file)
    state[tensor(state)].view(-1)[-1] += 1
    file.unlink()
    save_file(state, file, metadata={"format": "pt"})


def shards(file: Path) -> None:
    """The same tensors in two files under an index."""
    state = load_file(file)
    names = sorted(state)
    halves = names[: len(names) // 2], names[len(names) // 2 :]
    where = {}
    for n, half in enumerate(halves, 1):
        shard = file.with_name(f"{file.stem}-0000{n}-of-00002.safetensors")
        save_file({name: state[name] for name in half}, shard, metadata={"format": "pt"})
        where |= dict.fromkeys(half, shard.name)
    file.unlink()
    file.with_name(f"{file.name}.index.json").write_text(json.dumps({"weight_map": where}))


@pytest.fixture
def shelf() -> Shelf:
    return Shelf()


@pytest.fixture
def first(diffusers_folder: Path, shelf: Shelf) -> Components:
    return load(diffusers_folder, shelf)


@pytest.fixture
def other(diffusers_folder: Path, tmp_path: Path) -> Path:
    """Another folder with the same files."""
    return shutil.copytree(diffusers_folder, tmp_path / "other")


def test_equal_encoders_and_vae_of_another_folder_are_held_once(first: Components, other: Path, shelf: Shelf) -> None:
    second = load(other, shelf)
    assert second.vae is first.vae
    assert second.text is first.text  # and so their cache of embeddings
    assert second.mmdit is not first.mmdit


def test_bytes_are_compared_not_files(first: Components, other: Path, shelf: Shelf) -> None:
    shards(other / T5)
    assert load(other, shelf).text.t5 is first.text.t5


def test_one_number_makes_another_net_and_leaves_the_rest_in_common(
    first: Components, other: Path, shelf: Shelf
) -> None:
    nudged(other / T5, max)
    second = load(other, shelf)
    assert second.text.t5 is not first.text.t5
    assert (second.text.clip_l, second.text.clip_g) == (first.text.clip_l, first.text.clip_g)
    assert second.text.cache is not first.text.cache
    assert second.vae is first.vae


def test_a_config_that_computes_otherwise_makes_another_net(first: Components, other: Path, shelf: Shelf) -> None:
    file = other / "text_encoder" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"transformers_version": "4.0.0", "_name_or_path": "elsewhere"}))
    assert load(other, shelf).text.clip_l is first.text.clip_l
    file.write_text(json.dumps(config | {"layer_norm_eps": 0.1}))
    assert load(other, shelf).text.clip_l is not first.text.clip_l


def test_other_words_in_a_tokenizer_make_other_encoders_of_the_same_nets(
    first: Components, other: Path, shelf: Shelf
) -> None:
    (other / "tokenizer_3" / "more.json").write_text("{}")
    second = load(other, shelf)
    assert second.text is not first.text
    assert second.text.t5 is first.text.t5


def test_without_t5_the_clip_encoders_are_in_common(first: Components, other: Path, shelf: Shelf) -> None:
    second = load(other, shelf, load_t5=False)
    assert second.text.t5 is None
    assert second.text.clip_l is first.text.clip_l


def test_files_are_not_kept_open(diffusers_folder: Path, shelf: Shelf) -> None:
    load(diffusers_folder, shelf)
    assert not [line for line in Path("/proc/self/maps").read_text().splitlines() if str(diffusers_folder) in line]


def test_what_does_not_fit_is_refused_with_the_bytes_before_it_is_read(other: Path, shelf: Shelf) -> None:
    nudged(other / VAE)
    (other / VAE).chmod(0)
    with pytest.raises(NoRoom, match=r"need \d+\.\d MB of memory on cpu \(MMDiT \d.*T5 \d.*and 1\.0 MB are free"):
        load(other, shelf, free=lambda device: 10**6)


def test_what_is_held_already_needs_no_room(first: Components, other: Path, shelf: Shelf) -> None:
    size = sum(p.nbytes for p in first.mmdit.state_dict().values())
    assert load(other, shelf, free=lambda device: size).vae is first.vae
    with pytest.raises(NoRoom, match=r"\(MMDiT [\d.]+ MB\)"):
        load(other, shelf, free=lambda device: size - 1)


def test_a_checkpoint_that_fails_leaves_nothing_behind(diffusers_folder: Path, other: Path, shelf: Shelf) -> None:
    with pytest.raises(CheckpointError):
        load(other, shelf, variant="large")
    first = load(diffusers_folder, shelf, free=lambda device: None)
    assert load(other, shelf).vae is first.vae
