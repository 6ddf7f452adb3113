"""Exporting: diffusers reads what we write, and so do we. Config files that nobody should have written are refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ModelMixin, StableDiffusion3Pipeline
from safetensors.torch import load_file

from model import bundle
from model.bundle import (
    export_diffusers,
    mmdit_config_from,
    mmdit_json,
    read_json,
    shift_from,
    vae_config_from,
    vae_json,
)
from model.checkpoint import Components, load_components
from model.config import VARIANTS, VAEConfig
from model.sampling import Growth, Shift
from model.weights import CheckpointError
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
    assert found.mmdit.config == components.mmdit.config
    assert found.vae.config == components.vae.config


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


# Wrong files


@pytest.mark.parametrize("text", ['{"a":' * 100_000, "[" * 100_000], ids=["objects", "lists"])
def test_deeply_nested_json_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match="is not JSON: maximum recursion depth exceeded"):
        read_json(tmp_path / "config.json")


def test_endless_json_is_not_read_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "JSON_LIMIT", 10)
    (tmp_path / "config.json").write_text('{"a": 123}')
    assert read_json(tmp_path / "config.json") == {"a": 123}
    (tmp_path / "config.json").write_text('{"a": 1234}')
    with pytest.raises(CheckpointError, match="is too long, expected at most 10 bytes"):
        read_json(tmp_path / "config.json")


HUGE = 10**400
LAYERS = "a whole number from 0 to 256"

RIGHT_CONFIGS: dict[Callable[[Path], object], dict[str, object]] = {
    mmdit_config_from: mmdit_json(VARIANTS["large"].mmdit),
    vae_config_from: vae_json(VAEConfig()),
    shift_from: {},
}
WRONG_CONFIGS: dict[str, tuple[Callable[[Path], object], dict[str, object], str]] = {
    "too many layers": (mmdit_config_from, {"num_layers": 257}, f"num_layers is 257, expected {LAYERS}"),
    "too many of both attentions": (
        mmdit_config_from,
        {"dual_attention_layers": [0] * 257},
        "dual_attention_layers is .0, 0, .*, expected a list of at most 256 whole numbers",
    ),
    "huge width": (
        mmdit_config_from,
        {"joint_attention_dim": HUGE},
        "joint_attention_dim is 1000*.*0, expected a whole",
    ),
    "no heads": (
        mmdit_config_from,
        {"num_attention_heads": 0, "caption_projection_dim": 0},
        "no such network can be built: integer .*by zero",
    ),
    "too many blocks": (vae_config_from, {"layers_per_block": 257}, f"layers_per_block is 257, expected {LAYERS}"),
    "no scale": (vae_config_from, {"scaling_factor": 0}, "scaling_factor is 0, expected more than 0"),
    "endless scale": (vae_config_from, {"scaling_factor": math.inf}, "scaling_factor is inf, expected a number"),
    "shift that is no number": (vae_config_from, {"shift_factor": math.nan}, "shift_factor is nan, expected a number"),
    "huge shift": (vae_config_from, {"shift_factor": -HUGE}, "shift_factor is -1000*.*0, expected .* -1e.09 to 1e.09"),
    "endless shift of times": (shift_from, {"shift": math.inf}, "shift is inf, expected a number"),
    "huge shift of times": (shift_from, {"shift": HUGE}, "shift is 1000*.*0, expected a number from 0"),
    "large shift of times": (shift_from, {"shift": 3e4}, "shift is 30000, expected from 4.5e-05 to 2.2e.04"),
    "small shift of times": (shift_from, {"shift": 3e-5}, "shift is 3e-05, expected from 4.5e-05 to 2.2e.04"),
    "no shift of times": (shift_from, {"shift": 0}, "shift is 0, expected from 4.5e-05"),
    "end that is no number": (shift_from, {"shift_terminal": math.nan}, "shift_terminal is nan, expected a number"),
    "growth that is no number": (
        shift_from,
        {"use_dynamic_shifting": True, "base_shift": math.nan},
        "base_shift is nan, expected a number",
    ),
}


@pytest.mark.parametrize("case", WRONG_CONFIGS)
def test_number_that_no_model_has_is_refused(tmp_path: Path, case: str) -> None:
    read, changes, message = WRONG_CONFIGS[case]
    right = RIGHT_CONFIGS[read]
    path = tmp_path / "config.json"
    path.write_text(json.dumps(right))
    read(path)
    path.write_text(json.dumps(right | changes))
    with pytest.raises(CheckpointError, match=message):
        read(path)
