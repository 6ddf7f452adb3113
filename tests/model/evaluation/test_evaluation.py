"""The whole evaluation on tiny random weights: what it makes, counts, prints and writes."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from model.evaluation.__main__ import RECORD, main
from model.evaluation.checker import Checker, Reading, Seen
from model.evaluation.evaluation import Evaluation, Evaluator, Removal, Result
from model.evaluation.plan import FULL, SAMPLE, Budget, Plan, settings_for, work
from model.evaluation.prompts import Asked, OpenRequest, Request
from model.evaluation.rendering import Batches, Go, Picture, Processes, together
from model.evaluation.scores import SCORES, Count, judge
from model.evaluation.sheet import wrong
from model.evaluation.subject import Card, load_subject
from model.evaluation.table import Header, outside, recorded, table, to_json, versus
from model.params import GenerationParams
from model.pipeline import run
from model.work import generate
from tests.tiny_bundle import save_variant

CARD = Card(steps=16, guidance_scale=4.0, width=512, height=512)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def checker_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checker that never learnt anything."""
    path = tmp_path_factory.mktemp("checker") / "checker.safetensors"
    torch.manual_seed(0)
    Checker(64, {"accuracy": {"clean_shape": 0.1, "shape_flat": 0.2, "malformed": 0.3}}).save(path)
    return path


def evaluate(checker_file: Path, out: Path, model: Path, *more: str) -> int:
    files = ["--model", str(model), "--out", str(out), "--checker", str(checker_file)]
    return main([*files, "--device", "cpu", "--processes", "0", "--prompts", "1", *more])


def counts(right: int, asked: int) -> dict[str, Count]:
    return dict.fromkeys(SCORES, Count(right, asked))


HEADER = Header(
    model="demo", revision="abc", command="python -m model.evaluation", device="2 cores", torch="2", date="2026-01-01",
    data_version="2", prompts=40, steps=16, guidance_scale=4.0, width=512, height=512, minutes=11.0, stopped=False,
    checker={"accuracy": {"clean_shape": 0.987}},
)  # fmt: skip


def bundle_of(tiny: Path, folder: Path, **card: object) -> Path:
    """The tiny weights with another card."""
    shutil.copytree(tiny, folder)
    told = json.loads((folder / "darkroom.json").read_text())
    defaults = {**told["defaults"], "steps": 1, "guidance_scale": card.pop("guidance_scale", 3.0)}
    (folder / "darkroom.json").write_text(json.dumps({**told, "defaults": defaults, **card}))
    return folder


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, tiny_bundle: Path) -> Path:
    """Tiny weights that take one step."""
    return bundle_of(tiny_bundle, tmp_path_factory.mktemp("bundles") / "quick")


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory, checker_file: Path, bundle: Path) -> Path:
    """What the command wrote for them."""
    out = tmp_path_factory.mktemp("evaluated") / "out"
    assert evaluate(checker_file, out, bundle) == 0
    return out


def test_the_command_writes_table_figures_and_sheet(evaluated: Path) -> None:
    assert sorted(path.name for path in evaluated.iterdir()) == ["quick.json", "quick.png", "quick.txt"]
    figures = json.loads((evaluated / "quick.json").read_text())
    assert figures["results"][0]["setting"] == "default"
    assert all(result["pictures"] == 1 for result in figures["results"])
    assert figures["steps"] == 1
    assert figures["removal"]["tried"] == 5
    assert figures["diversity"]["pixels"] > 0
    text = (evaluated / "quick.txt").read_text()
    assert "at least 95 %" in text
    assert "clean drawings: shape 10.0" in text
    with Image.open(evaluated / "quick.png") as sheet:
        assert sheet.width > 1000


def test_a_recorded_evaluation_beside_the_weights_is_compared_with(
    checker_file: Path, tmp_path: Path, bundle: Path, evaluated: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recorded = tmp_path / "quick"
    shutil.copytree(bundle, recorded)
    shutil.copy(evaluated / "quick.json", recorded / RECORD)
    assert evaluate(checker_file, tmp_path / "out", recorded) == 0
    assert "the confidence intervals contain the recorded figures: yes" in capsys.readouterr().out


def test_a_record_that_is_none_is_named(checker_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / RECORD).write_text('{"results": 3}')
    assert evaluate(checker_file, tmp_path / "out", tmp_path) == 1
    assert "evaluation.json: it is no record of an evaluation" in capsys.readouterr().err


def test_two_models_are_put_beside_each_other(
    checker_file: Path, tmp_path: Path, tiny_bundle: Path, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fast = bundle_of(tiny_bundle, tmp_path / "fast", guidance_scale=1.0, negative_prompt=False)
    assert evaluate(checker_file, tmp_path / "out", Path(f"{bundle},{fast}")) == 0
    figures = json.loads((tmp_path / "out" / "fast.json").read_text())
    assert "guidance 1" not in [result["setting"] for result in figures["results"]]
    assert figures["removal"] is None
    assert (tmp_path / "out" / "quick-and-fast.txt").is_file()
    assert "points" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompts", "0"], "--prompts: '0' is no whole number from 1 on"),
        (["--minutes", "nan"], "--minutes: 'nan' is no number above 0"),
        (["--device", "abacus"], "--device: 'abacus' is no device"),
    ],
)
def test_a_wrong_option_is_named(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str], checker_file: Path
) -> None:
    with pytest.raises(SystemExit):
        main(options)
    assert message in capsys.readouterr().err


def test_a_folder_that_is_no_model_is_named(
    checker_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(checker_file, tmp_path / "out", tmp_path) == 1
    assert str(tmp_path) in capsys.readouterr().err


def test_a_variant_is_asked_for_pictures_as_its_base_is(tiny_bundle: Path, tmp_path: Path) -> None:
    base, told = load_subject(tiny_bundle, CPU, "fp32"), {"defaults": {"steps": 2}, "negative_prompt": False}
    variant = load_subject(save_variant(tiny_bundle, tmp_path / "variant", **told), CPU, "fp32")
    assert variant.card == replace(base.card, steps=2, negative_prompt=False)
    assert variant.pipeline.t5_length == base.pipeline.t5_length


def test_pictures_made_together_are_those_made_alone(tiny_bundle: Path) -> None:
    subject = load_subject(tiny_bundle, CPU, "fp32")
    wanted = [subject.card.params(prompt, seed) for seed, prompt in enumerate(["a red star", "", "a blue moon"])]
    for params, pixels in zip(wanted, together(wanted, subject.pipeline), strict=True):
        alone = run(generate(params, subject.pipeline.shift), subject.pipeline).pixels
        assert (alone.int() - pixels.int()).abs().max() <= 1


def test_a_picture_that_goes_wrong_is_black(tiny_bundle: Path) -> None:
    subject = load_subject(tiny_bundle, CPU, "fp32")
    subject.pipeline.mmdit.get_parameter("context_embedder.bias").fill_(float("nan"))
    assert together([subject.card.params("a red star", 0)], subject.pipeline)[0].max() == 0


def test_processes_make_the_same_pictures(tiny_bundle: Path) -> None:
    subject = load_subject(tiny_bundle, CPU, "fp32")
    wanted = [subject.card.params("a red star", seed) for seed in range(3)]
    beside = Processes(tiny_bundle, "fp32", 1)
    try:
        made = dict(beside.render(wanted, lambda _: True))
    finally:
        beside.close()
    here = dict(Batches(subject.pipeline, "fp32").render(wanted, lambda _: True))
    assert made.keys() == here.keys() == {0, 1, 2}
    assert all((made[n].int() - here[n].int()).abs().max() <= 1 for n in made)


class Painter:
    """Makes grey pictures at once."""

    dtype, lanes = "fp32", 1

    def __init__(self) -> None:
        self.wanted: list[GenerationParams] = []
        self.closed = False

    def render(self, wanted: Sequence[GenerationParams], go: Go) -> Iterator[Picture]:
        for n, params in enumerate(wanted):
            if not go(params):
                return
            self.wanted.append(params)
            yield n, torch.full((params.height, params.width, 3), 128, dtype=torch.uint8)

    def close(self) -> None:
        self.closed = True


class RedEyed(Checker):
    """Sees a small red star in every picture, in any shape that is asked for."""

    def read(self, pixels: torch.Tensor) -> list[Reading]:
        things = tuple(Seen(shape, "red", 0.0, 0.0, 0.1) for shape in ("star", "circle", "square", "triangle"))
        return [Reading(things, "flat", "plain", ("white",))] * len(pixels)


SMALL = replace(CARD, width=64, height=64)


def test_a_plan_makes_every_size_without_guidance_and_in_all_precisions() -> None:
    painters: list[Painter] = []

    def renderers(dtype: str) -> Painter:
        painters.append(Painter())
        painters[-1].dtype = dtype
        return painters[-1]

    plan = Plan(prompts=3, others=2, pairs=2, tries=20)
    found = Evaluator(SMALL, 4096, renderers, RedEyed(64).eval(), plan, lambda _: None).run("bf16")
    assert [(r.setting, r.dtype, r.pictures) for r in found.results] == [
        ("default", "bf16", 3), ("96x64", "bf16", 2), ("64x96", "bf16", 2), ("128x128", "bf16", 2),
        ("guidance 1", "bf16", 2), ("fp32", "fp32", 2), ("fp8", "fp8", 2),
    ]  # fmt: skip
    assert found.results[1].base == found.results[1].counts
    assert all(painter.closed for painter in painters)
    assert {params.guidance_scale for params in painters[0].wanted} == {4.0, 1.0}


def test_pairs_that_show_red_are_made_again_without_it() -> None:
    painter = Painter()
    plan = Plan(prompts=1, others=1, pairs=3, tries=60, dtypes=())
    found = Evaluator(SMALL, 64, lambda _: painter, RedEyed(64).eval(), plan, lambda _: None).run("fp32")
    assert found.removal is not None
    assert len(found.removal.pairs) == 3
    assert found.removal.removed == Count(0, 3)
    assert found.removal.kept == Count(3, 3)
    again = [params for params in painter.wanted if params.negative_prompt == "red"]
    assert [(p.prompt, p.seed) for p in again] == [(pair.prompt, pair.seed) for pair in found.removal.pairs]


def test_known_pairs_are_not_looked_for() -> None:
    painter = Painter()
    plan = Plan(prompts=1, others=1, pairs=2, tries=60, dtypes=())
    known = [OpenRequest("a star on a white background", "star", seed) for seed in (5, 6, 7)]
    found = Evaluator(SMALL, 64, lambda _: painter, RedEyed(64).eval(), plan, lambda _: None).run("fp32", known)
    assert found.removal is not None
    assert found.removal.pairs == tuple(known[:2])
    assert found.removal.tried == 2


def test_fewer_than_the_known_pairs_are_taken_from_all_over_them() -> None:
    painter = Painter()
    plan = Plan(prompts=1, others=1, pairs=2, tries=60, dtypes=())
    known = [OpenRequest("a star on a white background", "star", seed) for seed in range(6)]
    found = Evaluator(SMALL, 64, lambda _: painter, RedEyed(64).eval(), plan, lambda _: None).run("fp32", known)
    assert found.removal is not None
    assert found.removal.pairs == (known[0], known[3])
    assert found.removal.tried == 2


def test_sizes_beyond_the_models_reach_are_left_out() -> None:
    plan = Plan(prompts=1, others=1, pairs=0, dtypes=())
    found = Evaluator(SMALL, 96, lambda _: Painter(), RedEyed(64).eval(), plan, lambda _: None).run("fp32")
    assert [result.setting for result in found.results] == ["default", "96x64", "64x96", "guidance 1"]


def test_the_demos_settings_are_the_four_sizes_and_no_guidance() -> None:
    assert [setting.name for setting in settings_for(CARD)] == [
        "default", "768x512", "512x768", "1024x1024", "guidance 1",
    ]  # fmt: skip
    assert len(settings_for(replace(CARD, guidance_scale=1.0))) == 4


def test_a_sample_is_the_first_forty_of_the_full_two_hundred() -> None:
    assert (FULL.prompts, FULL.others, FULL.pairs, FULL.minutes) == (200, 200, 100, None)
    assert (SAMPLE.prompts, SAMPLE.others) == (40, 8)


class Clock:
    """Shows the time that it is set to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_no_picture_is_begun_that_would_be_late() -> None:
    clock = Clock()
    params = CARD.params("", 0)
    budget = Budget(minutes=1.0, lanes=2, clock=clock)
    for clock.now in (20.0, 20.0, 30.0, 30.0):  # loading takes 15 s
        assert budget.go(params)
        budget.made(params)
    assert budget.go(replace(params, width=512, height=1024))  # 20 s
    assert not budget.refused
    assert not budget.go(replace(params, width=1024, height=1024))  # 40 s
    assert budget.refused


def test_the_time_left_is_that_of_the_work_or_of_the_budget() -> None:
    clock = Clock()
    params = CARD.params("", 0)
    budget = Budget(minutes=1.0, clock=clock, planned=6 * work(params))
    assert math.isnan(budget.left)
    for clock.now in (15.0, 20.0):
        budget.made(params)
    assert budget.left == pytest.approx(20)
    budget.planned *= 10
    assert budget.left == pytest.approx(40)


def test_unguided_pictures_cost_about_half() -> None:
    params = CARD.params("", 0)
    assert work(replace(params, guidance_scale=1.0)) < 0.6 * work(params)


def test_every_target_is_told_reached_or_missed() -> None:
    base = counts(19, 20)
    results = [
        Result("default", "fp32", 20, base),
        Result("768x512", "fp32", 20, counts(16, 20), base),
        Result("512x768", "fp32", 20, counts(18, 20), base),
        Result("guidance 1", "fp32", 20, counts(2, 20), base),
    ]
    removal = Removal(50, (), Count(9, 10), Count(8, 10))
    lines = table(HEADER, Evaluation(results, removal)).splitlines()
    said = {tuple(line.split()[:2]): line for line in lines if line}
    assert said["default", "colour"].split()[-5:] == ["at", "least", "95", "%", "ok"]
    assert said["768x512", "shape"].split()[-6:] == ["ratio", "0.84,", "at", "least", "0.9", "MISSED"]
    assert said["512x768", "shape"].endswith("ok")
    assert said["guidance", "1"].split()[-1] == "31.7"
    assert said["negative", "removed"].endswith("ok")
    assert said["negative", "kept"].endswith("MISSED")
    assert "clean drawings: shape 98.7" in "\n".join(lines)


def test_a_setting_that_was_not_reached_says_so() -> None:
    late = Evaluation([Result("768x512", "fp32", 0, counts(0, 0), counts(0, 0))])
    assert "768x512        not made: the time was up" in table(HEADER, late)


def test_figures_outside_the_sample_are_told() -> None:
    full = Evaluation([Result("default", "bf16", 200, counts(190, 200))])
    record = recorded(json.loads(json.dumps(to_json(HEADER, full))))
    near = Evaluation([Result("default", "fp32", 40, counts(37, 40))])
    far = Evaluation([Result("default", "fp32", 40, {**counts(37, 40), "shape": Count(20, 40)})])
    assert outside(near, record) == []
    assert outside(far, record) == ["default shape"]
    assert "OUTSIDE" in table(HEADER, far, record)
    assert "NO: default shape" in table(HEADER, far, record)
    assert "of other weights" in table(replace(HEADER, revision="def"), near, record)


def test_a_second_model_may_be_five_points_worse() -> None:
    one = Evaluation([Result("default", "fp32", 100, counts(95, 100))])
    two = Evaluation([Result("default", "fp32", 100, {**counts(91, 100), "shape": Count(89, 100)})])
    said = {line.split()[1]: line for line in versus(("demo", one), ("demo-turbo", two)).splitlines()}
    assert said["colour"].endswith("-4.0  ok")
    assert said["shape"].endswith("-6.0  MISSED")


def test_the_sheet_says_what_was_read_as_wrong() -> None:
    asked = Request("", (Asked("star", "red", "left"), Asked("moon", "blue")), None, "flat", "plain", ("white",), 0)
    seen = Reading((Seen("none", "red", 0.5, 0.0, 0.2),), "line", "plain", ("white",))
    assert wrong(judge(asked, seen)) == [
        "red star: red shapeless", "star: not left", "no blue moon", "other style", "other number",
    ]  # fmt: skip
