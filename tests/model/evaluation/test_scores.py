"""Counting what is right: readings made by hand against requests made by hand."""

from __future__ import annotations

import math

import pytest

from model.evaluation.checker import MALFORMED, Reading, Seen
from model.evaluation.prompts import Asked, Request
from model.evaluation.scores import Count, assign, count, distances, exact, is_at, judge


def seen(shape: str, colour: str, x: float = 0.0, y: float = 0.0, score: float = 0.9) -> Seen:
    return Seen(shape, colour, x, y, 0.3, score)


def request(*things: Asked, relation: str | None = None) -> Request:
    return Request("a prompt", things, relation, "flat", "plain", ("white",), 0)


def reading(*things: Seen, style: str = "flat", colours: tuple[str, ...] = ("white",)) -> Reading:
    return Reading(things, style, "plain", colours)


@pytest.mark.parametrize(
    ("right", "asked", "low", "high"),
    # As Newcombe's table of 1998 has them (Statistics in Medicine 17, 857-872), one turned around; and many.
    [
        (81, 263, 0.2527, 0.3676),
        (15, 148, 0.0578, 0.1617),
        (0, 20, 0.0, 0.1684),
        (28, 29, 0.8224, 0.9991),
        (1000, 2000, 0.4779, 0.5221),
    ],
)
def test_the_interval_is_the_exact_one(right: int, asked: int, low: float, high: float) -> None:
    assert exact(right, asked) == pytest.approx((low, high), abs=1e-4)


def test_of_nothing_asked_nothing_is_known() -> None:
    assert exact(0, 0) == (0.0, 1.0)
    assert math.isnan(Count().share)


def test_a_picture_as_asked_has_all_marks() -> None:
    asked = request(Asked("star", "red", "left"), Asked("moon", "blue", "right"))
    marks = judge(asked, reading(seen("moon", "blue", 0.5), seen("star", "red", -0.5)))
    assert all(one.share == 1.0 for one in count([marks]).values())


def test_a_missing_thing_is_wrong_in_all_that_was_asked_of_it() -> None:
    counts = count([judge(request(Asked("star", "red", "left"), Asked("moon", "blue")), reading(seen("moon", "blue")))])
    assert counts["colour"] == counts["shape"] == Count(1, 2)
    assert counts["position"] == Count(0, 1)
    assert counts["number"] == Count(0, 1)


def test_a_blob_has_its_colour_but_no_shape() -> None:
    counts = count([judge(request(Asked("star", "red")), reading(seen(MALFORMED, "red")))])
    assert counts["colour"] == Count(1, 1)
    assert counts["shape"] == Count(0, 1)


def test_style_and_background_are_of_the_picture() -> None:
    marks = judge(request(Asked("star", "red")), reading(seen("star", "red"), style="line", colours=("black",)))
    assert (marks.style, marks.background, marks.number) == (False, False, True)


def test_things_are_assigned_for_the_best_in_all() -> None:
    asked = Asked("star", "red"), Asked("star", "blue")
    red_moon, red_star = seen("moon", "red"), seen("star", "red")
    assert assign(asked, (red_star, red_moon)) == (red_moon, red_star) or assign(asked, (red_star, red_moon)) == (
        red_star,
        red_moon,
    )
    assert assign(asked, (seen("star", "blue", 0.5), red_star)) == (red_star, seen("star", "blue", 0.5))


def test_no_thing_stands_for_two() -> None:
    asked = Asked("star", "red"), Asked("star", "red")
    assert sum(it is None for it in assign(asked, (seen("star", "red"),))) == 1


def test_what_nobody_asked_for_stands_for_nothing_better() -> None:
    right, other = seen("star", "red", score=0.4), seen("cloud", "green", score=0.99)
    assert assign((Asked("star", "red"),), (other, right)) == (right,)


@pytest.mark.parametrize(
    ("place", "x", "y", "there"),
    [
        ("left", -0.5, 0.1, True), ("left", 0.5, 0.1, False), ("left", -0.5, 0.8, False),
        ("top", 0.0, -0.5, True), ("bottom", 0.0, -0.5, False), ("top left", -0.5, -0.5, True),
        ("top left", -0.5, 0.0, False), ("bottom right", 0.4, 0.6, True), ("centre", 0.1, -0.1, True),
        ("centre", 0.5, 0.0, False),
    ],
)  # fmt: skip
def test_a_place_is_where_the_centre_is(place: str, x: float, y: float, there: bool) -> None:
    assert is_at(seen("star", "red", x, y), place) is there


@pytest.mark.parametrize(
    ("relation", "dx", "dy", "true"),
    [
        ("left", -0.8, 0.1, True), ("left", 0.8, 0.1, False), ("left", -0.3, 0.7, False), ("right", 0.8, 0.0, True),
        ("above", 0.1, -0.8, True), ("above", 0.1, 0.8, False), ("below", 0.0, 0.8, True), ("left", -0.05, 0.0, False),
    ],
)  # fmt: skip
def test_a_relation_is_that_of_the_centres(relation: str, dx: float, dy: float, true: bool) -> None:
    asked = request(Asked("star", "red"), Asked("moon", "blue"), relation=relation)
    marks = judge(asked, reading(seen("star", "red", dx / 2, dy / 2), seen("moon", "blue", -dx / 2, -dy / 2)))
    assert marks.relation is true


def test_a_relation_to_nothing_is_wrong() -> None:
    asked = request(Asked("star", "red"), Asked("moon", "blue"), relation="left")
    assert judge(asked, reading(seen("star", "red", -0.5))).relation is False


def test_equal_pictures_have_no_distance() -> None:
    assert distances([(0.5, 0.5)] * 3) == 0.0
    assert distances([(0.0, 0.0), (1.0, 1.0)]) == 1.0
