"""Model folders for tests that need a whole model, made on the fly."""

from __future__ import annotations

import json
from pathlib import Path

SIDE = 64
"""Pixels: the side of the tiny model's pictures."""


def save_tiny_bundle(folder: Path) -> Path:
    """A model of random weights whose card allows 64x64."""
    from tests.model import tiny  # loads torch and diffusers

    tiny.pipeline().save_pretrained(folder)
    card = {
        "description": "random weights, for tests",
        "defaults": {"width": SIDE, "height": SIDE, "steps": 4, "guidance_scale": 2.0},
        "limits": {"min_pixels": SIDE * SIDE, "min_side": SIDE},
    }
    (folder / "darkroom.json").write_text(json.dumps(card))
    return folder
