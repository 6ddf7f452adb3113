"""Captions: true of their scenes, varied, and leaving things open."""

from __future__ import annotations

import re
from collections.abc import Iterator
from random import Random

from model.training.captions import COLOUR_WORDS, SHAPE_WORDS, SIZE_WORDS, caption, plain_caption, where
from model.training.palette import COLOURS
from model.training.scenes import LANDSCAPES, Scene, Thing, sample_scene

COLOUR_OF = {word: colour for colour in COLOURS for word in COLOUR_WORDS.get(colour, (colour,))}


def examples(count: int = 600) -> Iterator[tuple[Scene, str]]:
    for seed in range(count):
        scene = sample_scene(seed)
        yield scene, caption(scene, Random(seed)).lower()


def says(text: str, *words: str) -> bool:
    return any(re.search(rf"\b{re.escape(word)}\b", text) for word in words)


def test_every_named_colour_is_in_the_scene() -> None:
    for scene, text in examples():
        background = scene.background
        shown = {thing.colour for thing in scene.things} | {background.colour, background.second}
        if background.kind in LANDSCAPES:
            shown |= {"blue", "green"}
        named = {colour for word, colour in COLOUR_OF.items() if says(text, word)}
        assert named <= shown, text


def test_exactly_the_shapes_of_the_scene_are_named() -> None:
    for scene, text in examples():
        named = {shape for shape, words in SHAPE_WORDS.items() if says(text, *words)}
        assert named == {thing.shape for thing in scene.things}, text


def test_sizes_are_said_only_where_they_hold() -> None:
    for scene, text in examples():
        if says(text, *SIZE_WORDS["small"]):
            assert min(thing.radius for thing in scene.things) <= 0.23, text
        if says(text, *SIZE_WORDS["large"]):
            assert max(thing.radius for thing in scene.things) >= 0.52, text


def test_the_place_of_a_single_thing_is_true() -> None:
    said = 0
    for scene, text in examples():
        if len(scene.things) > 1 or scene.background.kind == "gradient":
            continue
        thing = scene.things[0]
        for words, holds in (
            (("left",), thing.x < -0.3),
            (("right",), thing.x > 0.3),
            (("top", "upper"), thing.y < -0.3),
            (("bottom", "lower"), thing.y > 0.3),
            (("centre", "center", "middle"), max(abs(thing.x), abs(thing.y)) < 0.12),
        ):
            if says(text, *words):
                said += 1
                assert holds, text
    assert said > 50


def test_relations_of_two_things_are_true() -> None:
    said = 0
    for scene, text in examples(1500):
        if len(scene.things) != 2 or scene.things[0].shape == scene.things[1].shape:
            continue
        relation = re.search(
            r"(left of|right of|above|over|on top of|below|under|beneath) an? (?!clear sky|blue sky)", text
        )
        if relation is None or says(text, "gradient"):
            continue
        first, second = sorted(scene.things, key=lambda thing: _mentioned(text, thing))
        said += 1
        word = relation[1]
        if word == "left of":
            assert first.x + first.radius < second.x - second.radius, text
        elif word == "right of":
            assert first.x - first.radius > second.x + second.radius, text
        elif word in ("above", "over", "on top of"):
            assert first.y + first.radius < second.y - second.radius, text
        else:
            assert first.y - first.radius > second.y + second.radius, text
    assert said > 100


def _mentioned(text: str, thing: Thing) -> int:
    return min(match.start() for word in SHAPE_WORDS[thing.shape] if (match := re.search(rf"\b{word}\b", text)))


def test_one_scene_has_many_captions() -> None:
    scene = sample_scene(3)
    assert len({caption(scene, Random(n)) for n in range(60)}) > 15


def test_the_plain_caption_never_changes() -> None:
    assert plain_caption(sample_scene(5)) == plain_caption(sample_scene(5))


def test_some_captions_leave_the_background_or_a_colour_open() -> None:
    plain = [(scene, text) for scene, text in examples() if scene.background.kind == "plain" and len(scene.things) == 1]
    without = [text for scene, text in plain if not any(says(text, word) for word in _words(scene.background.colour))]
    colourless = [text for scene, text in plain if not any(says(text, word) for word in _words(scene.things[0].colour))]
    assert 0.03 < len(without) / len(plain) < 0.3
    assert 0.01 < len(colourless) / len(plain) < 0.2


def _words(colour: str) -> tuple[str, ...]:
    return COLOUR_WORDS.get(colour, (colour,))


def test_between_the_places_none_is_named() -> None:
    thing = Thing("star", "red", x=0.2, y=0.0, radius=0.3, size="medium", turn=0.0, jitter=(0.0, 0.0, 0.0))
    assert where(thing) is None
