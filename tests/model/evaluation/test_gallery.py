"""The sheets of pictures to look at."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from model.evaluation.gallery import main, sheet
from model.evaluation.subject import load_subject


def test_a_sheet_shows_a_picture_for_each_prompt_and_seed(tiny_bundle: Path) -> None:
    subject = load_subject(tiny_bundle, torch.device("cpu"), "fp32")
    made = sheet(subject, [("a cat", 1), ("a cat", 2), ("a dog", 1)], columns=2)
    side = subject.card.width // 2
    assert made.width == 2 * (side + 8) + 8
    cells = [made.convert("RGB").crop((left, 8, left + side, 8 + side)) for left in (8, 16 + side)]
    assert cells[0].tobytes() != cells[1].tobytes()


def test_a_folder_without_a_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", str(tmp_path), "--styles", str(tmp_path / "a.png")]) == 1
    assert str(tmp_path) in capsys.readouterr().err


@pytest.mark.slow
def test_one_prompt_goes_through_styles_and_seeds(tiny_bundle: Path, tmp_path: Path) -> None:
    assert main(["--model", str(tiny_bundle), "--styles", str(tmp_path / "a.png")]) == 0
    with Image.open(tmp_path / "a.png") as image:
        assert image.width == 4 * (32 + 8) + 8
