"""Scenes: the same from the same seed, in the frame, visible, and never what is held out."""

from __future__ import annotations

import math
from collections import Counter

import pytest

from model.training.composition import Ground
from model.training.palette import COLOURS, contrast
from model.training.scenes import (
    KINDS,
    LANDSCAPES,
    LINE_CONTRAST,
    MIN_CONTRAST,
    OF_THE_GROUND,
    OF_THE_SKY,
    SHAPES,
    STYLES,
    STYLES_OF,
    held_out,
    sample_scene,
)

SEEDS = range(400)


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


def test_things_stand_out_from_their_background_in_its_style() -> None:
    for scene in map(sample_scene, SEEDS):
        least = LINE_CONTRAST if scene.style == "line" else MIN_CONTRAST
        for thing in scene.things:
            distances = [contrast(COLOURS[thing.colour], tint) for tint in scene.background.tints(scene.style)]
            assert min(distances) >= least


@pytest.mark.parametrize("style", STYLES)
def test_every_style_and_background_has_its_share_of_scenes(style: str) -> None:
    kinds = Counter(scene.background.kind for scene in map(sample_scene, range(2000)) if scene.style == style)
    assert set(kinds) == {kind for kind in KINDS if style in STYLES_OF[kind]}
    assert sum(kinds.values()) > 220


def test_three_things_are_large_enough_to_be_told_apart() -> None:
    triples = [scene for scene in map(sample_scene, SEEDS) if len(scene.things) == 3]
    assert min(thing.radius for scene in triples for thing in scene.things) >= 0.2


def test_in_landscapes_most_things_are_where_they_belong() -> None:
    placed = []
    for scene in map(sample_scene, range(1500)):
        if scene.background.kind in LANDSCAPES:
            ground = Ground(scene.background.horizon)
            for thing in scene.things:
                place = (thing.x, thing.y, thing.radius, thing.size)
                if thing.shape in OF_THE_GROUND:
                    placed.append(ground.bears(place))
                elif thing.shape in OF_THE_SKY:
                    placed.append(ground.frees(place))
    assert sum(placed) / len(placed) > 0.75


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
