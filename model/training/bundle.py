"""A trained autoencoder and a trained flow as a bundle: the diffusers folder layout, with a card and what made it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from model.checkpoint import export_diffusers
from model.training.demo import T5_LENGTH
from model.training.flow import load_average, new_net
from model.training.loop import read_record
from model.training.palette import COLOURS
from model.training.reconstruction import load_vae
from model.training.samples import GUIDANCE, SHIFT, STEPS
from model.training.scenes import DATA_VERSION, SHAPES

FILE_BYTES = 16 * 1000 * 1000
LIMIT_BYTES = 24_000_000


@dataclass(frozen=True)
class Card:
    """What `darkroom.json` says of the bundle."""

    description: str = (
        "A small model of the SD3.5 architecture that Darkroom trained on its own drawings: "
        f"{', '.join(SHAPES)} in {', '.join(COLOURS)}, on plain colours, gradients, night sky, sea and meadow"
    )
    t5_length: int = T5_LENGTH
    defaults: dict[str, Any] = field(
        default_factory=lambda: {
            "width": 512, "height": 512, "steps": STEPS, "guidance_scale": GUIDANCE, "sampler": "euler",
        }
    )  # fmt: skip
    limits: dict[str, Any] = field(default_factory=dict)


def export_bundle(
    vae_folder: Path, flow_folder: Path, out: Path, shift: float = SHIFT, card: Card | None = None
) -> int:
    """Writes the bundle into a new folder; returns its bytes.

    Errors: ValueError if the drawings have changed since (the tokenizers with them) or the bundle is too large.
    """
    records = {"vae": read_record(vae_folder), "flow": read_record(flow_folder)}
    made_with = records["flow"]["data_version"]
    if made_with != DATA_VERSION:
        raise ValueError(
            f"{flow_folder} was trained on drawings of version {made_with}, this code draws {DATA_VERSION}"
        )
    device = torch.device("cpu")
    vae, net = load_vae(vae_folder, device), new_net()
    load_average(net, flow_folder)
    export_diffusers(
        out,
        net.mmdit,
        vae,
        net.tower.encoders(),
        shift=shift,
        max_shard_bytes=FILE_BYTES,
        dtype=torch.float16,
        sample_side=512,
    )
    (out / "darkroom.json").write_text(json.dumps(asdict(card or Card()), indent=1) + "\n")
    (out / "training.json").write_text(json.dumps(records, indent=1) + "\n")
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    if size > LIMIT_BYTES:
        raise ValueError(f"{out} takes {size:,} bytes, more than {LIMIT_BYTES:,}")
    return size
