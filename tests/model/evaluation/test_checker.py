"""The network that reads drawings: its files, its answers, its training at toy size, and the committed weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from model.config import VAEConfig
from model.evaluation.checker import COMMITTED, Answer, Checker, Seen, load_checker, resized
from model.evaluation.checking import CheckerTraining, agreement, checker_losses, focal, malformed, train_checker
from model.evaluation.damage import Field, Poses, blend, warp
from model.evaluation.lessons import (
    LABELS,
    MEASURING_SEEDS,
    TRAINING_SEEDS,
    Labels,
    Lessons,
    Painter,
    Spoiling,
    labels_of,
)
from model.training.drawing import draw, pack
from model.training.feed import Feed
from model.training.scenes import KINDS, SHAPES, STYLES, sample_scene
from model.training.sources import HELD_OUT_SEEDS, Frame
from model.vae import VAE

CPU = torch.device("cpu")
WHOLE = Spoiling(reconstructed=0, bent=0, broken=0, blended=0, softened=0)
POSES = Poses(*(torch.tensor([[value, 0.0, 0.0]]) for value in (0.0, 0.0, 0.5)))


def lessons(count: int, spoiling: Spoiling, vae: VAE | None = None) -> tuple[torch.Tensor, Labels]:
    frame = Frame(64, 64)
    return Painter(spoiling, vae, CPU, 0).paint(Feed(Lessons(), TRAINING_SEEDS, 0).take(count, frame), frame)


def perfect(labels: Labels, cells: int) -> Answer:
    """What a checker would answer that knew it all; `labels` of pictures with one thing in the middle of a cell."""
    batch = len(labels.x)
    rows = torch.arange(batch)
    column, row = (((place[:, 0] + 1) / 2 * cells).long() for place in (labels.x, labels.y))

    def spread(classes: int, true: torch.Tensor) -> torch.Tensor:
        return 40.0 * torch.nn.functional.one_hot(true, classes).float()

    def everywhere(values: torch.Tensor) -> torch.Tensor:
        return values[:, :, None, None].expand(-1, -1, cells, cells)

    centre = torch.full((batch, 1, cells, cells), -20.0)
    centre[rows, 0, row, column] = 20.0
    return Answer(
        centre=centre,
        offset=torch.zeros(batch, 2, cells, cells),
        radius=everywhere(labels.radius[:, :1].log()),
        shape=everywhere(spread(len(SHAPES) + 1, labels.shape[:, 0])),
        colour=everywhere(spread(12, labels.colour[:, 0])),
        style=spread(len(STYLES), labels.style),
        kind=spread(len(KINDS), labels.kind),
        top=spread(12, labels.top),
        bottom=spread(12, labels.bottom),
    )


def one_thing() -> Labels:
    """A small thing in the middle of cell 4 of 8."""
    nothing = [-1.0, -1.0, 0.0, 0.0, 0.0]
    return Labels.of(torch.tensor([[3.0, 2.0, 0.125, 0.125, 0.2, *nothing, *nothing, 1.0, 0.0, 7.0, 7.0]]))


def test_the_right_answer_loses_little_and_a_wrong_shape_more() -> None:
    labels = one_thing()
    right = perfect(labels, 8)
    losses = checker_losses(right, labels)
    assert losses[[0, 3, 4, 5, 6]].max() < 1e-3
    wrong = checker_losses(Answer(**{**vars(right), "shape": right.shape.roll(1, dims=1)}), labels)
    assert wrong[3] > 10
    torch.testing.assert_close(wrong[[0, 4, 5, 6]], losses[[0, 4, 5, 6]])


def test_cells_beside_a_centre_are_blamed_less() -> None:
    logits = torch.full((1, 1, 3), -8.0)
    bump = torch.tensor([[[1.0, 0.8, 0.0]]])
    logits[..., 0] = 8.0
    near, far = logits.clone(), logits.clone()
    near[..., 1], far[..., 2] = 4.0, 4.0
    one = torch.tensor(1)
    assert focal(logits, bump, one) < 1e-2
    assert 100 * focal(near, bump, one) < focal(far, bump, one)


def test_labels_say_what_is_on_a_scene() -> None:
    scene = sample_scene(MEASURING_SEEDS + 3)
    labels = Labels.of(torch.tensor([labels_of(scene)]))
    assert len(labels_of(scene)) == LABELS
    assert labels.there.sum() == len(scene.things)
    assert SHAPES[labels.shape[0, 0]] == scene.things[0].shape
    assert STYLES[labels.style[0]] == scene.style
    assert KINDS[labels.kind[0]] == scene.background.kind


def test_lessons_are_of_seeds_of_their_own() -> None:
    assert 2 * HELD_OUT_SEEDS <= TRAINING_SEEDS < MEASURING_SEEDS < 3 * HELD_OUT_SEEDS


def test_whole_lessons_are_the_drawings_but_for_grain() -> None:
    pixels, labels = lessons(4, WHOLE)
    drawn = draw(pack([sample_scene(TRAINING_SEEDS + n, only_held_out=n % 2 == 1) for n in range(4)]), 64, 64)
    assert (pixels - drawn).abs().mean() < 0.1
    assert labels.shape.max() < len(SHAPES)


@pytest.mark.parametrize("kind", ["broken", "blended"])
def test_spoiled_things_have_no_shape_but_keep_their_colour(kind: str) -> None:
    nothing = {"reconstructed": 0, "bent": 0, "broken": 0, "blended": 0, "softened": 0}
    pixels, labels = lessons(6, Spoiling(**{**nothing, kind: 1.0}))
    whole, same = lessons(6, WHOLE)
    assert (labels.shape[labels.there] == len(SHAPES)).all()
    assert torch.equal(labels.colour, same.colour)
    assert (pixels - whole).abs().amax(dim=(1, 2, 3)).min() > 0.3


def test_lessons_go_through_the_autoencoder() -> None:
    vae = VAE(VAEConfig(channels=(8, 8, 8, 8), encoder_blocks=1, groups=4, scale=1.0, shift=0.0))
    reconstructed, _ = lessons(4, Spoiling(reconstructed=1, bent=0, broken=0, blended=0, softened=0), vae)
    whole, _ = lessons(4, WHOLE)
    assert torch.isfinite(reconstructed).all()
    assert (reconstructed - whole).abs().mean() > 0.1  # it is not trained


def test_a_warp_of_nothing_changes_nothing_and_one_far_away_neither() -> None:
    pixels = draw(pack([sample_scene(1)]), 64, 64)
    slow = Field(*(torch.ones(1, 3) for _ in range(2)), torch.zeros(1, 3))
    torch.testing.assert_close(warp(pixels, POSES, torch.zeros(1, 3), slow), pixels, atol=1e-4, rtol=0)
    moved = warp(pixels, POSES, torch.tensor([[0.3, 0.0, 0.0]]), slow)
    torch.testing.assert_close(moved[..., :2], pixels[..., :2], atol=1e-4, rtol=0)
    assert (moved - pixels).abs().max() > 0.1


def test_a_blend_takes_part_of_the_other() -> None:
    torch.manual_seed(0)
    mixed = blend(torch.zeros(1, 3, 64, 64), torch.ones(1, 3, 64, 64), POSES, torch.tensor([[1.0, 0.0, 0.0]]))
    assert 0.2 < mixed[:, :, 20:44, 20:44].mean() < 0.8
    assert mixed[..., 0].max() == 0.0


@pytest.mark.parametrize(("size", "shown"), [((512, 512), (64, 64)), ((512, 768), (64, 96)), ((768, 512), (96, 64))])
def test_pictures_are_read_at_one_size(size: tuple[int, int], shown: tuple[int, int]) -> None:
    assert resized(torch.zeros(1, 3, *size), 64).shape[-2:] == shown


def test_a_checker_is_the_same_after_saving(tmp_path: Path) -> None:
    torch.manual_seed(0)
    checker = Checker(64, {"accuracy": {"clean_shape": 0.5}}).eval()
    checker.save(tmp_path / "checker.safetensors")
    loaded = load_checker(tmp_path / "checker.safetensors")
    pixels = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(loaded(pixels).shape, checker(pixels).shape, atol=0.02, rtol=0.02)
    assert (loaded.side, loaded.about) == (64, {"accuracy": {"clean_shape": 0.5}})
    assert (tmp_path / "checker.safetensors").stat().st_size <= 1_000_000
    assert [path.name for path in tmp_path.iterdir()] == ["checker.safetensors"]


def test_a_file_that_is_no_checker_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"other\.safetensors holds no checker"):
        load_checker(path)
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"other\.safetensors holds no checker"):
        load_checker(path)


def test_a_training_writes_a_checker_with_its_accuracy(tmp_path: Path) -> None:
    out = tmp_path / "checker.safetensors"
    settings = CheckerTraining(out=out, minutes=0.01, batch=4, side=64, processes=0, pictures=4)
    accuracy = train_checker(settings, None, CPU)
    assert load_checker(out).about["accuracy"] == accuracy
    train_checker(replace(settings, resume=out, seed=2), None, CPU)
    assert {"clean_shape", "clean_colour", "clean_place", "shape_line", "malformed"} <= set(accuracy)


def test_a_training_refuses_an_odd_side(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="side is 100; allowed: multiples of 16 from 64 on"):
        train_checker(CheckerTraining(out=tmp_path / "x", minutes=0.01, side=100), None, CPU)


def test_agreement_counts_things_and_pictures() -> None:
    scene = sample_scene(MEASURING_SEEDS)
    ground = scene.background
    colours = tuple(name for name in (ground.colour, ground.second) if name)
    things = tuple(Seen(thing.shape, thing.colour, thing.x, thing.y, thing.radius) for thing in scene.things)
    reading = Checker(64).eval().read(torch.zeros(1, 3, 64, 64))[0]
    right = type(reading)(things, scene.style, ground.kind, colours)
    assert set(agreement([scene], [right]).values()) == {1.0}
    assert agreement([scene], [type(reading)((), scene.style, ground.kind, colours)])["place"] == 0.0


def test_the_committed_checker_reads_drawings_well() -> None:
    checker = load_checker(COMMITTED)
    scenes = [sample_scene(MEASURING_SEEDS + 5000 + n, only_held_out=n % 2 == 1) for n in range(60)]
    found = agreement(scenes, checker.read(draw(pack(scenes), 256, 256)))
    assert found["place"] > 0.97
    assert found["colour"] > 0.97
    assert found["shape"] > 0.95
    assert found["style"] > 0.95
    assert found["background"] > 0.95


def test_the_committed_checker_sees_no_shape_in_spoiled_things() -> None:
    assert malformed(load_checker(COMMITTED), CPU, 64) > 0.85
