"""A preview's pixels to the bytes that are sent to whoever watches."""

from __future__ import annotations

import io

from PIL import Image
from torch import Tensor

from worker.safety import SafetyFilter

QUALITY = 80


def encode_preview(rgb: Tensor, safety: SafetyFilter | None = None) -> bytes:
    """A small JPEG, a few kilobytes; blurred as a picture would be.

    rgb : shape = (h, w, 3), uint8, on the CPU
    """
    if safety:
        rgb, _ = safety.check(rgb)
    file = io.BytesIO()
    Image.fromarray(rgb.numpy()).save(file, format="jpeg", quality=QUALITY)
    return file.getvalue()
