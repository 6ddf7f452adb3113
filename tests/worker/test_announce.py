"""Models made known without a worker: their cards are those that a worker publishes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import redis
from safetensors.torch import load_file, save_file

from model.weights import CheckpointError
from worker.__main__ import main
from worker.announce import TRY_AGAIN, announce
from worker.contract.cards import ModelCard
from worker.contract.queue import CARDS
from worker.models import Loader, card_of
from worker.settings import ModelSource, WorkerSettings
from worker.status import CANNOT_START


def settings_for(bundle: Path, redis_url: str = "redis://127.0.0.1:1/0") -> WorkerSettings:
    return WorkerSettings(models=(ModelSource("tiny", bundle),), device="cpu", dtype="fp32", redis_url=redis_url)


def published(redis_url: str) -> dict[str, ModelCard]:
    with redis.Redis.from_url(redis_url) as client:
        return {name.decode(): ModelCard.from_json(card) for name, card in client.hgetall(CARDS).items()}


def test_card_of_the_files_alone_is_the_card_of_the_loaded_model(tiny_bundle: Path) -> None:
    settings = settings_for(tiny_bundle)
    (source,) = settings.models
    assert card_of(source, settings) == Loader(settings).load(source).card


def test_card_without_t5_is_that_of_the_model_loaded_without_t5(tiny_bundle: Path) -> None:
    settings = WorkerSettings(models=(ModelSource("tiny", tiny_bundle),), device="cpu", dtype="fp32", t5=False)
    (source,) = settings.models
    assert card_of(source, settings) == Loader(settings).load(source).card


def test_announced_models_are_known_without_a_worker(tiny_bundle: Path, redis_url: str) -> None:
    settings = settings_for(tiny_bundle, redis_url)
    assert announce(settings) == 0
    assert published(redis_url) == {"tiny": card_of(settings.models[0], settings)}


def test_one_broken_model_makes_none_of_them_known(
    tiny_bundle: Path, tmp_path: Path, redis_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    models = (ModelSource("tiny", tiny_bundle), ModelSource("gone", tmp_path / "none"))
    assert announce(WorkerSettings(models=models, device="cpu", redis_url=redis_url)) == CANNOT_START
    assert published(redis_url) == {}
    assert str(tmp_path / "none") in capsys.readouterr().err


def test_weights_that_do_not_fit_the_network_are_not_announced(tiny_bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_bundle, tmp_path / "cut")
    file = tmp_path / "cut" / "transformer" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    state.pop("proj_out.weight")
    save_file(state, file)
    settings = settings_for(tmp_path / "cut")
    with pytest.raises(CheckpointError, match=r"proj_out\.weight"):
        card_of(settings.models[0], settings)


def test_redis_that_does_not_answer_is_told_and_worth_another_try(
    tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert announce(settings_for(tiny_bundle)) == TRY_AGAIN
    assert "Redis does not answer" in capsys.readouterr().err


def test_worker_command_announces_without_a_gpu_and_ends(
    tiny_bundle: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DARKROOM_MODELS", f"tiny={tiny_bundle}")
    monkeypatch.setenv("DARKROOM_REDIS_URL", redis_url)
    monkeypatch.setenv("DARKROOM_DEVICE", "cuda:7")
    assert main(["--announce", "--gpus", "all"]) == 0
    assert list(published(redis_url)) == ["tiny"]
