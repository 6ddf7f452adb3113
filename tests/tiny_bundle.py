"""A bundle of tiny random weights in the diffusers layout, made on the fly: fast, and its pictures are noise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CARD: dict[str, Any] = {
    "description": "Tiny random weights for tests; its pictures are noise",
    "t5_length": 32,
    "defaults": {"width": 64, "height": 64, "steps": 4, "guidance_scale": 3.0, "sampler": "euler"},
    "limits": {"min_pixels": 64 * 64},
}


def save_tiny_bundle(folder: Path) -> Path:
    """Write the bundle; gives the folder."""
    from tests.model import tiny  # loads torch and diffusers, which the gateway's tests alone do not want

    tiny.pipeline().save_pretrained(folder)
    (folder / "darkroom.json").write_text(json.dumps(CARD))
    return folder


def save_roomy_bundle(folder: Path) -> Path:
    """As the tiny one, but of pictures to 1536 pixels a side, which take it seconds a step; gives the folder."""
    from dataclasses import replace

    from tests.model import tiny

    pipeline = tiny.pipeline()
    large = tiny.transformer(replace(tiny.MMDIT_X, pos_embed_grid=96))
    tiny.randomize(large)
    pipeline.register_modules(transformer=large)
    pipeline.save_pretrained(folder)
    (folder / "darkroom.json").write_text(json.dumps(CARD))
    return folder


def save_variant(bundle: Path, folder: Path, **told: Any) -> Path:
    """A variant of the tiny bundle that changes one matrix, in a new folder; its base is linked beside it."""
    import torch
    from safetensors.torch import save_file

    from model.card import FILE
    from tests.model import tiny

    folder.mkdir()
    name = "transformer.proj_out.lora_{}.weight"
    width = torch.nn.Linear(tiny.MMDIT_X.hidden, 64).weight
    state = {name.format("A"): torch.randn(2, width.shape[1]), name.format("B"): torch.randn(width.shape[0], 2)}
    save_file(state, folder / FILE)
    (folder.parent / "base").symlink_to(bundle)
    (folder / "darkroom.json").write_text(json.dumps({"base": "../base"} | told))
    return folder
