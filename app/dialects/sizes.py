"""The sizes that vendors' clients expect, in pixels."""

from __future__ import annotations

from typing import Any

from app.size import MEGAPIXEL, size_of
from worker.contract.cards import ModelCard

OF_RATIO = {
    "21:9": (1536, 640),
    "16:9": (1344, 768),
    "3:2": (1216, 832),
    "5:4": (1088, 896),
    "1:1": (1024, 1024),
    "4:5": (896, 1088),
    "2:3": (832, 1216),
    "9:16": (768, 1344),
    "9:21": (640, 1536),
}
"""What Stability and DeepInfra give for an aspect ratio: about a megapixel, sides a multiple of 64."""


def of_ratio(aspect_ratio: str, card: ModelCard) -> dict[str, Any]:
    """The fields of a request for a picture of this shape: the vendors' own size where the model makes 1024x1024."""
    width, height = OF_RATIO.get(aspect_ratio, (0, 0))
    is_usual = (card.defaults.width, card.defaults.height) == OF_RATIO["1:1"]
    if is_usual and card.limits.allows(width, height):
        return {"width": width, "height": height}
    return {"aspect_ratio": aspect_ratio}


def fitted(width: int, height: int, card: ModelCard) -> tuple[int, int]:
    """The same size if the model makes it, else the nearest that it makes in this shape. InvalidField if none."""
    limits = card.limits
    if limits.allows(width, height):
        return width, height
    most = min(limits.max_pixels, limits.max_side**2 * min(width, height) // max(width, height))
    pixels = max(min(width * height, most), limits.min_pixels)
    return size_of(f"{width}:{height}", pixels / MEGAPIXEL, card.defaults, limits)
