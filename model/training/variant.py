"""A distilled change as a variant of its teacher's bundle: the folder that a worker serves beside it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from model.card import CARD, FILE
from model.layouts import find
from model.training.adapters import save_difference
from model.training.loop import load_shards, read_record

LIMIT_BYTES = 3_200_000


def export_turbo(teacher: Path, turbo: Path, out: Path, scale: float = 1.0, terminal: float | None = None) -> int:
    """Writes the variant of the bundle `teacher` that the run `turbo` made into a new folder; returns its bytes.

    The folder names its base by a relative path: they move together.

    scale : of the change, as a LoRA has one: a student that learnt by mean squares falls short of its teacher's
            guidance, and a little more of the change than it learnt makes up for that
    terminal : the last noise level before 0 that pictures are made with; None: the one that the student learnt with.
            A higher one shortens the steps before it, if the last step can take more of the noise than it learnt to

    Errors: ValueError if the run had another teacher, scale or terminal is out of range or the folder becomes too
    large; CheckpointError, FileExistsError.
    """
    record, base = read_record(turbo), find(teacher)
    if record.get("what") != "turbo":
        raise ValueError(f"{turbo} holds a {record.get('what')}, expected what distill writes")
    if record["teacher"] not in (None, base.revision):
        raise ValueError(f"{turbo} was distilled from revision {record['teacher']}, but {teacher} is {base.revision}")
    if not 0 < scale <= 2:
        raise ValueError(f"scale is {scale:g}, expected more than 0 and at most 2")
    if terminal is not None and not 0 < terminal < 1:
        raise ValueError(f"terminal is {terminal:g}, expected between 0 and 1")
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty")
    out.mkdir(parents=True, exist_ok=True)
    change = {
        name: scale * tensor if name.endswith((".b", ".c")) else tensor
        for name, tensor in load_shards(turbo, "turbo").items()
    }
    save_difference(change, base.mmdit_config, out / FILE)
    shift = record["shift"] | ({"shift_terminal": terminal} if terminal else {})
    card = _card(os.path.relpath(teacher.resolve(), out.resolve()), base.base_revision, record["steps"], shift)
    (out / CARD).write_text(json.dumps(card, indent=1) + "\n")
    (out / "training.json").write_text(json.dumps(record | {"scale": scale, "sampled": shift}, indent=1) + "\n")
    size = sum(path.stat().st_size for path in out.iterdir())
    if size > LIMIT_BYTES:
        raise ValueError(f"{out} takes {size:,} bytes, more than {LIMIT_BYTES:,}: distil with a lower rank")
    return size


def _card(base: str, base_revision: str, steps: int, shift: dict[str, Any]) -> dict[str, Any]:
    """What `darkroom.json` says; size, limits and t5_length are the base's."""
    return {
        "description": f"The demo model distilled to {steps} steps without guidance; shares its encoders and VAE",
        "aliases": ["sd3.5-large-turbo"],
        "base": base,
        "base_revision": base_revision,
        **shift,
        "defaults": {"steps": steps, "guidance_scale": 1.0, "sampler": "euler"},
        "negative_prompt": False,
    }
