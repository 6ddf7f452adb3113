"""What a scene is called: a small grammar with synonyms and free order. What a caption says is true of its scene."""

from __future__ import annotations

from random import Random

from model.training.scenes import Background, Scene, Thing

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
OPENINGS = (
    "a picture of ",
    "a drawing of ",
    "an illustration of ",
    "an image of ",
    "a flat illustration of ",
    "there is ",
)


def caption(scene: Scene, rng: Random) -> str:
    """A true sentence about the scene; it may leave out the background, a place, a size or a colour."""
    text = _things(scene, rng)
    if rng.random() < 0.9:
        if rng.random() < 0.25:
            text = f"{_background_first(scene.background, rng)}{rng.choice((', ', ': ', ' with '))}{text}"
            return _finished(text, rng)
        text = f"{text}{rng.choice((' ', ' ', ' ', ', '))}{_background_after(scene.background, rng)}"
    if rng.random() < 0.15:
        text = rng.choice(OPENINGS) + text
    return _finished(text, rng)


def plain_caption(scene: Scene) -> str:
    """The same sentence for the same scene, always."""
    return caption(scene, Random(repr(scene)))


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


def _noun(thing: Thing, rng: Random, *, sized: bool = True, article: bool = True) -> str:
    """Such as: a small red star. Often with its size, where there is a word for that; nearly always with its colour."""
    words = []
    if sized and thing.size in SIZE_WORDS and rng.random() < 0.6:
        words.append(rng.choice(SIZE_WORDS[thing.size]))
    if rng.random() < 0.95:
        words.append(rng.choice(colour_words(thing.colour)))
    words.append(rng.choice(SHAPE_WORDS[thing.shape]))
    if not article:
        return " ".join(words)
    return f"{'an' if words[0][0] in 'aeiou' else 'a'} {' '.join(words)}"


def _things(scene: Scene, rng: Random) -> str:
    if len(scene.things) == 1:
        return _alone(scene.things[0], rng)
    if len(scene.things) == 2:
        return _two(scene, rng)
    return _three(scene, rng)


def _alone(thing: Thing, rng: Random) -> str:
    noun = _noun(thing, rng, article=rng.random() < 0.85)
    place = where(thing)
    said = 0.35 if place == "centre" else 0.8
    return f"{noun} {rng.choice(PLACES[place])}" if place and rng.random() < said else noun


def _two(scene: Scene, rng: Random) -> str:
    first, second = scene.things
    forward, back = {"row": ("left", "right"), "column": ("above", "below")}.get(scene.layout, ("", ""))
    if not forward or rng.random() < 0.15:
        things = [first, second]
        rng.shuffle(things)
        link = rng.choice((" and ", " and ", " with "))
        return link.join(_noun(thing, rng) for thing in things)
    if rng.random() < 0.15:
        ends = ("on the left", "on the right") if scene.layout == "row" else ("at the top", "at the bottom")
        return f"{_noun(first, rng)} {ends[0]} and {_noun(second, rng)} {ends[1]}"
    if rng.random() < 0.5:
        return f"{_noun(first, rng)} {rng.choice(RELATIONS[forward])} {_noun(second, rng)}"
    return f"{_noun(second, rng)} {rng.choice(RELATIONS[back])} {_noun(first, rng)}"


def _three(scene: Scene, rng: Random) -> str:
    if scene.layout == "scattered" or rng.random() < 0.15:
        things = list(scene.things)
        rng.shuffle(things)
        return _listed([_noun(thing, rng, sized=False) for thing in things])
    names = [_noun(thing, rng, sized=False) for thing in scene.things]
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


def _background_after(background: Background, rng: Random) -> str:
    """Such as: on a blue background."""
    if background.kind in LANDSCAPE_WORDS:
        return rng.choice(LANDSCAPE_WORDS[background.kind][0])
    if background.kind == "gradient":
        return f"{rng.choice(('on', 'over', 'in front of'))} {_with_article(_gradient(background, rng))}"
    colour = _toned(background, rng)
    if rng.random() < 0.15:
        return f"on {colour}"
    return f"{rng.choice(('on', 'on', 'on', 'against', 'in front of'))} {_with_article(colour)} background"


def _background_first(background: Background, rng: Random) -> str:
    """Such as: blue background."""
    if background.kind in LANDSCAPE_WORDS:
        return rng.choice(LANDSCAPE_WORDS[background.kind][1])
    if background.kind == "gradient":
        return _with_article(_gradient(background, rng)) if rng.random() < 0.5 else _gradient(background, rng)
    colour = _toned(background, rng)
    return f"{colour} background" if rng.random() < 0.6 else f"{_with_article(colour)} background"


def _with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"
