"""Loading a model to serve: its card, and what is wrong with the one that it brings."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from model.checkpoint import CheckpointError
from tests.tiny_bundle import CARD
from worker.models import NoSuchDevice, load, pick_device
from worker.settings import ModelSource, WorkerSettings


def loaded(bundle: Path, folder: Path, told: dict[str, Any], **settings: Any) -> Any:
    shutil.copytree(bundle, folder / "model")
    (folder / "model" / "darkroom.json").write_text(json.dumps(told))
    return load(ModelSource("tiny", folder / "model"), WorkerSettings(device="cpu", dtype="fp32", **settings))


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


def test_a_device_that_is_not_there_is_refused_by_name() -> None:
    absent = f"cuda:{torch.cuda.device_count()}"
    with pytest.raises(NoSuchDevice, match=f"DARKROOM_DEVICE is '{absent}'"):
        pick_device(absent)
