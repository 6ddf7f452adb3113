"""Contact sheets: pictures side by side with what was asked below each."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

MARGIN, LINE = 8, 13


def to_images(pixels: Tensor) -> list[Image.Image]:
    """Pictures of shape = (batch, 3, height, width), from -1 to 1, as 8-bit RGB."""
    eight_bit = pixels.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
    return [Image.fromarray(picture.permute(1, 2, 0).contiguous().cpu().numpy()) for picture in eight_bit]


def contact_sheet(pixels: Tensor, captions: Sequence[str], columns: int = 4) -> Image.Image:
    """Pictures of one size in rows of `columns`, each above its caption."""
    images = to_images(pixels)
    width, height = images[0].size
    font = ImageFont.load_default()
    wrapped = [textwrap.wrap(text, max(8, width // 6)) for text in captions]
    foot = LINE * max((len(lines) for lines in wrapped), default=0)
    rows = -(-len(images) // columns)
    cell = width + MARGIN, height + foot + MARGIN
    sheet = Image.new("RGB", (columns * cell[0] + MARGIN, rows * cell[1] + MARGIN), "white")
    pen = ImageDraw.Draw(sheet)
    for n, (image, lines) in enumerate(zip(images, wrapped, strict=True)):
        left, top = MARGIN + n % columns * cell[0], MARGIN + n // columns * cell[1]
        sheet.paste(image, (left, top))
        for i, line in enumerate(lines):
            known = line.encode("latin-1", "replace").decode("latin-1")  # the default font may have no more
            pen.text((left, top + height + 1 + i * LINE), known, "black", font)
    return sheet
