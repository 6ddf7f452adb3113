"""Distillation on a real GPU, where whole pipelines go the fast way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from model.training.adapters import adapted
from model.training.distillation import Distillation, Run
from model.training.guide import Guide
from model.training.loop import Average, Leg
from model.training.plan import Phase, Size
from model.training.teacher import load_teacher, write_comparison
from model.training.windows import guided, windows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE = torch.device("cuda")
DEMO = Path(__file__).parents[2] / "model" / "bundles" / "demo"


def test_a_sheet_shows_the_teacher_above_a_student_of_low_rank(tmp_path: Path) -> None:
    teacher = load_teacher(DEMO, DEVICE)
    student = adapted(teacher.mmdit, rank=4).to(DEVICE)
    write_comparison(teacher, student, 2, teacher.shift, tmp_path / "turbo.png", size=64)
    with Image.open(tmp_path / "turbo.png") as sheet:
        assert sheet.height > 2 * 32


def test_the_fast_way_by_graphs_goes_where_the_plain_one_does() -> None:
    teacher = load_teacher(DEMO, DEVICE)
    guide, texts = Guide(teacher, teacher.guidance), teacher.read_captions(["a red heart", "a blue house at sea"])
    (first, *_) = windows(4, teacher.shift, 6, 1024)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 16, 64, 64, generator=generator).to(DEVICE)
    found = [guide(x, first, texts) for _ in range(3)]
    with torch.no_grad():
        plain = guided(teacher, x, first, texts, teacher.guidance)
    assert guide.graphs is not None
    assert guide.graphs.held == 1
    assert torch.equal(found[1], found[2])
    moved = (plain - x).norm()
    assert (found[2] - plain).norm() < 0.03 * moved


def test_a_student_learns_by_graphs_what_it_learns_without(tmp_path: Path) -> None:
    losses = []
    for by_graphs in (True, False):
        torch.manual_seed(0)
        teacher = load_teacher(DEMO, DEVICE)
        student = adapted(teacher.mmdit, rank=4).to(DEVICE)
        settings = Distillation(
            out=tmp_path, teacher=DEMO, minutes=1.0, rank=4, plan=(Phase(1.0, (Size(256, 256, 8), Size(256, 192, 8))),),
            processes=0,
        )  # fmt: skip
        leg = Leg.start(1.0, 0, (0.0, 1.0), DEVICE)
        run = Run(settings, teacher, student, Average(student, 0.9), leg)
        if not by_graphs:
            run.descent.graphs = run.guide.graphs = None
        losses.append(torch.stack([loss for _ in range(4) for loss in run.run()]).cpu())
        if run.descent.graphs and run.guide.graphs:  # of both sizes, and of the optimizer
            assert (run.descent.graphs.held, run.guide.graphs.held) == (3, 2)
    assert torch.isfinite(losses[0]).all()
    torch.testing.assert_close(losses[0], losses[1], rtol=0.03, atol=1e-3)
