"""Scenes: the same from the same seed, in the frame, visible, and never what is held out."""

from __future__ import annotations

import math

import pytest
import torch

from model.training.drawing import View, draw, pack
from model.training.palette import COLOURS
from model.training.scenes import MIN_CONTRAST, SHAPES, Background, Scene, Thing, contrast, held_out, sample_scene

SEEDS = range(400)


def scene_of(shape: str, colour: str = "red", background: str = "white", **place: float) -> Scene:
    """One thing in the middle, unless placed elsewhere."""
    where = {"x": 0.0, "y": 0.0, "radius": 0.5, "turn": 0.0} | place
    thing = Thing(shape=shape, colour=colour, size="medium", jitter=(0.0, 0.0, 0.0), **where)
    return Scene(Background("plain", background), (thing,), "single")


def test_a_scene_is_the_same_from_the_same_seed() -> None:
    assert [sample_scene(seed) for seed in SEEDS] == [sample_scene(seed) for seed in SEEDS]
    assert len(set(map(sample_scene, SEEDS))) == len(SEEDS)


def test_things_lie_within_the_picture() -> None:
    for scene in map(sample_scene, SEEDS):
        for thing in scene.things:
            assert max(abs(thing.x), abs(thing.y)) + thing.radius <= 0.96


def test_things_do_not_overlap() -> None:
    for scene in map(sample_scene, SEEDS):
        for n, thing in enumerate(scene.things):
            for other in scene.things[:n]:
                assert math.hypot(thing.x - other.x, thing.y - other.y) > thing.radius + other.radius


def test_things_stand_out_from_their_background() -> None:
    for scene in map(sample_scene, SEEDS):
        for thing in scene.things:
            distances = [contrast(COLOURS[thing.colour], tint) for tint in scene.background.tints]
            assert min(distances) >= MIN_CONTRAST


def test_held_out_combinations_are_never_in_training_scenes() -> None:
    looks = {(thing.shape, thing.colour) for scene in map(sample_scene, SEEDS) for thing in scene.things}
    assert looks
    assert not any(held_out(*look) for look in looks)


def test_only_held_out_combinations_when_asked() -> None:
    scenes = [sample_scene(seed, only_held_out=True) for seed in range(60)]
    assert all(held_out(thing.shape, thing.colour) for scene in scenes for thing in scene.things)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_has_colours_to_train_on_and_one_held_out(shape: str) -> None:
    kept = [colour for colour in COLOURS if held_out(shape, colour)]
    assert 1 <= len(kept) <= 2


@pytest.mark.parametrize("shape", SHAPES)
def test_a_thing_is_painted_in_its_colour_where_it_is(shape: str) -> None:
    picture = draw(pack([scene_of(shape)]), 64, 64)[0]
    assert torch.allclose(picture[:, 0, 0], torch.tensor(COLOURS["white"]) * 2 - 1, atol=1e-4)
    red = (picture[0] > 0.5) & (picture[1] < 0) & (picture[2] < 0)
    rows, columns = red.nonzero().unbind(1)
    assert 0.05 < red.float().mean() < 0.3
    assert abs(rows.float().mean() - 31.5) < 5
    assert abs(columns.float().mean() - 31.5) < 8  # a crescent's middle lies to its left


def test_left_is_left_and_top_is_top_in_every_aspect() -> None:
    scene = pack([scene_of("circle", x=-0.6, y=-0.5, radius=0.3)])
    for height, width in ((64, 64), (48, 96), (96, 48)):
        picture = draw(scene, height, width)[0]
        rows, columns = ((picture[0] > 0.5) & (picture[1] < 0)).nonzero().unbind(1)
        assert rows.float().mean() / height == pytest.approx(0.25, abs=0.03)
        assert columns.float().mean() / width == pytest.approx(0.20, abs=0.03)


def test_edges_are_smooth() -> None:
    picture = draw(pack([scene_of("circle", "black")]), 64, 64)[0, 0]
    assert len(picture.unique()) > 20


def test_a_window_is_the_same_as_that_part_of_the_whole() -> None:
    scenes = pack([sample_scene(seed) for seed in range(12)])
    whole = draw(scenes, 64, 64)
    full = torch.full((12,), 64.0)
    view = View(full, full, torch.full((12,), 8.0), torch.full((12,), 24.0))
    assert torch.allclose(draw(scenes, 32, 32, view=view), whole[:, :, 8:40, 24:56], atol=1e-4)


def test_pixels_stay_in_range() -> None:
    pictures = draw(pack([sample_scene(seed) for seed in range(40)]), 32, 48)
    assert pictures.shape == (40, 3, 32, 48)
    assert pictures.min() >= -1.001
    assert pictures.max() <= 1.001
