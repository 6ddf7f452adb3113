"""Exporting: diffusers reads what we write, and so do we."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ModelMixin, StableDiffusion3Pipeline
from safetensors.torch import load_file

from model.checkpoint import Components, export_diffusers, load_components
from model.sampling import Growth, Shift
from tests.model.tiny import assert_same_weights, nets

SHARD = 1_000_000  # bytes


@pytest.fixture(scope="module")
def exported(components: Components, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "bundle"
    export_diffusers(folder, components.mmdit, components.vae, components.text, max_shard_bytes=SHARD)
    return folder


def plain_config(net: ModelMixin) -> dict[str, Any]:
    """What the net is: neither diffusers' own bookkeeping nor the usual size of pictures."""
    config = {key: value for key, value in net.config.items() if not key.startswith("_") and key != "sample_size"}
    return {key: tuple(value) if isinstance(value, list) else value for key, value in config.items()}


def test_diffusers_reads_an_exported_folder_with_the_weights_it_had(
    exported: Path, pipe: StableDiffusion3Pipeline
) -> None:
    found = StableDiffusion3Pipeline.from_pretrained(exported, low_cpu_mem_usage=False)
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"):
        state = getattr(found, name).state_dict()
        expected = getattr(pipe, name).state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[key], tensor) for key, tensor in expected.items())
    for part in ("transformer", "vae"):
        ours, theirs = (plain_config(getattr(one, part)) for one in (found, pipe))
        assert ours == theirs
    for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        prompt = "The red cat, 42!"
        assert getattr(found, name)(prompt)["input_ids"] == getattr(pipe, name)(prompt)["input_ids"]
    assert found.scheduler.config.shift == 3.0


def test_a_shift_that_grows_is_written_as_diffusers_has_it(components: Components, tmp_path: Path) -> None:
    shift = Shift(Growth(base_shift=1.1, max_shift=1.95, base_image_seq_len=1024), terminal=0.4)
    export_diffusers(tmp_path / "bundle", components.mmdit, components.vae, components.text, shift=shift)
    assert load_components(tmp_path / "bundle", "cpu", torch.float32).shift == shift
    config = FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path / "bundle", subfolder="scheduler").config
    assert (config.use_dynamic_shifting, config.max_shift, config.shift_terminal) == (True, 1.95, 0.4)


def test_exported_folder_loads_as_what_was_exported(exported: Path, components: Components) -> None:
    found = load_components(exported, "cpu", torch.float32)
    assert_same_weights(found, components)
    assert found.mmdit_config == components.mmdit_config
    assert found.vae_config == components.vae_config


def test_no_exported_file_is_larger_than_asked_and_each_is_readable_by_all(exported: Path) -> None:
    files = list(exported.rglob("*.safetensors"))
    assert len(files) > 5
    assert all(file.stat().st_size <= SHARD for file in files)
    assert all(file.stat().st_mode & 0o444 == 0o444 for file in files)


def test_index_names_every_tensor_and_their_bytes(exported: Path) -> None:
    index = json.loads((exported / "transformer/diffusion_pytorch_model.safetensors.index.json").read_text())
    shards = {name: load_file(exported / "transformer" / name) for name in set(index["weight_map"].values())}
    assert all(key in shards[name] for key, name in index["weight_map"].items())
    assert index["metadata"]["total_size"] == sum(t.nbytes for shard in shards.values() for t in shard.values())


def test_export_stores_the_dtype_asked_for(components: Components, tmp_path: Path) -> None:
    export_diffusers(tmp_path / "half", components.mmdit, components.vae, components.text, dtype=torch.float16)
    stored = [t for file in (tmp_path / "half").rglob("*.safetensors") for t in load_file(file).values()]
    assert {t.dtype for t in stored} == {torch.float16}
    assert json.loads((tmp_path / "half/text_encoder/config.json").read_text())["dtype"] == "float16"
    found = load_components(tmp_path / "half", "cpu", torch.float32)
    for name, net in nets(components).items():
        state = nets(found)[name].state_dict()
        assert all(torch.equal(state[key], t.half().float()) for key, t in net.state_dict().items())


def test_export_leaves_a_folder_with_files_alone(components: Components, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(FileExistsError, match="not empty"):
        export_diffusers(tmp_path, components.mmdit, components.vae, components.text)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
