"""Model cards: what a worker publishes about each model that it serves, and the gateway validates by."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self

from model.params import Sampler


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """What a request gets that does not say."""

    width: int = 1024
    height: int = 1024
    steps: int
    guidance_scale: float
    sampler: Sampler = "euler"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a request may ask for. The public limits of the server are these numbers' own defaults."""

    min_pixels: int = 262_144  # 0.25 MP
    max_pixels: int = 2_097_152  # 2 MP
    min_side: int = 64  # pixels
    max_side: int = 3072  # pixels
    side_multiple: int = 16
    max_steps: int = 100
    max_guidance_scale: float = 20.0
    max_prompt_chars: int = 10_000
    max_num_images: int = 4

    def allows(self, width: int, height: int) -> bool:
        """Whether a picture may have exactly this size, in pixels."""
        for side in (width, height):
            if not self.min_side <= side <= self.max_side or side % self.side_multiple:
                return False
        return self.min_pixels <= width * height <= self.max_pixels


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """One model as the gateway and its users see it."""

    name: str
    description: str
    variant: str  # large | large-turbo | medium | other
    revision: str  # changes when the weights do
    parameters: int  # of the MMDiT
    defaults: Defaults
    limits: Limits = field(default_factory=Limits)
    negative_prompt: bool = True  # False: distilled without guidance, a negative prompt has no effect
    aliases: tuple[str, ...] = ()  # vendors' names that it answers for, while no card has that name
    trained_pixels: int | None = None  # the largest pictures that it was trained on, where larger ones come out worse

    def to_json(self) -> str:
        """The card as JSON."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """The card of its JSON; what a newer worker adds to it is passed over."""
        data: dict[str, Any] = json.loads(text)
        defaults, limits = _known(Defaults, data.pop("defaults")), _known(Limits, data.pop("limits"))
        data["aliases"] = tuple(data.get("aliases", ()))
        return cls(defaults=Defaults(**defaults), limits=Limits(**limits), **_known(cls, data))


def _known(kind: type[Any], data: dict[str, Any]) -> dict[str, Any]:
    names = {field.name for field in fields(kind)}
    return {name: value for name, value in data.items() if name in names}
