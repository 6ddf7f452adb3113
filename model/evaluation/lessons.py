"""What the checker learns from: drawings of seeds of its own, some of them spoiled, and what is on them as numbers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random

import torch
from torch import Tensor

from model.evaluation.checker import COLOUR_NAMES
from model.evaluation.damage import Field, Poses, blend, grain, no_field, soften, tint, warp
from model.training.drawing import MAX_THINGS, draw, pack
from model.training.feed import Batch, Chunk
from model.training.palette import COLOURS
from model.training.scenes import KINDS, SHAPES, STYLES, Scene, sample_scene
from model.training.sources import HELD_OUT_SEEDS, Frame
from model.vae import VAE

CHUNK = 64
TRAINING_SEEDS = 2 * HELD_OUT_SEEDS
MEASURING_SEEDS = TRAINING_SEEDS + HELD_OUT_SEEDS // 2
"""The checker is measured on scenes from this seed on, up to the evaluation's own."""

_THING = 5  # shape, colour, x, y, radius
LABELS = MAX_THINGS * _THING + 4  # style, kind of background, its top and bottom colour; -1: none


def labels_of(scene: Scene) -> list[float]:
    """What is on a scene, as LABELS numbers."""
    row: list[float] = []
    for thing in scene.things:
        row += [SHAPES.index(thing.shape), list(COLOURS).index(thing.colour), thing.x, thing.y, thing.radius]
    row += [-1.0, -1.0, 0.0, 0.0, 0.0] * (MAX_THINGS - len(scene.things))
    ground = scene.background
    top = COLOUR_NAMES.index(ground.colour) if ground.kind in ("plain", "gradient") else -1
    bottom = COLOUR_NAMES.index(ground.second) if ground.kind == "gradient" else top
    return [*row, STYLES.index(scene.style), KINDS.index(ground.kind), top, bottom]


@dataclass(frozen=True, eq=False)
class Labels:
    """What is on pictures. shape = (batch, MAX_THINGS) of the first five, (batch,) of the rest; -1 where there is none.

    The shape of a thing that was spoiled beyond recognition is len(SHAPES).
    """

    shape: Tensor
    colour: Tensor
    x: Tensor
    y: Tensor
    radius: Tensor
    style: Tensor
    kind: Tensor
    top: Tensor
    bottom: Tensor

    @classmethod
    def of(cls, numbers: Tensor) -> Labels:
        """From rows of `labels_of`, shape = (batch, LABELS)."""
        things = numbers[:, : MAX_THINGS * _THING].unflatten(1, (MAX_THINGS, _THING)).unbind(2)
        picture = numbers[:, MAX_THINGS * _THING :].long().unbind(1)
        return cls(things[0].long(), things[1].long(), *things[2:], *picture)

    def rows(self, some: slice) -> Labels:
        """Of some of the pictures."""
        return Labels(**{name: value[some] for name, value in vars(self).items()})

    @property
    def there(self) -> Tensor:
        """Which things there are."""
        return self.shape >= 0

    @property
    def poses(self) -> Poses:
        """Where they lie."""
        return Poses(self.x, self.y, self.radius)


class Lessons:
    """Reads packed scenes, the same scenes with other shapes, and labels, for a Feed from TRAINING_SEEDS on.

    Half of the scenes are of combinations that are never trained on, which the checker has to know too.
    """

    def chunk(self, frame: Frame) -> int:  # noqa: ARG002
        """Packed scenes are small."""
        return CHUNK

    def __call__(self, seeds: range, frame: Frame) -> Chunk:  # noqa: ARG002
        """One chunk."""
        scenes = [sample_scene(seed, only_held_out=seed % 2 == 1) for seed in seeds]
        rng = Random(seeds[0])
        others = [disguised(scene, rng) for scene in scenes]
        return pack(scenes).numpy(), pack(others).numpy(), torch.tensor([labels_of(s) for s in scenes]).numpy()


def disguised(scene: Scene, rng: Random) -> Scene:
    """The scene with every thing in another shape."""
    things = (replace(thing, shape=rng.choice([s for s in SHAPES if s != thing.shape])) for thing in scene.things)
    return replace(scene, things=tuple(things))


@dataclass(frozen=True, kw_only=True)
class Spoiling:
    """Shares of the pictures, or of the things, that go through each kind of damage."""

    reconstructed: float = 0.2  # pictures that go through the autoencoder
    bent: float = 0.3  # things that are bent a little and stay what they are
    broken: float = 0.16  # things torn, crumpled or dented beyond recognition
    blended: float = 0.10  # things that are half another shape
    softened: float = 0.35  # pictures


class Painter:
    """Draws lessons: pictures and their labels, on the device."""

    def __init__(self, spoiling: Spoiling, vae: VAE | None, device: torch.device, seed: int) -> None:
        self.spoiling, self.vae, self.device = spoiling, vae, device
        self.dice = torch.Generator().manual_seed(seed)  # on the CPU: choosing never waits for the device

    def paint(self, batch: Batch, frame: Frame) -> tuple[Tensor, Labels]:
        """Pictures of a frame, shape = (batch, 3, height, width), and their labels, from what Lessons read."""
        others, numbers = batch.tokens
        labels = Labels.of(numbers)
        pixels = draw(batch.rows, frame.height, frame.width, self.device)
        pixels, blended = self._blended(pixels, others, labels, frame)
        pixels, broken = self._warped(pixels, labels)
        shape = labels.shape.masked_fill(labels.there & (blended | broken), len(SHAPES))
        pixels = self._through_vae(pixels)
        pixels = self._softened(pixels)
        pixels = grain(tint(pixels, 0.04), 0.06)
        moved = {name: value.to(self.device, non_blocking=True) for name, value in vars(labels).items()}
        return pixels, Labels(**{**moved, "shape": shape.to(self.device, non_blocking=True)})

    def _toss(self, share: float, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.dice) < share

    def _uniform(self, low: float, high: float, shape: torch.Size) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=self.dice)

    def _blended(self, pixels: Tensor, others: Tensor, labels: Labels, frame: Frame) -> tuple[Tensor, Tensor]:
        wanted = self._toss(self.spoiling.blended, *labels.shape.shape) & labels.there
        rows = wanted.any(1).nonzero()[:, 0]
        if len(rows):
            disguises = draw(others[rows], frame.height, frame.width, self.device)
            poses, mask = self._moved(labels.poses.rows(rows)), wanted[rows].float().to(self.device)
            there = rows.to(self.device)
            pixels[there] = blend(pixels[there], disguises, poses, mask)
        return pixels, wanted

    def _warped(self, pixels: Tensor, labels: Labels) -> tuple[Tensor, Tensor]:
        things = labels.shape.shape
        broken = self._toss(self.spoiling.broken, *things) & labels.there
        bent = self._toss(self.spoiling.bent, *things) & labels.there
        rows = (broken | bent).any(1).nonzero()[:, 0]
        if not len(rows):
            return pixels, broken
        amount = torch.where(broken, self._uniform(0.11, 0.30, things), bent * self._uniform(0.0, 0.03, things))
        smooth = no_field(len(amount), torch.device("cpu"))
        blocks = self._toss(0.5, *things) * self._uniform(0.15, 0.45, things)
        field = Field(
            torch.where(broken, 2.5 * torch.ones(things), smooth.low),
            torch.where(broken, self._uniform(4.5, 11.0, things), smooth.high),
            torch.where(broken, blocks, smooth.block),
        )
        field = Field(*(part[rows].to(self.device) for part in (field.low, field.high, field.block)))
        there = rows.to(self.device)
        pixels[there] = warp(pixels[there], self._moved(labels.poses.rows(rows)), amount[rows].to(self.device), field)
        return pixels, broken

    def _moved(self, poses: Poses) -> Poses:
        return Poses(*(part.to(self.device) for part in (poses.x, poses.y, poses.radius)))

    @torch.no_grad()
    def _through_vae(self, pixels: Tensor) -> Tensor:
        """Some go through the autoencoder, half of them with noise on their latents: what a flow leaves there."""
        count = round(self.spoiling.reconstructed * len(pixels))  # always the same: convolutions are tuned to it
        if self.vae is None or not count:
            return pixels
        some = torch.randperm(len(pixels), generator=self.dice)[:count].to(self.device)
        strength = (torch.rand(count, 1, 1, 1, device=self.device) - 0.5).clamp(min=0.0)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            mean, _ = self.vae.encode(pixels[some])
            decoded = self.vae.decode(mean + strength * torch.randn_like(mean) * mean.std())
        pixels[some] = decoded.float().clamp(-1, 1)
        return pixels

    def _softened(self, pixels: Tensor) -> Tensor:
        rows = self._toss(self.spoiling.softened, len(pixels)).nonzero()[:, 0]
        if not len(rows):
            return pixels
        for some in rows.to(self.device).chunk(3):
            scale = float(self._uniform(0.4, 0.9, torch.Size(())))
            pixels[some] = soften(pixels[some], scale)
        return pixels
