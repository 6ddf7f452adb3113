"""What is asked for in an evaluation: the same requests always, of combinations that are never trained on.

The sentences are put together here and not by the training's captions, from the same words: a model has no others.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from model.training.captions import (
    AMONG_THE_STARS,
    LANDSCAPE_WORDS,
    PLACES,
    RELATIONS,
    SHAPE_WORDS,
    STYLE_WORDS,
    colour_words,
    with_article,
)
from model.training.palette import COLOURS, LIGHT_COLOURS
from model.training.scenes import (
    KINDS,
    LANDSCAPES,
    OF_THE_GROUND,
    OF_THE_SKY,
    SHAPES,
    STYLES,
    STYLES_OF,
    Background,
    Scene,
    held_out,
    sample_scene,
    stands_out,
    visible_looks,
)
from model.training.sources import HELD_OUT_SEEDS

EVALUATION_SEEDS = 3 * HELD_OUT_SEEDS
STATED = 0.7  # the share of requests that say where things are

OPEN_PROMPT, OPEN_SHAPE = "a heart", "heart"
"""Leaves everything else open: what eight seeds make of it shows how far seeds differ."""


@dataclass(frozen=True)
class Asked:
    """A thing that is asked for, and where, if that is said: one of captions.PLACES."""

    shape: str
    colour: str
    place: str | None = None


@dataclass(frozen=True)
class Request:
    """A prompt and what it asks for.

    relation : where the first of two things is, seen from the second: one of captions.RELATIONS
    background : its kind; colours : those of a plain background or a gradient
    seed : of the picture's noise
    """

    prompt: str
    things: tuple[Asked, ...]
    relation: str | None
    style: str
    background: str
    colours: tuple[str, ...]
    seed: int


@dataclass(frozen=True)
class OpenRequest:
    """A prompt that names a shape and leaves its colour open."""

    prompt: str
    shape: str
    seed: int


def requests(count: int) -> list[Request]:
    """The first `count` requests. Every 25 of them have all styles on all backgrounds."""
    return [request(n) for n in range(count)]


def request(n: int) -> Request:
    """Request number n."""
    rng = Random(EVALUATION_SEEDS + n)
    style = STYLES[n % len(STYLES)]
    kinds = [kind for kind in KINDS if style in STYLES_OF[kind]]
    kind = kinds[(n + n // len(STYLES)) % len(kinds)]
    number = rng.choices((1, 2, 3), (40, 35, 25))[0]
    background, looks = _looks(rng, kind, style, number)
    stated = rng.random() < STATED
    things, relation = _composed(rng, looks, kind in LANDSCAPES) if stated else (_unplaced(looks), None)
    prompt = _styled(f"{_sentence(rng, things, relation)} {_behind(rng, background, things)}", style, rng)
    colours = tuple(colour for colour in (background.colour, background.second) if colour)
    return Request(prompt, things, relation, style, kind, colours, EVALUATION_SEEDS + n)


def open_requests() -> Iterator[OpenRequest]:
    """Endless: shapes that may be red on backgrounds on which red stands out."""
    shapes = [shape for shape in SHAPES if not held_out(shape, "red")]
    grounds = [colour for colour in COLOURS if stands_out("red", Background("plain", colour))]
    rng = Random(EVALUATION_SEEDS)
    seed = EVALUATION_SEEDS + HELD_OUT_SEEDS // 4
    while True:
        shape, ground = rng.choice(shapes), rng.choice(grounds)
        yield OpenRequest(f"{with_article(shape)} on {with_article(ground)} background", shape, seed)
        seed += 1


def drawings_of_open_prompt(count: int) -> list[Scene]:
    """Scenes that the open prompt describes, as they are drawn for training."""
    scenes: list[Scene] = []
    seed = EVALUATION_SEEDS
    while len(scenes) < count:
        scene = sample_scene(seed)
        if [thing.shape for thing in scene.things] == [OPEN_SHAPE]:
            scenes.append(scene)
        seed += 1
    return scenes


Looks = tuple[tuple[str, str], ...]  # (shape, colour) of each thing


def _looks(rng: Random, kind: str, style: str, number: int) -> tuple[Background, Looks]:
    """A background of a kind and `number` held-out looks of different shapes and colours that stand out from it."""
    while True:
        background = _background(rng, kind)
        among = list(visible_looks(background, style, True))
        rng.shuffle(among)
        chosen: list[tuple[str, str]] = []
        for shape, colour in among:
            if all(shape != other and colour != its for other, its in chosen):
                chosen.append((shape, colour))
        if len(chosen) >= number:
            return background, tuple(chosen[:number])


def _background(rng: Random, kind: str) -> Background:
    if kind == "plain":
        if rng.random() < 0.25:
            return Background(kind, rng.choice(LIGHT_COLOURS), "light")
        return Background(kind, rng.choice(tuple(COLOURS)))
    if kind == "gradient":
        first, second = rng.sample(tuple(COLOURS), 2)
        return Background(kind, first, second=second)
    return Background(kind)


def _unplaced(looks: Looks) -> tuple[Asked, ...]:
    return tuple(Asked(shape, colour) for shape, colour in looks)


def _composed(rng: Random, looks: Looks, landscape: bool) -> tuple[tuple[Asked, ...], str | None]:
    """The things with a place each, or two with a relation. In a landscape the sky is above the ground."""
    if len(looks) == 1:
        places = _fitting_places(looks[0][0]) if landscape else tuple(PLACES)
        return (Asked(*looks[0], rng.choice(places)),), None
    ordered, across = _ordered(rng, looks, landscape)
    if len(ordered) == 2 and rng.random() < 0.6:
        forward, back = ("left", "right") if across else ("above", "below")
        if rng.random() < 0.5:
            return _unplaced(ordered), forward
        return _unplaced(ordered[::-1]), back
    first, last = ("left", "right") if across else ("top", "bottom")
    places = (first, last) if len(ordered) == 2 else (first, "centre", last)
    return tuple(Asked(*look, place) for look, place in zip(ordered, places, strict=True)), None


def _fitting_places(shape: str) -> tuple[str, ...]:
    """Where a thing may be in a landscape."""
    if shape in OF_THE_SKY:
        return "top", "top left", "top right"
    if shape in OF_THE_GROUND:
        return "bottom", "bottom left", "bottom right"
    return tuple(PLACES)


def _ordered(rng: Random, looks: Looks, landscape: bool) -> tuple[Looks, bool]:
    """The looks from left to right or from top to bottom, and which of both."""
    if not landscape:
        return looks, rng.random() < 0.5
    high = tuple(sorted(looks, key=lambda look: (look[0] in OF_THE_GROUND) - (look[0] in OF_THE_SKY)))
    mixed = high[0][0] in OF_THE_SKY and high[-1][0] in OF_THE_GROUND
    return (high, False) if mixed and len(looks) == 2 else (looks, True)


def _sentence(rng: Random, things: tuple[Asked, ...], relation: str | None) -> str:
    nouns = [_noun(rng, thing) for thing in things]
    if relation:
        return f"{nouns[0]} {rng.choice(RELATIONS[relation])} {nouns[1]}"
    if len(things) == 1:
        place = things[0].place
        return f"{nouns[0]} {rng.choice(PLACES[place])}" if place else nouns[0]
    parts = [f"{noun} {_end(thing.place)}" if thing.place else noun for noun, thing in zip(nouns, things, strict=True)]
    return f"{', '.join(parts[:-1])} and {parts[-1]}"


def _end(place: str) -> str:
    """The place of one of several: as short as can be."""
    return {"left": "on the left", "right": "on the right", "top": "at the top", "bottom": "at the bottom"}.get(
        place, "in the middle"
    )


def _noun(rng: Random, thing: Asked) -> str:
    return with_article(f"{rng.choice(colour_words(thing.colour))} {rng.choice(SHAPE_WORDS[thing.shape])}")


def _behind(rng: Random, background: Background, things: tuple[Asked, ...]) -> str:
    if background.kind in LANDSCAPE_WORDS:
        standing = any(thing.shape in OF_THE_GROUND for thing in things)
        words = [words for words in LANDSCAPE_WORDS[background.kind][0] if not (standing and words in AMONG_THE_STARS)]
        return rng.choice(words)
    top = rng.choice(colour_words(background.colour))
    if background.kind == "gradient":
        return f"on a gradient from {top} to {rng.choice(colour_words(background.second))}"
    shade = "light " if background.tone == "light" else ""
    return f"{rng.choice(('on', 'against'))} {with_article(shade + top)} background"


def _styled(sentence: str, style: str, rng: Random) -> str:
    prefixes, suffixes = STYLE_WORDS[style]
    if suffixes and rng.random() < 0.5:
        return sentence + rng.choice(suffixes)
    return rng.choice(prefixes) + sentence
