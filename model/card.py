"""What a model's folder says of itself: `darkroom.json`, also of a variant, which names its base."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.bundle import read_json
from model.weights import CheckpointError

CARD = "darkroom.json"
FILE = "pytorch_lora_weights.safetensors"
"""What the file of a variant's difference is called, as diffusers calls it."""


@dataclass(frozen=True)
class Variant:
    """A folder that says what it differs from."""

    folder: Path
    base: Path  # a whole checkpoint
    base_revision: str | None  # of the base's MMDiT; None: any of the right shapes

    @property
    def file(self) -> Path:
        """The difference: the file with the usual name, or the only safetensors file."""
        usual = self.folder / FILE
        found = [usual] if usual.is_file() else sorted(self.folder.glob("*.safetensors"))
        if len(found) != 1:
            names = ", ".join(path.name for path in found) or "no safetensors file"
            raise CheckpointError(f"{self.folder} holds {names}, expected {FILE}")
        return found[0]


def variant_at(path: Path) -> Variant | None:
    """The variant that a folder holds; None if it is no folder with a `base`. CheckpointError."""
    card, told = path / CARD, _own_card(path)
    if "base" not in told:
        if (path / FILE).is_file():
            raise CheckpointError(f"{path / FILE} is a difference: {card} must say from what, as its `base`")
        return None
    base, revision = told["base"], told.get("base_revision")
    if not isinstance(base, str) or not base or Path(base).is_absolute():
        raise CheckpointError(f"{card}: base is {base!r}, expected a path relative to this folder, such as '../demo'")
    if not isinstance(revision, str | None):
        raise CheckpointError(f"{card}: base_revision is {revision!r}, expected a text")
    target = (path / base).resolve()
    if not target.exists():
        raise CheckpointError(f"{card}: base is {base!r}, but {target} does not exist")
    if "base" in _own_card(target):
        raise CheckpointError(f"{card}: base is {base!r}, itself a variant; expected a whole model")
    return Variant(path, target, revision)


def card_at(path: Path) -> dict[str, Any]:
    """What `darkroom.json` says: description, defaults, limits, negative_prompt, aliases, trained_pixels, t5_length.

    What a variant does not say is as its base says, but for the description and the aliases. CheckpointError.
    """
    own = _own_card(path)
    if (variant := variant_at(path)) is None:
        return own
    base = {key: value for key, value in _own_card(variant.base).items() if key not in ("description", "aliases")}
    for part in ("defaults", "limits"):
        if isinstance(base.get(part), dict) and isinstance(own.get(part), dict):
            own[part] = base[part] | own[part]
    return base | own


def _own_card(path: Path) -> dict[str, Any]:
    return read_json(path / CARD) if (path / CARD).is_file() else {}
