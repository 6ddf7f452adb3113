"""What a scene is called: a small grammar with synonyms and free order. What a caption says is true of its scene."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from model.training.scenes import OF_THE_GROUND, Background, Scene, Thing

SHAPE_WORDS: dict[str, tuple[str, ...]] = {
    "circle": ("circle", "circle", "circle", "disc", "ball", "round shape"),
    "square": ("square", "square", "square", "box"),
    "triangle": ("triangle",),
    "star": ("star",),
    "heart": ("heart",),
    "moon": ("moon", "moon", "crescent", "crescent moon"),
    "sun": ("sun",),
    "cloud": ("cloud",),
    "flower": ("flower", "flower", "blossom"),
    "tree": ("tree",),
    "house": ("house", "house", "cottage"),
    "mountain": ("mountain",),
    "boat": ("boat", "boat", "boat", "sailing boat", "sailboat"),
}
COLOUR_WORDS: dict[str, tuple[str, ...]] = {
    "purple": ("purple", "purple", "violet"),
    "grey": ("grey", "gray"),
    "teal": ("teal", "teal", "turquoise"),
}
SIZE_WORDS: dict[str, tuple[str, ...]] = {
    "small": ("small", "small", "little", "tiny"),
    "large": ("large", "big", "huge"),
}
PLACES: dict[str, tuple[str, ...]] = {
    "centre": ("in the centre", "in the middle", "in the center", "at the centre"),
    "left": ("on the left", "on the left side", "at the left"),
    "right": ("on the right", "on the right side", "at the right"),
    "top": ("at the top", "near the top", "in the upper part"),
    "bottom": ("at the bottom", "near the bottom", "in the lower part"),
    "top left": ("in the top left corner", "at the top left", "in the upper left corner"),
    "top right": ("in the top right corner", "at the top right", "in the upper right corner"),
    "bottom left": ("in the bottom left corner", "at the bottom left", "in the lower left corner"),
    "bottom right": ("in the bottom right corner", "at the bottom right", "in the lower right corner"),
}
RELATIONS: dict[str, tuple[str, ...]] = {
    "left": ("to the left of", "left of", "on the left of"),
    "right": ("to the right of", "right of", "on the right of"),
    "above": ("above", "over", "on top of"),
    "below": ("below", "under", "beneath"),
}
LANDSCAPE_WORDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {  # after the things, and before them
    "night": (
        ("in the night sky", "at night", "in a starry sky", "on a night sky", "in front of a starry night sky",
         "under the stars"),
        ("night sky", "a starry night", "a dark sky full of stars", "night"),
    ),
    "sea": (
        ("in front of the sea", "at the sea", "by the sea", "with the sea behind", "in front of the ocean",
         "with waves"),
        ("the sea", "sea", "blue sea under a clear sky", "the ocean"),
    ),
    "meadow": (
        ("in front of a meadow", "with green hills", "in a meadow", "with a green meadow behind",
         "in a green landscape"),
        ("a meadow", "green hills", "a green meadow under a blue sky", "meadow"),
    ),
}  # fmt: skip
AMONG_THE_STARS = frozenset({"in the night sky", "in a starry sky", "on a night sky"})
"""What can be said of nothing that stands on the ground."""

STYLE_WORDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {  # before the rest, and after it
    "flat": (
        ("a flat illustration of ", "flat illustration of ", "a flat drawing of "),
        (", flat illustration", ", flat design", " in a flat style"),
    ),
    "line": (
        ("a line drawing of ", "line drawing of ", "line art of ", "an outline drawing of "),
        (", line art", ", line drawing", " as a line drawing"),
    ),
    "pixel": (
        ("pixel art of ", "a pixel art picture of ", "a pixel drawing of "),
        (", pixel art", " in pixel art style", " as pixel art"),
    ),
    "watercolour": (
        ("a watercolour painting of ", "a watercolor painting of ", "a watercolour of ", "watercolor of "),
        (", watercolour", ", watercolor painting", " in watercolour", " as a watercolor"),
    ),
    "shaded": (
        ("a 3D render of ", "3D render of ", "a 3D rendering of ", "a 3D model of "),
        (", 3D render", " in 3D", ", 3D style"),
    ),
}
STYLE_SAID = {"flat": 0.12}
STYLE_SAID_ELSE = 0.85
OPENINGS = ("a picture of ", "an image of ", "there is ")


@dataclass(frozen=True)
class _Detail:
    """How much a caption tells."""

    colours: float = 0.95  # how often a thing's colour is named
    background: float = 0.9  # how often the background is
    places: bool = True  # and sizes, and which thing is where


_FULL = _Detail()
_LEAN = (_Detail(colours=0.0), _Detail(background=0.0), _Detail(0.0, 0.0), _Detail(0.0, 0.0, places=False))
_LEAN_SHARE = 0.1
FRAGMENT_SHARE = 0.04
"""Of captions that are a few words about one part of the scene, as people write negative prompts."""


def caption(scene: Scene, rng: Random) -> str:
    """A true sentence about the scene, or a few words about a part of it."""
    return fragment(scene, rng) if rng.random() < FRAGMENT_SHARE else sentence(scene, rng)


def fragment(scene: Scene, rng: Random) -> str:
    """Such as: red. Or: a red star; pixel art; night sky."""
    thing, kind = rng.choice(scene.things), rng.randrange(6)
    if kind < 2:
        return rng.choice(colour_words(thing.colour))
    if kind == 2:
        return rng.choice(SHAPE_WORDS[thing.shape])
    if kind == 3:
        return _noun(thing, _FULL, rng, sized=False, article=rng.random() < 0.5)
    if kind == 4:
        return rng.choice(STYLE_WORDS[scene.style][0]).removesuffix(" of ").removesuffix(" picture")
    return _background_first(scene.background, rng, article=False)


def sentence(scene: Scene, rng: Random) -> str:
    """It may leave out the style, the background, a place, a size or a colour."""
    detail = rng.choice(_LEAN) if rng.random() < _LEAN_SHARE else _FULL
    text, join = _things(scene, detail, rng), (", ", ": ", " with ")
    style = _style(scene, rng)
    before = style if style.endswith(" ") else ""
    if not before and rng.random() < 0.1:
        before = rng.choice(OPENINGS)
    if rng.random() < detail.background:
        if rng.random() < 0.25:
            first = _background_first(scene.background, rng, article=bool(before))
            text = f"{first}{' with ' if before else rng.choice(join)}{text}"
        else:
            text = f"{text}{rng.choice((' ', ' ', ' ', ', '))}{_background_after(scene, rng)}"
    return _finished(before + text if before else text + style, rng)


def plain_caption(scene: Scene) -> str:
    """The same sentence for the same scene, always."""
    return sentence(scene, Random(repr(scene)))


def relation(first: Thing, second: Thing) -> str | None:
    """How the first lies to the second, a key of RELATIONS; None where it is askew."""
    across, down = second.x - first.x, second.y - first.y
    apart = first.radius + second.radius
    if abs(across) > max(apart, 2 * abs(down)):
        return "left" if across > 0 else "right"
    if abs(down) > max(apart, 2 * abs(across)):
        return "above" if down > 0 else "below"
    return None


def where(thing: Thing) -> str | None:
    """The place that can be said of a thing: a side, a corner, the centre; None between."""
    column = "left" if thing.x < -0.3 else "right" if thing.x > 0.3 else ""
    row = "top" if thing.y < -0.3 else "bottom" if thing.y > 0.3 else ""
    if column and row:
        return f"{row} {column}"
    if column:
        return column if abs(thing.y) < 0.2 else None
    if row:
        return row if abs(thing.x) < 0.2 else None
    return "centre" if max(abs(thing.x), abs(thing.y)) < 0.12 else None


def colour_words(colour: str) -> tuple[str, ...]:
    """What a colour may be called."""
    return COLOUR_WORDS.get(colour, (colour,))


def _finished(text: str, rng: Random) -> str:
    if rng.random() < 0.15:
        text = text[0].upper() + text[1:]
    return text + "." if rng.random() < 0.12 else text


def _style(scene: Scene, rng: Random) -> str:
    """Such as: "a 3D render of ", or ", 3D render", or nothing."""
    if rng.random() >= STYLE_SAID.get(scene.style, STYLE_SAID_ELSE):
        return ""
    return rng.choice(STYLE_WORDS[scene.style][rng.random() < 0.5])


def _noun(thing: Thing, detail: _Detail, rng: Random, *, sized: bool = True, article: bool = True) -> str:
    """Such as: a small red star. Often with its size, where there is a word for that; nearly always with its colour."""
    words = []
    if sized and detail.places and thing.size in SIZE_WORDS and rng.random() < 0.6:
        words.append(rng.choice(SIZE_WORDS[thing.size]))
    if rng.random() < detail.colours:
        words.append(rng.choice(colour_words(thing.colour)))
    words.append(rng.choice(SHAPE_WORDS[thing.shape]))
    return with_article(" ".join(words)) if article else " ".join(words)


def _things(scene: Scene, detail: _Detail, rng: Random) -> str:
    if len(scene.things) == 1:
        return _alone(scene.things[0], detail, rng)
    if len(scene.things) == 2:
        return _two(scene, detail, rng)
    return _three(scene, detail, rng)


def _alone(thing: Thing, detail: _Detail, rng: Random) -> str:
    noun = _noun(thing, detail, rng, article=rng.random() < 0.88)
    place = where(thing) if detail.places else None
    said = 0.35 if place == "centre" else 0.8
    return f"{noun} {rng.choice(PLACES[place])}" if place and rng.random() < said else noun


def _two(scene: Scene, detail: _Detail, rng: Random) -> str:
    things = list(scene.things)
    rng.shuffle(things)
    first, second = (_noun(thing, detail, rng) for thing in things)
    lies = relation(*things) if detail.places else None
    if lies is None or rng.random() < 0.15:
        return f"{first}{rng.choice((' and ', ' and ', ' with '))}{second}"
    if rng.random() < 0.15:
        ends = _ENDS[lies]
        return f"{first} {ends[0]} and {second} {ends[1]}"
    return f"{first} {rng.choice(RELATIONS[lies])} {second}"


_ENDS = {
    "left": ("on the left", "on the right"),
    "right": ("on the right", "on the left"),
    "above": ("at the top", "at the bottom"),
    "below": ("at the bottom", "at the top"),
}


def _three(scene: Scene, detail: _Detail, rng: Random) -> str:
    names = [_noun(thing, detail, rng, sized=False) for thing in scene.things]
    if not detail.places or scene.layout == "scattered" or rng.random() < 0.15:
        rng.shuffle(names)
        return _listed(names)
    if scene.layout == "row" and rng.random() < 0.5:
        return f"{names[0]} on the left, {names[1]} in the middle and {names[2]} on the right"
    if scene.layout == "column" and rng.random() < 0.5:
        return f"{names[0]} at the top, {names[1]} in the middle and {names[2]} at the bottom"
    lines = {"row": ("from left to right", "in a row"), "column": ("from top to bottom", "one above the other")}
    return f"{_listed(names)} {rng.choice(lines[scene.layout])}"


def _listed(names: list[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}"


def _toned(background: Background, rng: Random) -> str:
    colour = rng.choice(colour_words(background.colour))
    shade = {"light": rng.choice(("light", "light", "pale")), "dark": "dark"}.get(background.tone)
    return f"{shade} {colour}" if shade and rng.random() < 0.9 else colour


def _gradient(background: Background, rng: Random) -> str:
    top, bottom = (rng.choice(colour_words(c)) for c in (background.colour, background.second))
    forms = (
        f"gradient from {top} to {bottom}",
        f"gradient from {top} at the top to {bottom} at the bottom",
        f"{top} to {bottom} gradient",
        f"gradient of {top} and {bottom}",
    )
    return rng.choice(forms)


def _background_after(scene: Scene, rng: Random) -> str:
    """Such as: on a blue background."""
    background = scene.background
    if background.kind in LANDSCAPE_WORDS:
        grounded = any(thing.shape in OF_THE_GROUND for thing in scene.things)
        words = LANDSCAPE_WORDS[background.kind][0]
        return rng.choice([word for word in words if not (grounded and word in AMONG_THE_STARS)])
    if background.kind == "gradient":
        return f"{rng.choice(('on', 'over', 'in front of'))} {with_article(_gradient(background, rng))}"
    colour = _toned(background, rng)
    if rng.random() < 0.15:
        return f"on {colour}"
    return f"{rng.choice(('on', 'on', 'on', 'against', 'in front of'))} {with_article(colour)} background"


def _background_first(background: Background, rng: Random, *, article: bool) -> str:
    """Such as: blue background."""
    if background.kind in LANDSCAPE_WORDS:
        return rng.choice(LANDSCAPE_WORDS[background.kind][1])
    gradient = background.kind == "gradient"
    words = _gradient(background, rng) if gradient else f"{_toned(background, rng)} background"
    return with_article(words) if article or rng.random() < 0.45 else words


def with_article(words: str) -> str:
    """With "a" or "an" before them."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"
