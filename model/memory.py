"""The memory plan: what of some models goes where on a GPU of a given size. Arithmetic; no torch.

What is counted: every weight; for each GPU a fixed part (the CUDA context, workspaces of its libraries, and the cache
of embeddings); and for the picture in the making, bytes for each of its pixels, of which decoding takes the most.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from model.config import TIMESTEP_DIM, VARIANTS, MMDiTConfig

Encoders = Literal["gpu", "cpu", "offload"]
"""Where text encoders live and compute: on the GPU; on the CPU; in the host's memory, and on the GPU while they run."""

Precision = Literal["bf16", "fp8"]

MODELS = tuple(VARIANTS)
"""The published models, as they are named here."""

PUBLISHED = {"CLIP-L": 123_650_304, "CLIP-G": 694_659_840, "T5": 4_762_310_656}
"""Numbers of the text encoders that all published models share."""

VAE_NUMBERS = 83_819_683
BF16 = 2  # bytes

FIXED = 900_000_000
"""Bytes of a GPU that are none of a model's weights, whatever is drawn; 0.27 GB of it is the cache of embeddings."""

A_PIXEL = 3_000
"""Bytes while a guided picture is made, by its pixels: 3.1 GB at 1024x1024.

Large with all encoders took 28.5 GiB there by diffusers (an H20), of which 27.6 GB are weights; by our fast way 1.4 GB
beside what all nets held (an H100). The rest is for what graphs keep and what lies between tensors.
"""

SIDES = (1024, 768, 512)

CARDS = (12, 16, 24, 40, 48, 80)
"""GB of the cards that are sold. Each has at least so many billion bytes."""


def gigabytes(size: float) -> str:
    """Bytes for people."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size:.0f} bytes"


def free_on_host() -> int | None:
    """Bytes of the host's memory that are free for who asks now; None where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def mmdit_numbers(config: MMDiTConfig) -> int:
    """How many numbers an MMDiT has, with its table of positions."""
    h, patch = config.hidden, config.patch**2 * config.in_channels
    norms = 2 * config.head_dim if config.qk_norm else 0
    qkv, proj, mlp = _linear(h, 3 * h) + norms, _linear(h, h), _linear(h, config.mlp_ratio * h) * 2
    mlp += h - config.mlp_ratio * h  # the bias of the way back is shorter
    embedders = sum(_linear(width, h) + proj for width in (TIMESTEP_DIM, config.pooled_dim))
    beside = config.pos_embed_grid**2 * h + _linear(patch, h) + embedders + _linear(config.context_dim, h)
    image = _linear(h, 6 * h) + qkv + proj + mlp
    dual = _linear(h, 3 * h) + qkv + proj
    last_context = _linear(h, 2 * h) + qkv
    final = _linear(h, patch) + _linear(h, 2 * h)
    return beside + (2 * config.depth - 1) * image + len(config.dual_blocks) * dual + last_context + final


def mmdit_bytes(config: MMDiTConfig, precision: Precision = "bf16") -> int:
    """What an MMDiT takes. fp8: the image stream's linears, one byte a number and four a row; all else stays bf16."""
    whole = mmdit_numbers(config) * BF16
    if precision == "bf16":
        return whole
    h, ratio = config.hidden, config.mlp_ratio
    attention = [(3 * h, h), (h, h)]
    matrices = config.depth * [*attention, (ratio * h, h), (h, ratio * h)] + len(config.dual_blocks) * attention
    return whole - sum(rows * columns * (BF16 - 1) - 4 * rows for rows, columns in matrices)


def working_bytes(side: int) -> int:
    """What a GPU needs beside weights for one guided picture of side x side pixels."""
    return FIXED + A_PIXEL * side**2


def choose_encoders(weights: int, encoders: int, free: int | None) -> Encoders:
    """On the GPU, if weights and encoders of so many bytes leave room for a picture of 1024x1024; else offloaded."""
    return "gpu" if free is None or weights + encoders + working_bytes(SIDES[0]) <= free else "offload"


@dataclass(frozen=True)
class Arrangement:
    """One way to place some models."""

    precision: Precision
    encoders: Encoders
    t5: bool = True

    @property
    def title(self) -> str:
        """In words."""
        where = {"gpu": "on the GPU", "cpu": "on the CPU", "offload": "offloaded"}[self.encoders]
        return f"{self.precision}, encoders {where}" + ("" if self.t5 else ", without T5")

    @property
    def settings(self) -> dict[str, str]:
        """What to set for it, beside DARKROOM_MODELS."""
        precision = {} if self.precision == "bf16" else {"DARKROOM_PRECISION": str(self.precision)}
        t5 = {} if self.t5 else {"DARKROOM_T5": "no"}
        return {**precision, "DARKROOM_TEXT_ENCODERS": self.encoders, **t5}

    @property
    def price(self) -> str:
        """What it costs."""
        prices = {
            "gpu": "",
            "offload": "a prompt that is not in the cache takes 0.5 s longer, T5's way over PCIe at 20 GB/s",
            "cpu": "a prompt that is not in the cache takes seconds on the CPU",
        }
        fp8 = "fp8 changes pictures a little" if self.precision == "fp8" else ""
        t5 = "" if self.t5 else "without T5 prompts are understood less well"
        return "; ".join(part for part in (prices[self.encoders], fp8, t5) if part)


ARRANGEMENTS = (
    Arrangement("bf16", "gpu"),
    Arrangement("bf16", "offload"),
    Arrangement("bf16", "cpu"),
    Arrangement("fp8", "gpu"),
    Arrangement("fp8", "offload"),
    Arrangement("fp8", "cpu"),
    Arrangement("bf16", "gpu", t5=False),
    Arrangement("bf16", "offload", t5=False),
    Arrangement("fp8", "gpu", t5=False),
    Arrangement("fp8", "offload", t5=False),
)
"""In the order of preference: T5 before none, then exact pictures before fp8, then the fastest first.

Encoders on the CPU need no less of the GPU than offloaded ones, which visit it layer by layer: they are for hosts that
cannot pin memory.
"""


@dataclass(frozen=True)
class Need:
    """What an arrangement takes for pictures up to a size."""

    arrangement: Arrangement
    side: int  # pixels
    gpu: Mapping[str, int]  # bytes by part
    host: int  # bytes

    @property
    def total(self) -> int:
        """Bytes of the GPU."""
        return sum(self.gpu.values())


@dataclass(frozen=True)
class MemoryPlan:
    """Some models on one GPU, one worker process: the first arrangement that fits, and what all of them need."""

    models: tuple[str, ...]
    gpu: int  # bytes
    host: int | None  # bytes that are free there; None: enough
    needs: tuple[Need, ...]  # in the order of SIDES, then of ARRANGEMENTS

    @classmethod
    def of(cls, models: Sequence[str], gpu: int, host: int | None = None) -> MemoryPlan:
        """The plan for published models: large, large-turbo, medium. ValueError: there is no such model."""
        unknown = [name for name in models if name not in MODELS]
        if unknown or not models:
            raise ValueError(f"{unknown[0] if unknown else 'no model'!r}; known: {', '.join(MODELS)}")
        needs = [_need(models, arrangement, side) for side in SIDES for arrangement in ARRANGEMENTS]
        return cls(tuple(models), gpu, host, tuple(needs))

    @property
    def chosen(self) -> Need | None:
        """The first that fits, for pictures as large as any that fits; None: nothing does."""
        return next((need for need in self.needs if self.fits(need)), None)

    def fits(self, need: Need) -> bool:
        """Whether GPU and host have so many bytes."""
        return need.total <= self.gpu and (self.host is None or need.host <= self.host)

    @property
    def why(self) -> str:
        """In a sentence or two."""
        chosen = self.chosen
        if chosen is None:
            least = min(self.needs, key=lambda need: need.total)
            return (
                f"Nothing fits: even {least.arrangement.title}, for pictures to {least.side}x{least.side}, needs "
                f"{gigabytes(least.total)} of the GPU and {gigabytes(least.host)} of the host. Fewer models need less."
            )
        first, price = self.needs[0], chosen.arrangement.price
        best = f"; {first.arrangement.title} would need {gigabytes(first.total)} of the GPU" if chosen != first else ""
        said = f"{chosen.arrangement.title}, for pictures to {chosen.side}x{chosen.side}, is the first that fits{best}."
        return f"{said} {price[0].upper()}{price[1:]}." if price else said


def _need(models: Sequence[str], arrangement: Arrangement, side: int) -> Need:
    texts = {name: BF16 * n for name, n in PUBLISHED.items() if arrangement.t5 or name != "T5"}
    gpu: dict[str, int] = {}
    for name in models:
        part = f"MMDiT {name}"
        gpu[part] = gpu.get(part, 0) + mmdit_bytes(VARIANTS[name].mmdit, arrangement.precision)
    gpu["VAE"] = BF16 * VAE_NUMBERS
    host = 0
    if arrangement.encoders == "gpu":
        gpu["text encoders"] = sum(texts.values())
    else:
        # On the CPU they may be in fp32, where that is faster there.
        host = sum(texts.values()) * (2 if arrangement.encoders == "cpu" else 1)
    gpu["a picture, CUDA, cache"] = working_bytes(side)
    return Need(arrangement, side, gpu, host)


def _linear(inputs: int, outputs: int) -> int:
    """Numbers of a linear layer with its bias."""
    return (inputs + 1) * outputs
