"""A trained autoencoder and a trained flow as a bundle: the diffusers folder layout, with a card and what made it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from model.bundle import export_diffusers
from model.card import CARD
from model.layouts import find
from model.sampling import Shift
from model.training.demo import T5_LENGTH
from model.training.loop import read_record
from model.training.net import load_net
from model.training.palette import COLOURS
from model.training.reconstruction import load_vae
from model.training.samples import GUIDANCE, SHIFT, STEPS
from model.training.scenes import SHAPES
from model.training.sources import Drawings

FILE_BYTES = 16 * 1000 * 1000
LIMIT_BYTES = 24_000_000
"""Of the demo bundle, which is part of the repository."""
LEAST_PIXELS = 512 * 512
"""Of the pictures that Darkroom serves by default: models trained on smaller ones say so in their card."""


@dataclass(frozen=True)
class Card:
    """What `darkroom.json` says of the bundle."""

    description: str = (
        "A small model of the SD3.5 architecture that Darkroom trained on its own drawings: "
        f"{', '.join(SHAPES)} in {', '.join(COLOURS)}, on plain colours, gradients, night sky, sea and meadow, "
        "as flat pictures, line art, pixel art, watercolour and shaded 3-D"
    )
    aliases: tuple[str, ...] = ("sd3.5-large", "sd3.5-medium")  # for whom the demo stands in while they are not served
    t5_length: int = T5_LENGTH
    defaults: dict[str, Any] = field(
        default_factory=lambda: {
            "width": 512, "height": 512, "steps": STEPS, "guidance_scale": GUIDANCE, "sampler": "euler",
        }
    )  # fmt: skip
    limits: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, record: dict[str, Any]) -> Card:
        """From the record of a flow: for a user's own pictures their names, and the first size they ended with."""
        if record["source"] == Drawings.name:
            return cls(t5_length=record["t5_length"])
        first = record["plan"][-1]["sizes"][0]
        width, height = first["width"], first["height"]
        limits = (
            {} if width * height >= LEAST_PIXELS else {"min_side": min(width, height), "min_pixels": width * height}
        )
        size = {"width": width, "height": height}
        return cls(f"Trained on {record['source']}", (), record["t5_length"], Card().defaults | size, limits)


def export_bundle(vae_folder: Path, flow_folder: Path, out: Path, card: Card | None = None) -> int:
    """Writes the bundle into a new folder; returns its bytes.

    vae_folder : of a run, or a bundle
    raises ValueError : the drawings have changed since (the tokenizers with them), or the demo bundle is too large
    """
    record = read_record(flow_folder)
    net, vae = load_net(flow_folder), load_vae(vae_folder, torch.device("cpu"))
    export_diffusers(
        out,
        net.mmdit,
        vae,
        net.tower.encoders(),
        shift=_shift(record),
        max_shard_bytes=FILE_BYTES,
        dtype=torch.float16,
        sample_side=512,
    )
    (out / CARD).write_text(json.dumps(asdict(card or Card.of(record)), indent=1) + "\n")
    of_vae = read_record(vae_folder)
    records = {"vae": of_vae.get("vae", of_vae), "flow": record}  # a bundle's record has both
    (out / "training.json").write_text(json.dumps(records, indent=1) + "\n")
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    if size > LIMIT_BYTES and record["source"] == Drawings.name:
        raise ValueError(f"{out} takes {size:,} bytes, more than {LIMIT_BYTES:,}")
    return size


def _shift(record: dict[str, Any]) -> Shift:
    """The sampler's timestep shift: that of the bundle that was trained further, or the demo's."""
    if not record.get("start"):
        return SHIFT
    return find(Path(record["start"])).shift
