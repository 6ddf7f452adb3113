"""Distillation on a real GPU, where whole pipelines go the fast way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from model.training.adapters import adapted
from model.training.teacher import load_teacher, write_comparison

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEMO = Path(__file__).parents[2] / "model" / "bundles" / "demo"


def test_a_sheet_shows_the_teacher_above_a_student_of_low_rank(tmp_path: Path) -> None:
    device = torch.device("cuda")
    teacher = load_teacher(DEMO, device)
    student = adapted(teacher.mmdit, rank=4).to(device)
    write_comparison(teacher, student, 2, teacher.shift, tmp_path / "turbo.png", size=64)
    with Image.open(tmp_path / "turbo.png") as sheet:
        assert sheet.height > 2 * 32
