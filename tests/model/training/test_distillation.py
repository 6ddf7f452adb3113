"""Distillation on tiny nets: the student nears its teacher, legs resume, and what comes out is a variant to serve."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from model.card import CARD, FILE
from model.checkpoint import load_components
from model.config import MMDiTConfig
from model.layouts import find
from model.mmdit import MMDiT
from model.params import GenerationParams
from model.pipeline import Pipeline, run
from model.sampling import Growth, Shift, noise, sigmas
from model.training import distillation
from model.training.adapters import adapted, save_difference
from model.training.distillation import TERMINAL, Distillation, distil
from model.training.guide import Guide
from model.training.loop import Average, Leg, load_shards, read_record
from model.training.plan import Phase, Size
from model.training.teacher import Teacher, load_teacher, write_comparison
from model.training.variant import LIMIT_BYTES, export_turbo
from model.training.windows import guided, velocity, windows
from model.work import generate
from tests.model import tiny

CPU = torch.device("cpu")


TURBO = Shift(3.0, TERMINAL)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, tiny_bundle: Path) -> Path:
    """The tiny bundle, in a folder whose neighbours are its variants'."""
    link = tmp_path_factory.mktemp("bundles") / "tiny"
    link.symlink_to(tiny_bundle)
    return link


@pytest.fixture(scope="module")
def teacher(bundle: Path) -> Teacher:
    return load_teacher(bundle, CPU)


def distillation_of(bundle: Path, out: Path) -> Distillation:
    return Distillation(
        out=out, teacher=bundle, minutes=0.0, rank=8, plan=(Phase(1.0, (Size(32, 32, 4),)),), measured=4, substeps=2,
        warmup=2, peak=3e-3, average=0.8, processes=0, samples=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def turbo(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of a few steps."""
    out = tmp_path_factory.mktemp("turbo")
    distil(distillation_of(bundle, out), CPU)
    return out


@pytest.mark.parametrize("shift", [TURBO, Shift(Growth(), TERMINAL)])
@pytest.mark.parametrize("tokens", [256, 4096])
def test_windows_join_the_levels_of_a_run(shift: Shift, tokens: int) -> None:
    found = windows(4, shift, 4, tokens)
    assert [*(window.start for window in found), 0.0] == pytest.approx(sigmas(4, shift, tokens))
    assert [window.end for window in found[:-1]] == [window.start for window in found[1:]]
    for window in found:
        assert len(window.sigmas) == 5
        assert list(window.sigmas) == sorted(window.sigmas, reverse=True)


def test_the_teacher_goes_where_its_pipeline_does(teacher: Teacher) -> None:
    assert teacher.vae is not None
    pipeline = Pipeline(teacher.mmdit, teacher.vae, teacher.encoders, shift=Shift(), t5_length=teacher.t5_length)
    params = GenerationParams(prompt="a red cat", width=64, height=64, steps=2, guidance_scale=3.0, seed=4)
    generator = generate(params, pipeline.shift)
    work = next(generator)
    handle = None
    while type(work).__name__ != "Decode":
        (result,) = pipeline.run([work])
        handle = result if type(work).__name__ == "Begin" else handle
        work = generator.send(result)
    with torch.no_grad():
        x = noise(4, 64, 64)[None]
        for window in windows(2, Shift(), 1, 16):
            x = guided(teacher, x, window, teacher.read_captions(["a red cat"]), 3.0)
    assert handle is not None
    torch.testing.assert_close(x[0], handle.x, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_the_fast_way_goes_where_the_plain_one_does(teacher: Teacher, scale: float) -> None:
    x, texts = torch.randn(2, 16, 8, 8), teacher.read_captions(["a red cat", "the sea"])
    guide = Guide(teacher, scale, fast=True)
    with torch.no_grad():
        for window in windows(2, TURBO, 3, 16):
            torch.testing.assert_close(
                guide(x, window, texts), guided(teacher, x, window, texts, scale), atol=1e-4, rtol=1e-4
            )


def test_captions_are_read_from_tokens_as_from_words(teacher: Teacher) -> None:
    captions = ["a red cat", "", "the sea"]
    read = teacher.reader()
    tokens = [torch.tensor(rows) for rows in zip(*map(read, captions), strict=True)]
    found, expected = teacher.read(tokens), teacher.read_captions(captions)
    torch.testing.assert_close(found.context, expected.context)
    torch.testing.assert_close(found.pooled, expected.pooled)


def test_a_student_begins_as_its_teacher_and_only_its_change_is_trained(teacher: Teacher) -> None:
    student = adapted(teacher.mmdit, 8)
    x, texts = torch.randn(1, 16, 8, 8), teacher.read_captions(["a cat"])
    torch.testing.assert_close(velocity(student, x, 0.9, texts), velocity(teacher.mmdit, x, 0.9, texts))
    trained = {name.rpartition(".")[2] for name, p in student.named_parameters() if p.requires_grad}
    assert trained == {"a", "b", "c"}
    assert student.joint_blocks[0].x_block.attn.qkv.a.shape == (3, 8, 128)
    assert student.joint_blocks[0].x_block.adaLN_modulation[1].a.shape == (1, 4, 128)


def test_the_student_nears_its_teacher(bundle: Path, teacher: Teacher, tmp_path: Path) -> None:
    torch.manual_seed(0)
    small = MMDiT(MMDiTConfig(depth=2, hidden=64, heads=1, context_dim=256, pooled_dim=192, pos_embed_grid=8))
    tiny.randomize(small)
    settings, teacher = distillation_of(bundle, tmp_path), replace(teacher, mmdit=small)
    student = adapted(small, settings.rank)
    leg = Leg.start(1.0, 0, (0.0, 1.0), CPU)
    loop = distillation.Run(settings, teacher, student, Average(student, settings.average), leg)
    before = loop.averaged_distance()
    losses = torch.stack([loss for _ in range(10) for loss in loop.run()])
    assert losses[-8:].mean() < 0.7 * losses[:4].mean()
    assert loop.averaged_distance() < 0.8 * before


def test_a_run_writes_its_change_and_what_made_it(turbo: Path, bundle: Path) -> None:
    record = read_record(turbo)
    assert record["teacher"] == find(bundle).revision
    assert record["metrics"]["steps"] == 4
    assert 0 < record["metrics"]["distance"] < 10
    assert record["guidance"] == 3.0  # as the teacher's card says
    assert all(torch.isfinite(tensor).all() for tensor in load_shards(turbo, "turbo").values())


def test_a_run_goes_on_from_an_earlier_one_of_its_kind(turbo: Path, bundle: Path, teacher: Teacher) -> None:
    settings = replace(distillation_of(bundle, turbo), resume=turbo)
    student = adapted(teacher.mmdit, settings.rank)
    average = Average(student, 0.9)
    distillation.restore(average, settings)
    live, kept = load_shards(turbo, "live"), load_shards(turbo, "turbo")
    assert all(torch.equal(p, live[name]) for name, p in student.named_parameters() if p.requires_grad)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in average.state().items())
    again = replace(settings, out=turbo.parent / "again")
    distil(again, CPU)
    assert read_record(again.out)["before"]["metrics"] == read_record(turbo)["metrics"]
    with pytest.raises(ValueError, match="was distilled with rank 8, not 4"):
        distillation.restore(average, replace(settings, rank=4))


@pytest.mark.parametrize("wrong", [{"rank": 0}, {"steps": 0}, {"substeps": 0}, {"own": 1.5}])
def test_a_setting_out_of_range_is_refused(bundle: Path, tmp_path: Path, wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} is "):
        replace(distillation_of(bundle, tmp_path), **wrong)  # type: ignore[arg-type]


def test_a_saved_change_loads_as_the_student_that_was_trained(teacher: Teacher, bundle: Path, tmp_path: Path) -> None:
    student = adapted(teacher.mmdit, 8)
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    state = {name: p for name, p in student.named_parameters() if p.requires_grad}
    save_difference(state, student.config, tmp_path / FILE)
    (tmp_path / "base").symlink_to(bundle)
    (tmp_path / CARD).write_text('{"base": "base"}')
    loaded = load_components(tmp_path, CPU, torch.float32).mmdit
    x, texts = torch.randn(2, 16, 8, 8), teacher.read_captions(["a cat", "the sea"])
    with torch.no_grad():
        expected = velocity(student, x, 0.7, texts)
        assert (expected - velocity(teacher.mmdit, x, 0.7, texts)).abs().max() > 0.1
        torch.testing.assert_close(velocity(loaded, x, 0.7, texts), expected, atol=5e-3, rtol=5e-3)


def test_an_exported_run_is_a_variant_beside_its_base(turbo: Path, bundle: Path) -> None:
    out = bundle.parent / "tiny-turbo"
    assert export_turbo(bundle, turbo, out) < LIMIT_BYTES
    told = json.loads((out / CARD).read_text())
    assert told["defaults"] == {"steps": 4, "guidance_scale": 1.0, "sampler": "euler"}
    parts = load_components(out, CPU, torch.float32)
    assert parts.shift == Shift(3.0, 0.4)
    assert parts.revision != find(bundle).revision
    pipeline = Pipeline(parts.mmdit, parts.vae, parts.text, shift=parts.shift, t5_length=32)
    params = GenerationParams(prompt="a cat", width=64, height=64, steps=4, guidance_scale=1.0, seed=0)
    assert run(generate(params, pipeline.shift), pipeline).pixels.shape == (64, 64, 3)
    with pytest.raises(FileExistsError, match="is not empty"):
        export_turbo(bundle, turbo, out)


def test_an_exported_change_is_as_large_as_its_scale(turbo: Path, bundle: Path) -> None:
    plain, twice = (bundle.parent / name for name in ("plain", "twice"))
    export_turbo(bundle, turbo, plain)
    export_turbo(bundle, turbo, twice, scale=2.0)
    base, once, more = (load_components(path, CPU, torch.float32).mmdit for path in (bundle, plain, twice))
    for name, weight in base.named_parameters():
        change = once.get_parameter(name) - weight
        torch.testing.assert_close(more.get_parameter(name) - weight, 2 * change, atol=2e-4, rtol=2e-3)
    assert read_record(twice)["scale"] == 2.0
    with pytest.raises(ValueError, match="scale is 3, expected more than 0 and at most 2"):
        export_turbo(bundle, turbo, bundle.parent / "thrice", scale=3.0)


def test_an_exported_run_may_end_on_another_noise_level_than_it_learnt_with(turbo: Path, bundle: Path) -> None:
    out = bundle.parent / "later"
    export_turbo(bundle, turbo, out, terminal=0.75)
    assert load_components(out, CPU, torch.float32).shift == Shift(3.0, 0.75)
    told = read_record(out)
    assert (told["shift"]["shift_terminal"], told["sampled"]["shift_terminal"]) == (0.4, 0.75)
    with pytest.raises(ValueError, match="terminal is 1, expected between 0 and 1"):
        export_turbo(bundle, turbo, bundle.parent / "never", terminal=1.0)


def test_a_run_is_exported_for_its_own_teacher_only(turbo: Path, bundle: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "training.json").write_text(json.dumps(read_record(turbo) | {"teacher": "0123456789ab"}))
    with pytest.raises(ValueError, match="was distilled from revision 0123456789ab"):
        export_turbo(bundle, other, tmp_path / "out")
    (other / "training.json").write_text('{"what": "flow"}')
    with pytest.raises(ValueError, match="holds a flow, expected what distill writes"):
        export_turbo(bundle, other, tmp_path / "out")


def test_what_is_no_teacher_is_refused(turbo: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds a turbo, expected a bundle or a trained flow"):
        load_teacher(turbo, CPU)
    with pytest.raises(ValueError, match="expected a bundle or a run"):
        load_teacher(tmp_path, CPU)


def test_a_sheet_shows_the_teacher_above_its_student(teacher: Teacher, tmp_path: Path) -> None:
    student = adapted(teacher.mmdit, 2)
    write_comparison(teacher, student, 2, TURBO, tmp_path / "turbo.png", size=64)
    with Image.open(tmp_path / "turbo.png") as sheet:
        assert sheet.height > 2 * 32
        assert sheet.width > 5 * 32
