"""A bundle of tiny random weights in the diffusers layout, made on the fly: fast, and its pictures are noise."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.model import tiny

CARD = {
    "description": "Tiny random weights for tests; its pictures are noise",
    "t5_length": 32,
    "defaults": {"width": 64, "height": 64, "steps": 4, "guidance_scale": 3.0, "sampler": "euler"},
    "limits": {"min_pixels": 64 * 64},
}


def write(folder: Path) -> Path:
    """Write the bundle; gives the folder."""
    tiny.pipeline().save_pretrained(folder)
    (folder / "darkroom.json").write_text(json.dumps(CARD))
    return folder


if __name__ == "__main__":
    write(Path(sys.argv[1]))
