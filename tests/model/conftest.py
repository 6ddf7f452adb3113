"""One tiny pipeline of diffusers, and its weights in both layouts, for all tests of the model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from model.checkpoint import Components, load_components
from tests.model import tiny


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    # Nets this small lose more to waiting threads than they gain, most of all beside other work.
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def pipe() -> StableDiffusion3Pipeline:
    return tiny.pipeline()


@pytest.fixture(scope="session")
def diffusers_folder(pipe: StableDiffusion3Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "diffusers"
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def original_file(pipe: StableDiffusion3Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_original(pipe, tmp_path_factory.mktemp("tiny") / "original")


@pytest.fixture(scope="session")
def components(diffusers_folder: Path) -> Components:
    return load_components(diffusers_folder, "cpu", torch.float32)
