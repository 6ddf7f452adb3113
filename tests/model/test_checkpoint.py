"""Loading: both layouts, fp8, and every way in which files can be wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from model import config as model_config
from model.checkpoint import Components, footprint, load_components, variant_of
from model.fp8 import Fp8Linear, is_fp8
from model.kernels.elementwise import quantized
from model.layouts import FETCHED
from model.sampling import Shift
from model.weights import CheckpointError, WeightFile, Weights, tensors_of
from tests.model import tiny
from tests.model.tiny import assert_same_weights, nets

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
DIFFUSION = "model.diffusion_model."

State = dict[str, Tensor]


def edited(path: Path, edit: Callable[[State], object]) -> None:
    """Change the tensors of a safetensors file."""
    state = load_file(path)
    edit(state)
    path.unlink()
    save_file(state, path, metadata={"format": "pt"})


def edited_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def folder(diffusers_folder: Path, tmp_path: Path) -> Path:
    """A diffusers folder to break."""
    return shutil.copytree(diffusers_folder, tmp_path / "diffusers")


@pytest.fixture
def main(original_file: Path, tmp_path: Path) -> Path:
    """Stability's layout to break."""
    return shutil.copytree(original_file.parent, tmp_path / "original") / original_file.name


def load(path: Path, **options: object) -> Components:
    return load_components(path, "cpu", torch.float32, **options)  # type: ignore[arg-type]


# Layouts


def test_both_layouts_of_the_same_weights_load_as_the_same_model(components: Components, original_file: Path) -> None:
    found = load(original_file)
    assert_same_weights(found, components)
    assert (found.mmdit.config, found.vae.config) == (components.mmdit.config, components.vae.config)
    assert found.shift == components.shift == Shift(3.0)


@torch.inference_mode()
def test_both_layouts_of_the_same_weights_give_identical_outputs(components: Components, original_file: Path) -> None:
    found = load(original_file)
    ours, theirs = (one.text.encode(["the red cat"], 77)[0] for one in (found, components))
    assert torch.equal(ours.context, theirs.context)
    assert torch.equal(ours.pooled, theirs.pooled)
    x = torch.randn(1, 16, 8, 12, generator=torch.Generator().manual_seed(0))
    velocities = [
        one.mmdit(x, torch.tensor([602.15]), ours.context[None], ours.pooled[None]) for one in (found, components)
    ]
    assert torch.equal(*velocities)
    assert torch.equal(found.vae.decode(x), components.vae.decode(x))


def test_folder_with_one_single_file_is_read_as_that_file(components: Components, original_file: Path) -> None:
    assert_same_weights(load(original_file.parent), components)


def test_sharded_folder_is_read_as_one(pipe: StableDiffusion3Pipeline, components: Components, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path, max_shard_size="1MB")
    assert len(list((tmp_path / "transformer").glob("*.safetensors"))) > 1
    assert_same_weights(load(tmp_path), components)


def test_all_in_one_file_is_read(pipe: StableDiffusion3Pipeline, components: Components, main: Path) -> None:
    texts = {
        f"text_encoders.{name}.transformer.{key}": tensor
        for name, state in tiny.text_states(pipe).items()
        for key, tensor in state.items()
    }
    edited(main, lambda state: state.update(texts | {"text_encoders.clip_l.logit_scale": torch.ones(())}))
    shutil.rmtree(main.parent / "text_encoders")
    assert_same_weights(load(main), components)


def test_bare_keys_and_a_vae_file_beside_are_read(components: Components, main: Path) -> None:
    state = load_file(main)
    vae = {key: state.pop(key) for key in list(state) if key.startswith("first_stage_model.")}
    save_file({key.removeprefix(DIFFUSION): tensor for key, tensor in state.items()}, main)
    save_file(vae, main.parent / "sd3_vae.safetensors")
    assert_same_weights(load(main), components)


@pytest.mark.parametrize(
    "extra",
    [
        {"text_model.embeddings.position_ids": torch.arange(77)},
        {"logit_scale": torch.ones(())},
        {"text_projection.weight": torch.randn(tiny.CLIP_L_WIDTH, tiny.CLIP_L_WIDTH)},
    ],
    ids=lambda extra: next(iter(extra)),
)
def test_harmless_extras_of_clip_l_are_left_out(components: Components, main: Path, extra: State) -> None:
    edited(main.parent / "text_encoders" / "clip_l.safetensors", lambda state: state.update(extra))
    assert_same_weights(load(main), components)


def test_clip_names_without_their_prefix_are_read(components: Components, main: Path) -> None:
    path = main.parent / "text_encoders" / "clip_g.safetensors"
    save_file({key.removeprefix("text_model."): tensor for key, tensor in load_file(path).items()}, path)
    assert_same_weights(load(main), components)


@pytest.mark.parametrize("names", [["encoder.embed_tokens.weight"], ["encoder.embed_tokens.weight", "shared.weight"]])
def test_t5_embedding_is_read_under_either_name_and_stays_one_tensor(
    components: Components, main: Path, names: list[str]
) -> None:
    def rename(state: State) -> None:
        table = state.pop("shared.weight")
        state.update({name: table.clone() for name in names})

    edited(main.parent / "text_encoders" / "t5xxl.safetensors", rename)
    found = load(main)
    assert_same_weights(found, components)
    assert found.text.t5.shared.weight is found.text.t5.encoder.embed_tokens.weight


def test_missing_t5_file_means_no_t5(main: Path) -> None:
    (main.parent / "text_encoders" / "t5xxl.safetensors").unlink()
    assert load(main).text.t5 is None


def test_folder_without_t5_in_its_index_has_none(folder: Path) -> None:
    edited_json(folder / "model_index.json", text_encoder_3=[None, None], tokenizer_3=[None, None])
    shutil.rmtree(folder / "text_encoder_3")
    shutil.rmtree(folder / "tokenizer_3")
    assert load(folder).text.t5 is None


def test_of_several_t5_files_the_most_precise_is_read(components: Components, main: Path) -> None:
    place = main.parent / "text_encoders"
    (place / "t5xxl.safetensors").rename(place / "t5xxl_fp16.safetensors")
    for name in ("t5xxl_fp8_e4m3fn", "t5xxl_fp8_e4m3fn_scaled"):
        (place / f"{name}.safetensors").write_bytes(b"not read")
    assert_same_weights(load(main), components)


def test_tokenizers_are_read_from_a_folder_given(components: Components, main: Path, diffusers_folder: Path) -> None:
    for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        shutil.rmtree(main.parent / name)
    assert_same_weights(load(main, tokenizers=diffusers_folder), components)


def test_tokenizers_beside_the_weights_come_before_those_of_a_folder_given(
    components: Components, diffusers_folder: Path, tmp_path: Path
) -> None:
    assert_same_weights(load(diffusers_folder, tokenizers=tmp_path / "none"), components)


def edited_vocabulary(tokenizer: Path, edit: Callable[[dict[str, int]], object]) -> None:
    file = tokenizer / "tokenizer.json"
    data = json.loads(file.read_text())
    edit(data["model"]["vocab"])
    file.write_text(json.dumps(data))


def test_a_digest_of_the_texts_tells_tokenizers_and_configs_apart(components: Components, folder: Path) -> None:
    assert load(folder).text.digest == components.text.digest

    def swap(vocabulary: dict[str, int]) -> None:
        first, second = list(vocabulary)[:2]
        vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]

    edited_vocabulary(folder / "tokenizer", swap)
    swapped = load(folder).text.digest
    edited_json(folder / "text_encoder_2/config.json", hidden_act="quick_gelu")
    assert len({components.text.digest, swapped, load(folder).text.digest}) == 3


def test_a_digest_of_the_texts_does_not_change_with_what_was_read(components: Components) -> None:
    before = components.text.digest
    del components.text.digest
    components.text.encode(["a cat"], 32)
    assert components.text.digest == before


# What a loaded model is


def test_loaded_nets_are_of_the_dtype_frozen_and_nowhere_on_meta(diffusers_folder: Path) -> None:
    found = load_components(diffusers_folder, "cpu", torch.bfloat16)
    tensors = [t for net in nets(found).values() for t in (*net.parameters(), *net.buffers())]
    assert {t.dtype for t in tensors if t.is_floating_point()} == {torch.bfloat16}
    assert not any(t.is_meta or t.requires_grad for t in tensors)
    assert not any(net.training for net in nets(found).values())


def test_in_fp16_the_t5_layers_that_overflow_stay_fp32(diffusers_folder: Path) -> None:
    found = load_components(diffusers_folder, "cpu", torch.float16)
    wide = {name for name, t in found.text.t5.named_parameters() if t.dtype == torch.float32}
    assert wide == {f"encoder.block.{i}.layer.1.DenseReluDense.wo.weight" for i in range(2)}


def test_loaded_weights_outlive_their_files(folder: Path, components: Components) -> None:
    found = load(folder)
    for path in folder.rglob("*.safetensors"):
        path.write_bytes(bytes(path.stat().st_size))
    assert_same_weights(found, components)


def test_revision_is_stable_and_changes_with_one_weight(folder: Path, components: Components) -> None:
    assert load(folder).revision == components.revision
    edited(folder / "vae" / "diffusion_pytorch_model.safetensors", lambda state: state["decoder.conv_in.bias"].add_(1))
    changed = load(folder).revision
    assert changed != components.revision
    assert len(changed) == 12


def test_variant_is_detected_by_shape_and_turbo_only_by_what_is_said(tmp_path: Path) -> None:
    variants = model_config.VARIANTS
    assert variant_of(variants["large"].mmdit) == "large"
    assert variant_of(variants["medium"].mmdit) == "medium"
    assert variant_of(tiny.MMDIT_X) == "other"
    assert variant_of(variants["large-turbo"].mmdit, "large-turbo") == "large-turbo"


@pytest.mark.parametrize(
    ("said", "message"),
    [("medium", "hold no medium: found .*depth=4.*expected .*depth=24"), ("huge", "'huge', expected one of large")],
)
def test_wrong_variant_is_refused(diffusers_folder: Path, said: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load(diffusers_folder, variant=said)


# fp8


def linears(state: State) -> list[str]:
    """What the fp8 files quantise: the weights of linears."""
    return [name for name, t in state.items() if name.endswith(".weight") and t.ndim == 2 and "embedding" not in name]


def scaled(state: State, scale: str, hint: str, names: list[str]) -> None:
    for name in names:
        factor = state[name].abs().max() / FP8_MAX
        state[name] = (state[name] / factor).to(FP8)
        state[f"{name[:-6]}{scale}"] = factor
        state[f"{name[:-6]}{hint}"] = torch.ones(())


def dequantised(path: Path, prefix: str, scale: str) -> State:
    state = load_file(path)
    quantised = [name for name, t in state.items() if t.dtype == FP8 and name.endswith(".weight")]
    return {name.removeprefix(prefix): state[name].float() * state[f"{name[:-6]}{scale}"] for name in quantised}


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_plain_fp8_is_cast(main: Path, kind: torch.dtype) -> None:
    edited(main, lambda state: state.update({name: t.to(kind) for name, t in state.items()}))
    expected = load_file(main)
    found = load(main)
    for name, tensor in found.mmdit.state_dict().items():
        assert torch.equal(tensor, expected[DIFFUSION + name].float()), name


@pytest.mark.parametrize(
    ("scale", "hint", "marker"),
    [
        ("scale_weight", "scale_input", {DIFFUSION + "scaled_fp8": torch.zeros(2, dtype=FP8)}),
        ("weight_scale", "input_scale", {}),
    ],
    ids=["scale_weight", "weight_scale"],
)
def test_scaled_fp8_is_multiplied_by_its_scale(main: Path, scale: str, hint: str, marker: State) -> None:
    def quantise(state: State) -> None:
        scaled(state, scale, hint, [name for name in linears(state) if name.startswith(DIFFUSION)])
        state.update(marker)

    edited(main, quantise)
    expected = dequantised(main, DIFFUSION, scale)
    state = load(main).mmdit.state_dict()
    assert len(expected) > 40
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor), name


@torch.inference_mode()
def test_scaled_fp8_t5_gives_what_its_dequantised_weights_give(components: Components, main: Path) -> None:
    path = main.parent / "text_encoders" / "t5xxl.safetensors"

    def quantise(state: State) -> None:
        names = [name for name in linears(state) if "shared" not in name and "bias" not in name]
        scaled(state, "scale_weight", "scale_input", names)
        state["scaled_fp8"] = torch.zeros(0, dtype=FP8)

    edited(path, quantise)
    found = load(main)
    weights = dequantised(path, "", "scale_weight")
    assert len(weights) == 14
    state = found.text.t5.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in weights.items())
    ours, theirs = (one.text.encode(["the red cat"], 77)[0].context for one in (found, components))
    # 3 bits of mantissa leave a few per cent; a forgotten scale would be off by a factor of hundreds.
    assert (ours - theirs).norm() < 0.2 * theirs.norm()


def test_scale_for_each_row_is_applied_to_its_row(main: Path) -> None:
    name = DIFFUSION + "context_embedder.weight"

    def quantise(state: State) -> None:
        factors = state[name].abs().amax(dim=1, keepdim=True) / FP8_MAX
        state[name] = (state[name] / factors).to(FP8)
        state[DIFFUSION + "context_embedder.weight_scale"] = factors

    edited(main, quantise)
    expected = dequantised(main, DIFFUSION, "weight_scale")["context_embedder.weight"]
    assert torch.equal(load(main).mmdit.context_embedder.weight, expected)


def test_layer_with_a_quantisation_note_of_its_own_is_multiplied_by_its_scale(main: Path) -> None:
    layer = DIFFUSION + "context_embedder"

    def quantise(state: State) -> None:
        scaled(state, "weight_scale", "input_scale", [f"{layer}.weight"])
        state[f"{layer}.comfy_quant"] = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)

    edited(main, quantise)
    expected = dequantised(main, DIFFUSION, "weight_scale")["context_embedder.weight"]
    assert torch.equal(load(main).mmdit.context_embedder.weight, expected)


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ("float8_e4m3fn", "context_embedder.weight is marked as scaled fp8 but has no scale"),
        ("nvfp4", "context_embedder is quantised as nvfp4; expected"),
    ],
)
def test_quantisation_that_the_header_tells_of_is_heeded(main: Path, form: str, message: str) -> None:
    layer = DIFFUSION + "context_embedder"
    state = load_file(main)
    state[f"{layer}.weight"] = state[f"{layer}.weight"].to(FP8)
    save_file(state, main, metadata={"_quantization_metadata": json.dumps({"layers": {layer: {"format": form}}})})
    with pytest.raises(CheckpointError, match=message):
        load(main)


# Wrong files


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def with_fp8_but_no_scale(state: State) -> None:
    name = DIFFUSION + "context_embedder.weight"
    state[name] = state[name].to(FP8)
    state[DIFFUSION + "scaled_fp8"] = torch.zeros(2, dtype=FP8)


def with_blocks(count: int) -> Callable[[State], None]:
    def edit(state: State) -> None:
        name = DIFFUSION + "joint_blocks.{}.x_block.attn.qkv.weight"
        state.update({name.format(i): torch.zeros(1) for i in range(count)})

    return edit


def with_bad_scale(scale: Tensor) -> Callable[[State], None]:
    def edit(state: State) -> None:
        state[DIFFUSION + "context_embedder.scale_weight"] = scale

    return edit


NET = "transformer/diffusion_pytorch_model.safetensors"
CLIP = "text_encoder/model.safetensors"

WRONG_FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda f: cut(f / NET), r"diffusion_pytorch_model.safetensors is truncated or corrupt: \d+ bytes"),
    "empty file": (lambda f: (f / NET).write_bytes(b""), "is not a safetensors file, or it is cut short: 0 bytes"),
    "not safetensors": (lambda f: (f / NET).write_bytes(b"<html>" * 99), "is not a safetensors file"),
    "broken header": (
        lambda f: (f / NET).write_bytes((9).to_bytes(8, "little") + b"{'a': 1}}"),
        "its header is broken",
    ),
    "lfs pointer": (
        lambda f: (f / NET).write_bytes(b"version https://git-lfs.github.com/spec/v1\n"),
        "Git LFS pointer",
    ),
    "missing file": (lambda f: (f / NET).unlink(), "transformer holds no weights, expected diffusion_pytorch_model"),
    "pickle": (
        lambda f: (f / NET).rename(f / "transformer" / "diffusion_pytorch_model.bin"),
        r"only pickles, which can run code when loaded \(diffusion_pytorch_model.bin\)",
    ),
    "missing folder": (lambda f: shutil.rmtree(f / "vae"), "vae is missing: a folder"),
    "missing tensor": (
        lambda f: edited(f / NET, lambda s: s.pop("transformer_blocks.1.attn.to_k.weight")),
        "transformer: tensor transformer_blocks.1.attn.to_k.weight is missing",
    ),
    "extra tensor": (
        lambda f: edited(f / NET, lambda s: s.update(surprise=torch.zeros(1))),
        "diffusion_pytorch_model.safetensors: tensor surprise is not part of this model",
    ),
    "wrong shape": (
        lambda f: edited(f / NET, lambda s: s.update({"proj_out.bias": torch.zeros(63)})),
        r"diffusion_pytorch_model.safetensors: tensor proj_out.bias has shape \(63,\), expected \(64,\)",
    ),
    "whole numbers": (
        lambda f: edited(f / NET, lambda s: s.update({"proj_out.bias": torch.zeros(64, dtype=torch.int8)})),
        "tensor proj_out.bias holds I8, expected one of F64",
    ),
    "config of another size": (
        lambda f: edited_json(f / "transformer/config.json", num_layers=5),
        r"tensor transformer_blocks.3.* is missing \(and \d+ more\)",
    ),
    "config that no net can have": (
        lambda f: edited_json(f / "vae/config.json", norm_num_groups=7),
        "vae: no such network can be built",
    ),
    "quant convolutions": (
        lambda f: edited_json(f / "vae/config.json", use_quant_conv=True),
        "vae/config.json: use_quant_conv is True, expected False",
    ),
    "broken config": (lambda f: (f / "vae/config.json").write_text("{"), "vae/config.json is not JSON"),
    "config of a list": (lambda f: (f / "vae/config.json").write_text("[]"), "holds a list, expected an object"),
    "number that is none": (
        lambda f: edited_json(f / "transformer/config.json", num_layers="4"),
        "transformer/config.json: num_layers is '4', expected a whole number from 0 to 256",
    ),
    "more layers than any CLIP has": (
        lambda f: edited_json(f / "text_encoder_2/config.json", num_hidden_layers=257),
        "the layers of the CLIP-G: found 257, expected from 1 to 256",
    ),
    "more layers than any T5 has": (
        lambda f: edited_json(f / "text_encoder_3/config.json", num_layers=257),
        "the layers of the T5: found 257, expected from 1 to 256",
    ),
    "no layers": (
        lambda f: edited_json(f / "transformer/config.json", num_layers=0, dual_attention_layers=[]),
        "transformer/config.json: no such network can be built: depth is 0, expected from 1 to 256",
    ),
    "patches of another size": (
        lambda f: edited_json(f / "transformer/config.json", patch_size=4),
        "the MMDiT's patch size: found 4, expected 2",
    ),
    "VAE of three levels": (
        lambda f: edited_json(
            f / "vae/config.json",
            block_out_channels=[32, 32, 64],
            down_block_types=["DownEncoderBlock2D"] * 3,
            up_block_types=["UpDecoderBlock2D"] * 3,
        ),
        "the VAE's levels: found 3, expected 4",
    ),
    "missing config": (
        lambda f: (f / "text_encoder_3/config.json").unlink(),
        "config.json cannot be read: No such file",
    ),
    "broken index": (lambda f: (f / "model_index.json").write_text("{"), "model_index.json is not JSON"),
    "another pipeline": (
        lambda f: edited_json(f / "model_index.json", _class_name="FluxPipeline"),
        "model_index.json is for a FluxPipeline, expected StableDiffusion3Pipeline",
    ),
    "missing tensor of CLIP": (
        lambda f: edited(f / CLIP, lambda s: s.pop("text_model.final_layer_norm.bias")),
        "text_encoder: tensor final_layer_norm.bias is missing",
    ),
    "missing projection of CLIP-G": (
        lambda f: edited(f / "text_encoder_2/model.safetensors", lambda s: s.pop("text_projection.weight")),
        "text_encoder_2: tensor text_projection.weight is missing",
    ),
    "missing tensor of T5": (
        lambda f: edited(f / "text_encoder_3/model.safetensors", lambda s: s.pop("encoder.final_layer_norm.weight")),
        "text_encoder_3: tensor encoder.final_layer_norm.weight is missing",
    ),
    "missing projection of CLIP-L that is not square": (
        lambda f: [
            edited(f / CLIP, lambda s: s.pop("text_projection.weight")),
            edited_json(f / "text_encoder/config.json", projection_dim=32),
            edited_json(f / "transformer/config.json", pooled_projection_dim=160),
            edited(
                f / NET, lambda s: s.update({"time_text_embed.text_embedder.linear_1.weight": torch.zeros(128, 160)})
            ),
        ],
        "text_encoder: tensor text_projection.weight is missing",
    ),
    "widths that do not fit": (
        lambda f: edited_json(f / "transformer/config.json", pooled_projection_dim=2048),
        "CLIP-L and CLIP-G together: found 192, expected 2048",
    ),
    "missing tokenizer": (lambda f: shutil.rmtree(f / "tokenizer_2"), "tokenizer_2 is missing"),
    "tokens that the encoder has not": (
        lambda f: edited_vocabulary(f / "tokenizer_2", lambda known: known.update(dog=40_000)),
        "tokenizer_2: the largest token id is 40000, expected less than",
    ),
    "broken tokenizer": (lambda f: (f / "tokenizer/tokenizer.json").write_text("{"), "tokenizer is not a tokenizer"),
}


@pytest.mark.parametrize("case", WRONG_FOLDERS)
def test_wrong_diffusers_folder_is_one_clear_error(folder: Path, case: str) -> None:
    spoil, message = WRONG_FOLDERS[case]
    spoil(folder)
    with pytest.raises(CheckpointError, match=message):
        load(folder)


SHARD_INDEX = "diffusion_pytorch_model.safetensors.index.json"

WRONG_SHARDS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing shard": (
        lambda net: sorted(net.glob("*.safetensors"))[1].unlink(),
        r"00002-of-\d+.safetensors is missing: .*index.json names it as a shard",
    ),
    "broken index": (lambda net: (net / SHARD_INDEX).write_text('{"weight_map"'), "index.json is not JSON"),
    "index without a map": (lambda net: (net / SHARD_INDEX).write_text("{}"), "has no weight_map"),
    "index out of the folder": (
        lambda net: edited_json(net / SHARD_INDEX, weight_map={"a": "../vae/x.safetensors"}),
        "points to '../vae/x.safetensors', expected a file beside it",
    ),
    "tensor not in its shard": (
        lambda net: edited(sorted(net.glob("*.safetensors"))[0], lambda s: s.pop("pos_embed.proj.bias")),
        "tensor pos_embed.proj.bias is missing: .*index.json says it is there",
    ),
}


@pytest.mark.parametrize("case", WRONG_SHARDS)
def test_wrong_shards_are_one_clear_error(pipe: StableDiffusion3Pipeline, folder: Path, case: str) -> None:
    net = folder / "transformer"
    shutil.rmtree(net)
    pipe.transformer.save_pretrained(net, max_shard_size="1MB")
    spoil, message = WRONG_SHARDS[case]
    spoil(net)
    with pytest.raises(CheckpointError, match=message):
        load(folder)


WRONG_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (cut, "sd3.5_tiny.safetensors is truncated or corrupt"),
    "truncated CLIP": (lambda m: cut(m.parent / "text_encoders/clip_g.safetensors"), "clip_g.safetensors is truncated"),
    "missing tensor": (
        lambda m: edited(m, lambda s: s.pop(DIFFUSION + "joint_blocks.3.x_block.attn.proj.bias")),
        "tensor joint_blocks.3.x_block.attn.proj.bias is missing",
    ),
    "extra tensor": (
        lambda m: edited(m, lambda s: s.update({"surprise": torch.zeros(1)})),
        "sd3.5_tiny.safetensors: tensor surprise is not part of this model",
    ),
    "wrong shape": (
        lambda m: edited(m, lambda s: s.update({"first_stage_model.decoder.conv_out.bias": torch.zeros(4)})),
        r"tensor first_stage_model.decoder.conv_out.bias has shape \(4,\), expected \(3,\)",
    ),
    "more blocks than any MMDiT has": (
        lambda m: edited(m, with_blocks(257)),
        "sd3.5_tiny.safetensors: its tensors are of no known shape: depth is 257, expected from 1 to 256",
    ),
    "patches of another size": (
        lambda m: edited(m, lambda s: s.update({DIFFUSION + "x_embedder.proj.weight": torch.zeros(128, 16, 4, 4)})),
        "the MMDiT's patch size: found 4, expected 2",
    ),
    "no MMDiT": (
        lambda m: edited(m, lambda s: [s.pop(key) for key in list(s) if key.startswith(DIFFUSION)]),
        "holds no MMDiT: tensor x_embedder.proj.weight is missing",
    ),
    "no VAE": (
        lambda m: edited(m, lambda s: [s.pop(key) for key in list(s) if key.startswith("first_stage")]),
        r"holds no VAE, and .* holds no weights, expected one \*vae\*.safetensors",
    ),
    "no CLIP-L": (
        lambda m: (m.parent / "text_encoders/clip_l.safetensors").unlink(),
        "clip_l.safetensors is missing: expected in .*text_encoders",
    ),
    "two files for one encoder": (
        lambda m: [
            (m.parent / "text_encoders/clip_l.safetensors").rename(m.parent / "text_encoders/clip_l_a.safetensors"),
            shutil.copy(
                m.parent / "text_encoders/clip_l_a.safetensors", m.parent / "text_encoders/clip_l_b.safetensors"
            ),
        ],
        "both .*clip_l_a.safetensors and .*clip_l_b.safetensors could be the clip_l encoder, expected one",
    ),
    "no tokenizers": (lambda m: shutil.rmtree(m.parent / "tokenizer"), "tokenizer is missing: say where"),
    "marker without scales": (
        lambda m: edited(m, with_fp8_but_no_scale),
        "context_embedder.weight is marked as scaled fp8 but has no scale, expected context_embedder.scale_weight",
    ),
    "scale that is not finite": (
        lambda m: edited(m, with_bad_scale(torch.tensor(torch.nan))),
        "scale model.diffusion_model.context_embedder.scale_weight is not finite and positive",
    ),
    "scale of whole numbers": (
        lambda m: edited(m, with_bad_scale(torch.ones((), dtype=torch.int8))),
        "context_embedder.weight has a scale of I8, expected one of F64",
    ),
    "scale of a wrong shape": (
        lambda m: edited(m, with_bad_scale(torch.ones(5))),
        r"context_embedder.weight has a scale of shape \(5,\), expected one number",
    ),
}


@pytest.mark.parametrize("case", WRONG_FILES)
def test_wrong_single_file_is_one_clear_error(main: Path, case: str) -> None:
    spoil, message = WRONG_FILES[case]
    spoil(main)
    with pytest.raises(CheckpointError, match=message):
        load(main)


def test_folder_with_two_single_files_is_refused_by_their_names(main: Path) -> None:
    shutil.copy(main, main.with_name("another.safetensors"))
    with pytest.raises(
        CheckpointError, match=r"another.safetensors, sd3.5_tiny.safetensors, expected model_index.json or one"
    ):
        load(main.parent)


def test_folder_that_was_fetched_in_part_is_refused(folder: Path) -> None:
    (folder / FETCHED.parent).mkdir()
    (folder / FETCHED).write_text('{"written": {}}')
    load(folder)
    (folder / FETCHED).write_text('{"written": null}')
    with pytest.raises(CheckpointError, match=f"{folder} is not complete: .* goes on from there"):
        load(folder)


def test_folder_that_is_fetched_anew_while_it_is_loaded_is_refused(folder: Path) -> None:
    (folder / FETCHED.parent).mkdir()
    (folder / FETCHED).write_text('{"commit": "a", "written": {}}')

    def free(_: torch.device) -> int:  # asked once the files are found, before they are read
        (folder / FETCHED).write_text('{"commit": "b", "written": {}}')
        return 10**12

    with pytest.raises(CheckpointError, match=f"{folder} was fetched anew"):
        load(folder, free=free)


def test_path_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nothing does not exist"):
        load(tmp_path / "nothing")


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".bin"])
def test_pickle_is_refused_unopened(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_bytes(b"\x80\x04cos\nsystem\n")
    with pytest.raises(CheckpointError, match="is a pickle, which can run code when loaded"):
        load(path)


def test_folder_of_pickles_is_refused(tmp_path: Path) -> None:
    (tmp_path / "sd3.5_large.ckpt").write_bytes(b"\x80\x04")
    with pytest.raises(CheckpointError, match=r"only pickles, which can run code when loaded \(sd3.5_large.ckpt\)"):
        load(tmp_path)


def test_header_broken_anywhere_is_never_another_error(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(3, 2), "b.weight": torch.zeros(5).to(FP8)}, path, metadata={"format": "pt"})
    good = path.read_bytes()
    random = Random(0)
    refused = 0
    for _ in range(500):
        broken = bytearray(good)
        for _ in range(random.randint(1, 3)):
            broken[random.randrange(len(good) - 29)] = random.choice(b'\x00\xff{}[]",:-019ab')
        path.write_bytes(broken)
        try:
            weights = Weights(tensors_of([WeightFile(path)]), path)
            weights.expect({"a": (3, 2), "b.weight": (5,)})
            assert weights.read("a", torch.device("cpu"), torch.float32).shape == (3, 2)
        except CheckpointError:
            refused += 1
    assert refused > 300


def test_large_matrices_are_quantised_as_they_are_loaded(tiny_bundle: Path) -> None:
    whole, low = (load_components(tiny_bundle, "cpu", torch.float32, fp8=fp8).mmdit for fp8 in (False, True))
    for name, layer in low.named_modules():
        if isinstance(layer, Fp8Linear):
            rows = quantized(whole.get_parameter(f"{name}.weight"))
            assert torch.equal(layer.weight.float(), rows.values.float())
            assert torch.equal(layer.scales, rows.scales)
    assert {name for name, layer in low.named_modules() if isinstance(layer, Fp8Linear)} == {
        name for name, layer in whole.named_modules() if isinstance(layer, torch.nn.Linear) and is_fp8(name)
    }
    sizes = [footprint(tiny_bundle, torch.float32, fp8=fp8)["MMDiT"] for fp8 in (False, True)]
    assert sizes == [sum(t.nbytes for t in net.state_dict().values()) for net in (whole, low)]
