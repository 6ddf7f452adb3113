"""What is asked for: always the same, never trained on, and said so that it can be read."""

from __future__ import annotations

from itertools import islice

from model.evaluation.prompts import OPEN_SHAPE, drawings_of_open_prompt, open_requests, requests
from model.training.captions import COLOUR_WORDS, PLACES, RELATIONS, SHAPE_WORDS
from model.training.palette import COLOURS
from model.training.scenes import KINDS, STYLES, STYLES_OF, held_out
from model.training.sources import HELD_OUT_SEEDS

ASKED = requests(200)


def test_requests_are_the_same_always() -> None:
    assert requests(40) == ASKED[:40]


def test_every_combination_is_held_out() -> None:
    assert all(held_out(thing.shape, thing.colour) for one in ASKED for thing in one.things)


def test_the_first_25_have_every_style_on_every_background() -> None:
    assert {(one.style, one.background) for one in ASKED[:25]} == {(s, kind) for kind in KINDS for s in STYLES_OF[kind]}


def test_one_to_three_things_are_asked_for_and_told_apart() -> None:
    assert {len(one.things) for one in ASKED} == {1, 2, 3}
    for one in ASKED:
        assert len({thing.shape for thing in one.things}) == len({thing.colour for thing in one.things})
        assert len({thing.shape for thing in one.things}) == len(one.things)
        assert not {thing.colour for thing in one.things} & set(one.colours)


def test_most_say_where_things_are() -> None:
    stated = [one for one in ASKED if one.relation or any(thing.place for thing in one.things)]
    assert 0.6 < len(stated) / len(ASKED) < 0.8
    assert {one.relation for one in stated} >= set(RELATIONS)
    assert {thing.place for one in stated for thing in one.things} >= set(PLACES)


def test_a_relation_is_between_two_things_without_places() -> None:
    for one in ASKED:
        if one.relation:
            assert len(one.things) == 2
            assert not any(thing.place for thing in one.things)


def test_a_prompt_names_each_thing_with_its_colour() -> None:
    for one in ASKED:
        for thing in one.things:
            names = [
                f"{colour} {shape}"
                for colour in COLOUR_WORDS.get(thing.colour, (thing.colour,))
                for shape in SHAPE_WORDS[thing.shape]
            ]
            assert any(name in one.prompt for name in names), (one.prompt, names)
        assert "  " not in one.prompt
        assert len(one.prompt) < 200


def test_every_style_is_named() -> None:
    assert {one.style for one in ASKED} == set(STYLES)
    for style in STYLES:
        starts = {one.prompt for one in ASKED if one.style == style}
        assert len(starts) == 40


def test_seeds_are_of_no_training() -> None:
    assert all(3 * HELD_OUT_SEEDS <= one.seed < 2**53 for one in ASKED)
    assert len({one.seed for one in ASKED}) == len(ASKED)


def test_open_requests_leave_the_colour_open_where_red_was_trained() -> None:
    for one in islice(open_requests(), 50):
        assert not held_out(one.shape, "red")
        assert one.prompt.split(" on ")[0].split() == [one.prompt.split()[0], one.shape]
        assert not any(f"{colour} {one.shape}" in one.prompt for colour in COLOURS)


def test_the_open_prompts_drawings_show_its_shape_alone() -> None:
    assert [[thing.shape for thing in scene.things] for scene in drawings_of_open_prompt(3)] == [[OPEN_SHAPE]] * 3
