"""Variants kept as a low-rank difference: merged as diffusers does, and refused where anything does not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from safetensors.torch import save_file
from torch import Tensor, nn

from model.card import FILE
from model.checkpoint import Components, load_components
from model.keys import mmdit_rules
from model.layouts import find
from model.lowrank import PREFIX
from model.sampling import Growth, Shift
from model.shelf import Shelf
from model.weights import CheckpointError
from tests.model import tiny

State = dict[str, Tensor]
QUERY, OUT = "transformer_blocks.0.attn.to_q", "norm_out.linear"
RANK = 4


def difference(modules: tuple[str, ...] | None = None, *, bias: bool = False, scale: float = 0.1) -> State:
    """A random change of some linear layers of the tiny transformer, or of all."""
    generator = torch.Generator().manual_seed(5)
    with torch.device("meta"):
        layers = {name: m for name, m in tiny.transformer().named_modules() if isinstance(m, nn.Linear)}
    state: State = {}
    for name, layer in layers.items():
        if modules is None or name in modules:
            shapes = {"lora_A.weight": (RANK, layer.in_features), "lora_B.weight": (layer.out_features, RANK)}
            if bias:
                shapes["lora_B.bias"] = (layer.out_features,)
            state |= {f"{PREFIX}{name}.{k}": scale * torch.randn(s, generator=generator) for k, s in shapes.items()}
    return state


Save = Callable[..., Path]


@pytest.fixture
def save(diffusers_folder: Path, tmp_path: Path) -> Save:
    """Writes a variant of the tiny bundle, and gives its folder."""

    def write(state: State, metadata: dict[str, str] | None = None, file: str = FILE, **card: Any) -> Path:
        folder = tmp_path / "variant"
        folder.mkdir()
        save_file(state, folder / file, metadata)
        (tmp_path / "base").symlink_to(diffusers_folder)
        (folder / "darkroom.json").write_text(json.dumps({"base": "../base"} | card))
        return folder

    return write


def load(path: Path, **options: Any) -> Components:
    return load_components(path, "cpu", torch.float32, **options)


def changed_by_hand(pipe: StableDiffusion3Pipeline, state: State, scale: float = 1.0) -> State:
    """Our MMDiT's weights, of diffusers' with the change added to each."""
    theirs = {name: tensor.clone() for name, tensor in pipe.transformer.state_dict().items()}
    for key in state:
        if key.endswith("lora_A.weight"):
            name = key.removesuffix(".lora_A.weight")
            change = state[f"{name}.lora_B.weight"].double() @ state[key].double()
            theirs[f"{name.removeprefix(PREFIX)}.weight"] += (scale * change).float()
        elif key.endswith("lora_B.bias"):
            theirs[f"{key.removeprefix(PREFIX).removesuffix('.lora_B.bias')}.bias"] += scale * state[key]
    return {rule.name: rule.gather([theirs[key] for key in rule.sources]) for rule in mmdit_rules(tiny.MMDIT_X)}


def assert_mmdit(parts: Components, expected: State) -> None:
    for name, tensor in parts.mmdit.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=1e-5, msg=name)


def test_every_matrix_and_bias_is_changed_as_told(pipe: StableDiffusion3Pipeline, save: Save) -> None:
    state = difference(bias=True)
    assert_mmdit(load(save(state)), changed_by_hand(pipe, state))


def test_a_base_in_the_other_layout_is_changed_alike(
    pipe: StableDiffusion3Pipeline, original_file: Path, tmp_path: Path
) -> None:
    state = difference(bias=True)
    folder = tmp_path / "variant"
    folder.mkdir()
    save_file(state, folder / "anything.safetensors")
    (tmp_path / "base").symlink_to(original_file.parent)
    (folder / "darkroom.json").write_text(json.dumps({"base": f"../base/{original_file.name}"}))
    assert_mmdit(load(folder, tokenizers=original_file.parent), changed_by_hand(pipe, state))


def test_the_change_of_a_patch_convolution_is_added(pipe: StableDiffusion3Pipeline, save: Save) -> None:
    a, b = torch.randn(2, 16, 2, 2), torch.randn(tiny.MMDIT_X.hidden, 2, 1, 1)
    state = {f"{PREFIX}pos_embed.proj.lora_A.weight": a, f"{PREFIX}pos_embed.proj.lora_B.weight": b}
    found = load(save(state)).mmdit.x_embedder.proj.weight
    expected = pipe.transformer.pos_embed.proj.weight + torch.einsum("or,rchw->ochw", b[..., 0, 0], a)
    torch.testing.assert_close(found, expected)


def test_a_merged_variant_is_rounded_once(pipe: StableDiffusion3Pipeline, save: Save) -> None:
    state = difference((QUERY,), scale=1e-2)
    parts = load_components(save(state), "cpu", torch.bfloat16)
    name = "joint_blocks.0.x_block.attn.qkv.weight"
    expected = changed_by_hand(pipe, state)[name].to(torch.bfloat16)
    assert torch.equal(parts.mmdit.state_dict()[name], expected)


def test_fused_in_diffusers_the_transformer_says_the_same(
    pipe: StableDiffusion3Pipeline, save: Save, diffusers_folder: Path
) -> None:
    pytest.importorskip("peft")
    folder = save(difference(), shift_terminal=0.4)
    theirs = StableDiffusion3Pipeline.from_pretrained(diffusers_folder)
    theirs.load_lora_weights(folder, weight_name=FILE)
    theirs.fuse_lora()
    theirs.unload_lora_weights()
    parts = load(folder)
    state = theirs.transformer.state_dict()
    expected = {rule.name: rule.gather([state[key] for key in rule.sources]) for rule in mmdit_rules(tiny.MMDIT_X)}
    assert_mmdit(parts, expected)


def test_the_changed_transformer_says_what_diffusers_does(pipe: StableDiffusion3Pipeline, save: Save) -> None:
    state = difference(bias=True)
    parts = load(save(state))
    theirs = SD3Transformer2DModel.from_config(pipe.transformer.config).eval()
    theirs.load_state_dict(pipe.transformer.state_dict())
    with torch.no_grad():
        for name, layer in theirs.named_modules():
            if isinstance(layer, nn.Linear):
                a, b = (state[f"{PREFIX}{name}.lora_{letter}.weight"] for letter in "AB")
                layer.weight += b @ a
                layer.bias += state[f"{PREFIX}{name}.lora_B.bias"]
        x, context, pooled = torch.randn(2, 16, 8, 8), torch.randn(2, 5, 256), torch.randn(2, 192)
        timestep = torch.tensor([900.0, 30.0])
        expected = theirs(x, context, pooled, timestep, return_dict=False)[0]
        torch.testing.assert_close(parts.mmdit(x, timestep, context, pooled), expected, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("metadata", "alpha", "scale"),
    [
        ({}, None, 1.0),
        ({}, 2.0, 0.5),
        ({"transformer.lora_alpha": 8, "transformer.r": RANK}, None, 2.0),
        ({"transformer.lora_alpha": 8, "transformer.use_rslora": True}, None, 4.0),
        ({"transformer.lora_alpha": 8, "transformer.alpha_pattern": {"attn.to_q": 1}}, None, 0.25),
        ({"transformer.lora_alpha": 8, "transformer.r": RANK}, 4.0, 1.0),
    ],
)
def test_an_alpha_scales_the_change(
    pipe: StableDiffusion3Pipeline, save: Save, metadata: dict[str, Any], alpha: float | None, scale: float
) -> None:
    state = difference((QUERY,))
    stored = state | ({f"{PREFIX}{QUERY}.alpha": torch.tensor(alpha)} if alpha else {})
    parts = load(save(stored, {"lora_adapter_metadata": json.dumps(metadata)}))
    assert_mmdit(parts, changed_by_hand(pipe, state, scale))


A, B = f"{PREFIX}{QUERY}.lora_A.weight", f"{PREFIX}{QUERY}.lora_B.weight"
TEXT = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({TEXT: torch.zeros(4, 64)}, "text_encoder.* is no part of a transformer's LoRA"),
        ({f"{PREFIX}{QUERY}.dora_scale": torch.zeros(1)}, "dora_scale is no part"),
        ({f"{PREFIX}{QUERY}.lora_C.weight": torch.zeros(1)}, "lora_C.weight is no part"),
        ({f"{PREFIX}blocks.9.lora_A.weight": torch.zeros(4, 4)}, "transformer.blocks.9 is changed, but .* no such"),
        ({f"{PREFIX}transformer_blocks.0.attn.norm_q.lora_A.weight": torch.zeros(4, 4)}, "no such matrix"),
        ({f"{PREFIX}{OUT}.lora_A.weight": torch.zeros(4, 128)}, f"{OUT} has lora_A.weight or more, but no lora_B"),
        ({f"{PREFIX}{OUT}.lora_B.bias": torch.zeros(256)}, f"{OUT} .* but no lora_A.weight"),
        ({A: torch.zeros(4, 64)}, r"to_q.lora_A.weight has shape \(4, 64\), expected \(4, 128\)"),
        ({A: torch.zeros(128)}, r"to_q.lora_A.weight has shape \(128,\), expected"),
        ({A: torch.zeros(0, 128), B: torch.zeros(128, 0)}, r"has shape \(0, 128\), expected \(1, 128\)"),
        ({B: torch.zeros(128, 5)}, r"to_q.lora_B.weight has shape \(128, 5\), expected \(128, 4\)"),
        ({f"{PREFIX}{QUERY}.lora_B.bias": torch.zeros(3)}, r"lora_B.bias has shape \(3,\), expected \(128,\)"),
        ({f"{PREFIX}{QUERY}.alpha": torch.zeros(2)}, r"alpha has shape \(2,\), expected one number"),
        ({f"{PREFIX}{QUERY}.alpha": torch.tensor(float("inf"))}, "alpha of .*to_q is inf"),
        ({A: torch.zeros(4, 128, dtype=torch.int64)}, "to_q.lora_A.weight holds I64, expected F64"),
        ({A: torch.full((4, 128), float("nan"))}, "the change of .*to_q.weight is not finite"),
    ],
)
def test_a_difference_that_does_not_fit_is_refused(save: Save, wrong: State, says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        load(save(difference((QUERY,)) | wrong))


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        ("{", "lora_adapter_metadata is broken"),
        ("[1]", "lora_adapter_metadata is broken"),
        ('{"transformer.use_dora": true}', "is a DoRA"),
        ('{"transformer.lora_alpha": "8"}', "alpha of .*to_q is '8'"),
        (f'{{"transformer.lora_alpha": 1{"0" * 400}}}', "alpha of .*to_q is 10000.*, expected a number"),
        ('{"transformer.lora_alpha": NaN}', "alpha of .*to_q is nan"),
        (f'{{"transformer.r": {"[" * 10_000}', "is broken"),
        ('{"transformer.alpha_pattern": {"attn.to_x": 4}}', "names 'attn.to_x', which is not there"),
        ('{"transformer.alpha_pattern": [4]}', "alpha_pattern .* is no object"),
    ],
)
def test_an_adapters_settings_that_cannot_be_followed_are_refused(save: Save, metadata: str, says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        load(save(difference((QUERY,)), {"lora_adapter_metadata": metadata}))


def test_a_file_without_tensors_is_refused(save: Save) -> None:
    with pytest.raises(CheckpointError, match="holds no tensors"):
        load(save({}))


@pytest.mark.parametrize(
    ("base", "says"),
    [
        ("../none", "none does not exist"),
        ("/", "base is '/', expected a path relative to this folder"),
        ("", "base is ''"),
        (3, "base is 3"),
        (".", "base is '.', itself a variant"),
        ("../variant", "itself a variant"),
    ],
)
def test_a_base_that_cannot_be_is_refused(save: Save, base: object, says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        load(save(difference((QUERY,)), base=base))


def test_two_variants_of_each_other_are_refused(save: Save, tmp_path: Path) -> None:
    folder = save(difference((QUERY,)), base="../other")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "darkroom.json").write_text('{"base": "../variant"}')
    for path in (folder, tmp_path / "other"):
        with pytest.raises(CheckpointError, match="itself a variant"):
            load(path)


def test_a_difference_without_a_base_or_without_a_file_is_refused(save: Save, tmp_path: Path) -> None:
    folder = save(difference((QUERY,)))
    (folder / "darkroom.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"is a difference: .* must say from what"):
        load(folder)
    (folder / "darkroom.json").write_text('{"base": "../base"}')
    (folder / FILE).unlink()
    with pytest.raises(CheckpointError, match=f"no safetensors file, expected {FILE}"):
        load(folder)


def test_only_the_base_that_it_was_made_from_is_changed(save: Save, diffusers_folder: Path) -> None:
    revision = find(diffusers_folder).base_revision
    folder = save(difference((QUERY,)), base_revision=revision)
    load(folder, load_t5=False)
    (folder / "darkroom.json").write_text(json.dumps({"base": "../base", "base_revision": "0123456789ab"}))
    with pytest.raises(CheckpointError, match=f"difference from revision 0123456789ab, but .* is {revision}"):
        load(folder)


def test_a_revision_covers_base_and_difference(save: Save, components: Components) -> None:
    folder = save(difference((QUERY,)))
    first = load(folder).revision
    assert first != components.revision
    assert load(folder).revision == first
    save_file(difference((QUERY,), scale=0.2), folder / FILE)
    assert load(folder).revision not in (first, components.revision)


def test_a_variant_may_space_its_noise_levels_otherwise(save: Save, components: Components) -> None:
    assert components.shift == Shift(3.0)
    folder = save(difference((QUERY,)), shift_terminal=0.4)
    assert load(folder).shift == Shift(3.0, 0.4)
    (folder / "darkroom.json").write_text('{"base": "../base", "shift": 2}')
    assert load(folder).shift == Shift(2.0)
    (folder / "darkroom.json").write_text('{"base": "../base", "use_dynamic_shifting": true, "max_shift": 2}')
    assert load(folder).shift == Shift(Growth(max_shift=2.0))
    grows: dict[str, object] = {"use_dynamic_shifting": True}
    for wrong in (
        {"shift": 0}, {"shift": "3"}, {"shift_terminal": 1.5}, {"shift_terminal": -1}, {"use_beta_sigmas": True},
        {"max_shift": 20} | grows, {"max_shift": 2, "max_image_seq_len": 257} | grows,
        {"base_image_seq_len": 4096} | grows, {"time_shift_type": "linear"} | grows,
    ):  # fmt: skip
        (folder / "darkroom.json").write_text(json.dumps({"base": "../base"} | wrong))
        with pytest.raises(CheckpointError, match=next(iter(wrong))):
            load(folder)


def test_what_base_and_variant_have_in_common_is_held_once(save: Save, diffusers_folder: Path) -> None:
    folder, shelf = save(difference((QUERY,))), Shelf()
    base, variant = load(diffusers_folder, shelf=shelf), load(folder, shelf=shelf)
    assert variant.vae is base.vae
    assert variant.text is base.text
    own = {p.data_ptr() for p in variant.mmdit.parameters()}
    assert own.isdisjoint(p.data_ptr() for p in base.mmdit.parameters())
    tiny.assert_same_weights(variant, load(folder))
