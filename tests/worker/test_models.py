"""Loading a model to serve: its card, and what is wrong with the one that it brings."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from structlog.testing import capture_logs

from model.fp8 import Fp8Linear
from model.room import NoRoom, check_room
from model.sampling import Shift
from model.weights import CheckpointError
from model.work import Begin
from tests.tiny_bundle import CARD, save_variant
from worker.models import Loader, Model, NoSuchDevice, advice, pick_device
from worker.settings import ModelSource, WorkerSettings


def loaded(bundle: Path, folder: Path, told: dict[str, Any], **settings: Any) -> Any:
    shutil.copytree(bundle, folder / "model")
    (folder / "model" / "darkroom.json").write_text(json.dumps(told))
    return loader(**settings).load(ModelSource("tiny", folder / "model"))


def loader(**settings: Any) -> Loader:
    return Loader(WorkerSettings(device="cpu", dtype="fp32", **settings))


@pytest.mark.parametrize("first", ["base", "variant"])
def test_a_variant_shares_all_but_its_mmdit_with_its_base(tiny_bundle: Path, tmp_path: Path, first: str) -> None:
    save_variant(tiny_bundle, tmp_path / "variant")
    load = loader().load
    models: dict[str, Model] = {}
    for name in (first, *{"base", "variant"} - {first}):
        models[name] = load(ModelSource(name, tmp_path / name))
    base, variant = models["base"].pipeline, models["variant"].pipeline
    assert variant.vae is base.vae
    assert variant.text is base.text
    changed = [n for n, t in base.mmdit.state_dict().items() if not torch.equal(t, variant.mmdit.state_dict()[n])]
    assert changed == ["final_layer.linear.weight"]
    assert models["base"].card.revision != models["variant"].card.revision


def test_models_of_different_folders_share_what_is_the_same(tiny_bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_bundle, tmp_path / "copy")
    load = loader().load
    first, second = load(ModelSource("a", tiny_bundle)), load(ModelSource("b", tmp_path / "copy"))
    assert second.pipeline.text is first.pipeline.text
    assert second.pipeline.vae is first.pipeline.vae
    assert second.pipeline.mmdit is not first.pipeline.mmdit


def test_fp8_on_a_machine_without_it_is_bf16_as_the_log_says(tiny_bundle: Path) -> None:
    with capture_logs() as lines:
        model = loader(models=f"a={tiny_bundle}", precision="a=fp8").load(ModelSource("a", tiny_bundle))
    assert not any(isinstance(layer, Fp8Linear) for layer in model.pipeline.mmdit.modules())
    assert [line["model"] for line in lines if line["event"].startswith("fp8 is for GPUs")] == ["a"]


def test_a_model_that_does_not_fit_says_what_would_help(tiny_bundle: Path) -> None:
    cramped = Loader(WorkerSettings(device="cpu", dtype="fp32"), free=lambda device: 1000)
    with pytest.raises(NoRoom, match=r"^a: .* DARKROOM_MODELS; even with DARKROOM_T5=no it would need [\d.]+ MB$"):
        cramped.load(ModelSource("a", tiny_bundle))


@pytest.mark.parametrize(
    ("free", "says"),
    [
        (
            21,
            "with DARKROOM_T5=no it would need 18.0 GB; with DARKROOM_TEXT_ENCODERS=offload it would need 16.5 GB; "
            "with DARKROOM_PRECISION=fp8 it would need 20.2 GB",
        ),
        (17, "with DARKROOM_TEXT_ENCODERS=offload it would need 16.5 GB"),
        (12, "even with DARKROOM_TEXT_ENCODERS=offload it would need 16.5 GB"),
    ],
)
def test_what_does_not_fit_on_a_gpu_is_told_what_would(free: int, says: str) -> None:
    needs = {"MMDiT": 16.3, "VAE": 0.2, "CLIP-L": 0.2, "CLIP-G": 1.3, "T5": 9.5}
    with pytest.raises(NoRoom) as refused:
        check_room({part: int(size * 1e9) for part, size in needs.items()}, torch.device("cuda"), free * 10**9)
    assert advice(refused.value, 9 * 10**9) == f"name fewer models in DARKROOM_MODELS; {says}"


def test_where_only_an_mmdit_in_fp8_is_missing_fewer_models_help_and_nothing_else() -> None:
    with pytest.raises(NoRoom) as refused:
        check_room({"MMDiT": 10**10}, torch.device("cuda"), 10**9)
    assert advice(refused.value, 10**10) == "name fewer models in DARKROOM_MODELS"


@pytest.mark.parametrize(("free", "said", "place"), [
    (5 * 10**9, "auto", "gpu"), (4 * 10**9, "auto", "offload"), (10**9, "gpu", "gpu"), (10**12, "cpu", "cpu"),
])  # fmt: skip
def test_text_encoders_are_where_the_setting_or_the_memory_wants_them(
    tiny_bundle: Path, free: int, said: Any, place: str
) -> None:
    source = ModelSource("a", tiny_bundle)
    settings = WorkerSettings(models=(source, ModelSource("gone", tiny_bundle / "gone")), text_encoders=said)
    found = Loader(settings, free=lambda device: free)._place_encoders(source, torch.device("cuda"), torch.float32)
    assert found == place


def test_on_a_cpu_text_encoders_are_with_the_model(tiny_bundle: Path) -> None:
    model = loader(text_encoders="offload").load(ModelSource("a", tiny_bundle))
    assert model.pipeline.text.to == model.pipeline.device == torch.device("cpu")


def test_what_a_variants_card_does_not_say_is_as_its_base_says(tiny_bundle: Path, tmp_path: Path) -> None:
    told = {"defaults": {"steps": 2, "guidance_scale": 1.0}, "negative_prompt": False, "shift_terminal": 0.5}
    model = loader().load(ModelSource("quick", save_variant(tiny_bundle, tmp_path / "variant", **told)))
    card, base = model.card, CARD["defaults"]
    assert (card.defaults.steps, card.defaults.guidance_scale) == (2, 1.0)
    assert (card.defaults.width, card.defaults.sampler) == (base["width"], base["sampler"])
    assert card.limits.min_pixels == CARD["limits"]["min_pixels"]
    assert card.description == "quick"
    assert card.negative_prompt is False
    assert model.pipeline.t5_length == CARD["t5_length"]
    assert model.pipeline.shift == Shift(3.0, 0.5)


def test_a_variant_whose_base_is_gone_is_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    folder = save_variant(tiny_bundle, tmp_path / "variant")
    (tmp_path / "base").unlink()
    with pytest.raises(CheckpointError, match="base does not exist"):
        loader().load(ModelSource("quick", folder))


@pytest.mark.parametrize(
    ("part", "wrong", "says"),
    [
        ("defaults", {"width": 1024}, "default size 1024x64"),
        ("defaults", {"width": 72}, "default size 72x64"),
        ("limits", {"min_pixels": 64 * 64 + 1}, "default size 64x64"),
        ("defaults", {"steps": 101}, "default steps 101"),
        ("defaults", {"guidance_scale": 21}, "default guidance_scale 21"),
        ("defaults", {"sampler": "ddim"}, "default sampler 'ddim'"),
        ("defaults", {"size": 64}, "wrong defaults or limits: .*'size'"),
        ("limits", {"max_steps": "many"}, "wrong defaults or limits"),
    ],
)
def test_a_card_that_contradicts_itself_is_refused(
    tiny_bundle: Path, tmp_path: Path, part: str, wrong: dict[str, Any], says: str
) -> None:
    told = CARD | {part: CARD[part] | wrong}
    with pytest.raises(CheckpointError, match=says):
        loaded(tiny_bundle, tmp_path, told)


def test_a_model_is_loaded_and_warmed_up_without_t5(tiny_bundle: Path, tmp_path: Path) -> None:
    model = loaded(tiny_bundle, tmp_path, CARD, t5=False)
    assert model.pipeline.text.t5 is None
    assert model.card.defaults.width == CARD["defaults"]["width"]


def test_a_loaded_model_has_a_bounded_cache_a_fingerprint_and_a_map_for_previews(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    model = loaded(tiny_bundle, tmp_path, CARD, embedding_cache_mb=3)
    (latents,) = model.pipeline.run([Begin(1, 64, 64)])
    assert model.pipeline.text.cache.max_bytes == 3 * 2**20
    assert model.fingerprint.startswith("fp_")
    assert model.pace.keys() == {"text_encode", "noise", "denoise", "vae_decode"}
    assert min(model.pace.values()) > 0
    assert model.pipeline.preview(latents).shape == (8, 8, 3)


def test_a_device_that_is_not_there_is_refused_by_name() -> None:
    absent = f"cuda:{torch.cuda.device_count()}"
    with pytest.raises(NoSuchDevice, match=f"DARKROOM_DEVICE is '{absent}'"):
        pick_device(absent)


def test_a_card_has_the_aliases_of_its_bundle_and_a_variant_none_of_its_base(tiny_bundle: Path, tmp_path: Path) -> None:
    card = loaded(tiny_bundle, tmp_path, CARD | {"aliases": ["sd3.5-large"], "trained_pixels": 4096}).card
    assert (card.aliases, card.trained_pixels) == (("sd3.5-large",), 4096)
    save_variant(tmp_path / "model", tmp_path / "variant")
    variant = loader().load(ModelSource("variant", tmp_path / "variant")).card
    assert (variant.aliases, variant.trained_pixels) == ((), 4096)


@pytest.mark.parametrize("aliases", ["sd3.5-large", [1], [""], {"a": 1}])
def test_aliases_that_are_no_names_are_refused(tiny_bundle: Path, tmp_path: Path, aliases: Any) -> None:
    with pytest.raises(CheckpointError, match=r"aliases in darkroom\.json is .*; allowed: a list of names"):
        loaded(tiny_bundle, tmp_path, CARD | {"aliases": aliases})
