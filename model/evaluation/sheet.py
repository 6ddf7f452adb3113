"""The contact sheet of an evaluation: what was asked below each picture, and what the checker read otherwise."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont

from model.evaluation.checker import MALFORMED, Seen
from model.evaluation.evaluation import Shown
from model.evaluation.plan import BASE
from model.evaluation.scores import Marks, ThingMarks
from model.training.sheets import LINE, MARGIN, to_images

CELL = 192  # pixels, of a picture's side on the sheet
COLUMNS = 8
RIGHT, WRONG, INK = (40, 160, 60), (215, 30, 30), (20, 20, 20)


def evaluation_sheet(shown: Mapping[str, Sequence[Shown]]) -> Image.Image:
    """The pictures of all settings. A ring is where the checker sees a thing: green if it is as asked, red if not."""
    cells = [_cell(name, one) for name, them in shown.items() for one in them]
    height = max(cell.height for cell in cells) + MARGIN
    rows = -(-len(cells) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * (CELL + MARGIN) + MARGIN, rows * height + MARGIN), "white")
    for n, cell in enumerate(cells):
        sheet.paste(cell, (MARGIN + n % COLUMNS * (CELL + MARGIN), MARGIN + n // COLUMNS * height))
    return sheet


def _cell(setting: str, shown: Shown) -> Image.Image:
    """A picture with its rings, and the words below."""
    picture = to_images(shown.pixels[None])[0]
    pen = ImageDraw.Draw(picture)
    for seen, right in _rings(shown):
        _ring(pen, seen, picture.size, RIGHT if right else WRONG)
    picture.thumbnail((CELL, CELL))
    lines = [(line, INK) for line in textwrap.wrap(shown.request.prompt, CELL // 6)]
    if setting != BASE:
        lines.insert(0, (setting, INK))
    lines += [(line, WRONG) for line in wrong(shown.marks)]
    cell = Image.new("RGB", (CELL, CELL + 2 + LINE * len(lines)), "white")
    cell.paste(picture, ((CELL - picture.width) // 2, (CELL - picture.height) // 2))
    pen, font = ImageDraw.Draw(cell), ImageFont.load_default()
    for n, (line, ink) in enumerate(lines):
        pen.text((0, CELL + 1 + n * LINE), line, ink, font)
    return cell


def wrong(marks: Marks) -> list[str]:
    """What the checker read as wrong, a line each."""
    lines = [line for thing in marks.things for line in _wrong_thing(thing)]
    if marks.relation is False:
        lines.append("not so placed")
    return lines + [f"other {name}" for name in ("style", "background", "number") if not getattr(marks, name)]


def _wrong_thing(marks: ThingMarks) -> Iterator[str]:
    asked, seen = marks.asked, marks.seen
    if seen is None:
        yield f"no {asked.colour} {asked.shape}"
        return
    if not (marks.colour and marks.shape):
        shape = "shapeless" if seen.shape == MALFORMED else seen.shape
        yield f"{asked.colour} {asked.shape}: {seen.colour} {shape}"
    if marks.position is False:
        yield f"{asked.shape}: not {asked.place}"


def _rings(shown: Shown) -> Iterator[tuple[Seen, bool]]:
    """Where things were seen, and whether each is right; what nobody asked for is wrong."""
    right = {id(m.seen): m.colour and m.shape and m.position is not False for m in shown.marks.things}
    for seen in shown.reading.things:
        yield seen, right.get(id(seen), False)


def _ring(pen: ImageDraw.ImageDraw, seen: Seen, size: tuple[int, int], ink: tuple[int, int, int]) -> None:
    width, height = size
    x, y = (seen.x + 1) / 2 * width, (seen.y + 1) / 2 * height
    for radius, colour in ((5, (255, 255, 255)), (4, ink), (3, ink)):
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), outline=colour)
