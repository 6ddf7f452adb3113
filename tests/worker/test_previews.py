"""A preview as the few bytes that are sent."""

from __future__ import annotations

import io

import torch
from PIL import Image

from worker.previews import encode_preview


def test_preview_is_a_small_jpeg_of_the_pixels() -> None:
    rgb = torch.zeros(128, 192, 3, dtype=torch.uint8)
    rgb[:, :96, 0] = 255
    data = encode_preview(rgb)
    picture = Image.open(io.BytesIO(data))
    assert (picture.format, picture.size) == ("JPEG", (192, 128))
    red, black = picture.getpixel((20, 64)), picture.getpixel((170, 64))
    assert red[0] > 240
    assert max(black) < 10
    assert len(data) < 10_000
