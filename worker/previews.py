"""A preview's pixels to the bytes that are sent to whoever watches."""

from __future__ import annotations

import io

from PIL import Image
from torch import Tensor

MEDIA_TYPE = "image/jpeg"
QUALITY = 80


def encode_preview(rgb: Tensor) -> bytes:
    """A small JPEG, a few kilobytes.

    rgb : shape = (h, w, 3), uint8, on the CPU
    """
    file = io.BytesIO()
    Image.fromarray(rgb.numpy()).save(file, format="jpeg", quality=QUALITY)
    return file.getvalue()
