"""Captions: true of their scenes, varied, and leaving things open."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from random import Random

import pytest

from model.training.captions import (
    AMONG_THE_STARS,
    COLOUR_WORDS,
    FRAGMENT_SHARE,
    SHAPE_WORDS,
    SIZE_WORDS,
    STYLE_WORDS,
    caption,
    fragment,
    plain_caption,
    relation,
    sentence,
    where,
)
from model.training.palette import COLOURS
from model.training.scenes import LANDSCAPES, OF_THE_GROUND, STYLES, Scene, Thing, sample_scene

STYLE_MARKS = {
    "flat": ("flat",),
    "line": ("line", "outline"),
    "pixel": ("pixel",),
    "watercolour": ("watercolour", "watercolor"),
    "shaded": ("3d",),
}
COLOUR_OF = {word: colour for colour in COLOURS for word in COLOUR_WORDS.get(colour, (colour,))}


def examples(count: int = 600) -> Iterator[tuple[Scene, str]]:
    for seed in range(count):
        scene = sample_scene(seed)
        yield scene, sentence(scene, Random(seed)).lower()


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


def test_some_captions_are_a_few_words_about_one_part_of_the_scene() -> None:
    short = 0
    for seed in range(3000):
        scene = sample_scene(seed)
        short += caption(scene, Random(seed)) != sentence(scene, _after_one(seed))
        words = fragment(scene, Random(seed)).lower()
        assert 1 <= len(words.split()) <= 12
        shown = {thing.colour for thing in scene.things} | {scene.background.colour, scene.background.second}
        named = {colour for word, colour in COLOUR_OF.items() if says(words, word)}
        assert named <= shown | {"blue", "green"}, words
        assert {shape for shape, its in SHAPE_WORDS.items() if says(words, *its)} <= {t.shape for t in scene.things}
    assert short / 3000 == pytest.approx(FRAGMENT_SHARE, rel=0.3)


def _after_one(seed: int) -> Random:
    rng = Random(seed)
    rng.random()
    return rng


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
        found = re.search(
            r"(left of|right of|above|over|on top of|below|under|beneath) an? (?!clear sky|blue sky)", text
        )
        if found is None or says(text, "gradient"):
            continue
        first, second = sorted(scene.things, key=lambda thing: _mentioned(text, thing))
        said += 1
        word = found[1]
        if word == "left of":
            assert first.x + first.radius < second.x - second.radius, text
        elif word == "right of":
            assert first.x - first.radius > second.x + second.radius, text
        elif word in ("above", "over", "on top of"):
            assert first.y + first.radius < second.y - second.radius, text
        else:
            assert first.y - first.radius > second.y + second.radius, text
    assert said > 100


def test_the_ends_at_which_two_things_are_said_to_be_are_theirs() -> None:
    said = 0
    for scene, text in examples(2500):
        shapes = {thing.shape: thing for thing in scene.things}
        ends = re.search(r"^(.*) (on the left|on the right|at the top|at the bottom) and (.*?) (on the|at the)", text)
        if ends is None or len(shapes) != 2 or len(scene.things) != 2:
            continue
        first, second = sorted(scene.things, key=lambda thing: _mentioned(text, thing))
        said += 1
        if ends[2].endswith(("left", "right")):
            assert (first.x < second.x) == ends[2].endswith("left"), text
        else:
            assert (first.y < second.y) == ends[2].endswith("top"), text
    assert said > 20


def test_things_askew_have_no_relation() -> None:
    assert relation(_star(-0.5, -0.5), _star(0.5, 0.5)) is None
    assert relation(_star(-0.5, 0.0), _star(0.5, 0.1)) == "left"
    assert relation(_star(0.1, 0.5), _star(0.0, -0.5)) == "below"


def _star(x: float, y: float) -> Thing:
    return Thing("star", "red", x=x, y=y, radius=0.2, size="medium", turn=0.0, jitter=(0.0, 0.0, 0.0))


def test_styles_are_said_only_where_they_are_drawn() -> None:
    for scene, text in examples(2000):
        named = {style for style, words in STYLE_MARKS.items() if says(text, *words)}
        assert named <= {scene.style}, text


def test_most_styles_are_said_and_flat_is_mostly_not() -> None:
    said: dict[str, list[bool]] = defaultdict(list)
    for scene, text in examples(2000):
        said[scene.style].append(says(text, *STYLE_MARKS[scene.style]))
    shares = {style: sum(answers) / len(answers) for style, answers in said.items()}
    assert 0.05 < shares.pop("flat") < 0.25
    assert all(0.75 < share < 0.95 for share in shares.values())


def test_nothing_that_stands_on_the_ground_is_in_the_night_sky() -> None:
    for scene, text in examples(3000):
        if any(thing.shape in OF_THE_GROUND for thing in scene.things):
            assert not any(words in text for words in AMONG_THE_STARS), text


def test_a_few_captions_are_bare() -> None:
    bare = [text for _, text in examples(3000) if re.fullmatch(r"(an? )?(\w+ ?\w+)\.?", text)]
    assert len(bare) > 15


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


def test_every_style_has_words_of_its_own() -> None:
    assert tuple(STYLE_WORDS) == STYLES
    for style, (before, after) in STYLE_WORDS.items():
        assert all(words.endswith(" ") and says(words.lower(), *STYLE_MARKS[style]) for words in before)
        assert all(not words.endswith(" ") and says(words.lower(), *STYLE_MARKS[style]) for words in after)


def _words(colour: str) -> tuple[str, ...]:
    return COLOUR_WORDS.get(colour, (colour,))


def test_between_the_places_none_is_named() -> None:
    thing = Thing("star", "red", x=0.2, y=0.0, radius=0.3, size="medium", turn=0.0, jitter=(0.0, 0.0, 0.0))
    assert where(thing) is None
