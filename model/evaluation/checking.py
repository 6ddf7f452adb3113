"""Trains the checker, and measures how often it is right."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from model.evaluation.checker import MALFORMED, SIDE, Answer, Checker, Reading, Seen, load_checker
from model.evaluation.lessons import CHUNK, MEASURING_SEEDS, TRAINING_SEEDS, Labels, Lessons, Painter, Spoiling
from model.training.drawing import draw, pack
from model.training.feed import Feed
from model.training.loop import Average, Leg, device_name, finite, learning_rate
from model.training.scenes import DATA_VERSION, SHAPES, STYLES, Scene, sample_scene
from model.training.sources import Frame
from model.vae import VAE

AHEAD = 4  # batches painted at once on a GPU: painting many pictures takes the CPU hardly longer than painting few

NEAR = 0.15
"""A place is right if both coordinates are off by no more, in halves of the picture's sides."""


@dataclass(frozen=True, kw_only=True)
class CheckerTraining:
    """The settings of a run."""

    out: Path
    minutes: float
    batch: int = 128
    side: int = SIDE
    peak: float = 2.5e-3  # learning rate
    average: float = 0.998
    seed: int = 1
    resume: Path | None = None  # a checker to begin with
    spoiling: Spoiling = field(default_factory=Spoiling)
    processes: int | None = None
    pictures: int | None = None  # to measure on


def train_checker(settings: CheckerTraining, vae: VAE | None, device: torch.device) -> dict[str, float]:
    """Trains and measures a checker, writes it to `settings.out` (a safetensors file), returns its accuracy.

    vae : the autoencoder whose reconstructions it learns to read as well; None leaves them out
    """
    if settings.side < 64 or settings.side % 16:
        raise ValueError(f"side is {settings.side}; allowed: multiples of 16 from 64 on")
    leg = Leg.start(settings.minutes, 20 if device.type == "cuda" else 0, (0.0, 1.0), device)
    torch.manual_seed(settings.seed)
    checker = Checker(settings.side)
    if settings.resume:
        checker.load_state_dict(load_checker(settings.resume).state_dict())
    checker = checker.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    leg.log.say(f"checker: {sum(p.numel() for p in checker.parameters()):,} parameters on {device_name(device)}")
    average = Average(checker, settings.average)
    run = _Run(settings, checker, average, vae, leg)
    try:
        seen = run.loop()
    finally:
        run.feed.close()
    average.swap()
    pictures = settings.pictures or (2000 if leg.on_gpu else 300)
    accuracy = measure(checker.eval(), vae, device, pictures)
    leg.log.row(**accuracy)
    checker.about = {
        "accuracy": accuracy, "data_version": DATA_VERSION, "pictures": seen, "spoiling": asdict(settings.spoiling),
        "minutes": round(leg.clock.elapsed / 60, 2), "seed": settings.seed, "device": device_name(device),
    }  # fmt: skip
    checker.save(settings.out)
    return accuracy


class _Run:
    def __init__(
        self, settings: CheckerTraining, checker: Checker, average: Average, vae: VAE | None, leg: Leg
    ) -> None:
        self.settings, self.checker, self.average, self.leg = settings, checker, average, leg
        self.painter = Painter(settings.spoiling, vae, leg.device, settings.seed)
        self.feed = Feed(Lessons(), TRAINING_SEEDS + (settings.seed << 32), settings.processes)
        self.optimizer = torch.optim.AdamW(
            checker.parameters(), lr=settings.peak, betas=(0.9, 0.98), weight_decay=0.01, fused=leg.on_gpu
        )
        long = round(1.5 * settings.side / 16) * 16
        self.frames = [Frame(settings.side, settings.side)] * 3
        self.frames += [Frame(settings.side, long), Frame(long, settings.side)]
        self.painted = 0

    def loop(self) -> int:
        """Steps until the clock ends; returns the number of pictures."""
        clock, log = self.leg.clock, self.leg.log
        step, since, losses = 0, 0.0, []
        while step == 0 or clock.left > 0:
            clock.tick()
            for pixels, labels in self.lessons():
                losses.append(self.step(pixels, labels, step))
                step += 1
                if step == 3:
                    losses[-1].sum().item()  # waits for the device
                    clock.run()
            if step >= 3 and clock.elapsed - since > 10:
                figures = torch.stack(losses).mean(0).tolist()  # waits for the device
                if not finite(figures):
                    raise FloatingPointError(f"the checker's losses are {figures}: lower the learning rate")
                log.row(pictures=step * self.settings.batch, **dict(zip(LOSSES, figures, strict=True)))
                since, losses = clock.elapsed, []
        return step * self.settings.batch

    def lessons(self) -> list[tuple[Tensor, Labels]]:
        """The next batches, of one frame, painted together."""
        frame, ahead = self.frames[self.painted % len(self.frames)], AHEAD if self.leg.on_gpu else 1
        self.painted += 1
        batch = self.settings.batch
        pixels, labels = self.painter.paint(self.feed.take(ahead * batch, frame), frame)
        parts = [slice(n * batch, (n + 1) * batch) for n in range(ahead)]
        return [(pixels[part], labels.rows(part)) for part in parts]

    def step(self, pixels: Tensor, labels: Labels, step: int) -> Tensor:
        """One optimizer step; returns the losses, still on the device."""
        s, clock = self.settings, self.leg.clock
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(s.peak, clock.fraction, step, 100)
        with self.leg.autocast():
            answer = self.checker(pixels.contiguous(memory_format=torch.channels_last))
        losses = checker_losses(answer, labels)
        (losses * torch.tensor(WEIGHTS).to(losses.device, non_blocking=True)).sum().backward()
        torch.nn.utils.clip_grad_norm_(self.checker.parameters(), 5.0, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.average.update()
        return losses.detach()


LOSSES = ("centre", "offset", "radius", "shape", "colour", "style", "background")
WEIGHTS = (1.0, 0.5, 0.2, 1.0, 0.7, 0.3, 0.3)


def checker_losses(answer: Answer, labels: Labels) -> Tensor:
    """The seven losses, in the order of LOSSES. shape = (7,)."""
    height, width = answer.centre.shape[-2:]
    right, below, bump = _bumps(labels, height, width)
    core = bump * (bump > 0.5)  # cells that speak for a thing: its centre and, of a large one, those around
    core = core / core.sum().clamp(min=1.0)
    off_x = (right - answer.offset[:, 0:1]).abs().clamp(max=3.0)
    off_y = (below - answer.offset[:, 1:2]).abs().clamp(max=3.0)
    size = (labels.radius.clamp(min=1e-2).log()[:, :, None, None] - answer.radius).abs()
    grounds = [(answer.kind, labels.kind), (answer.top, labels.top), (answer.bottom, labels.bottom)]
    return torch.stack([
        focal(answer.centre[:, 0], bump.amax(1), labels.there.sum()),
        ((off_x + off_y) * core).sum(), (size * core).sum(),
        (_surprise(answer.shape, labels.shape) * core).sum(), (_surprise(answer.colour, labels.colour) * core).sum(),
        F.cross_entropy(answer.style, labels.style),
        torch.stack([F.cross_entropy(said, true, ignore_index=-1, reduction="sum") for said, true in grounds]).sum()
        / len(labels.kind),
    ])  # fmt: skip


def _bumps(labels: Labels, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of each thing, how far right of and below each cell its centre lies (in cells), and a bump there, 1 at the
    cell that holds the centre and 0 everywhere for a thing that is not there. shape = (batch, things, height, width).
    """
    device = labels.x.device
    x, y = (labels.x + 1) / 2 * width, (labels.y + 1) / 2 * height
    right = x[:, :, None, None] - (torch.arange(width, device=device) + 0.5)
    below = y[:, :, None, None] - (torch.arange(height, device=device)[:, None] + 0.5)
    columns = (x.floor()[:, :, None, None] + 0.5 - x[:, :, None, None]) + right
    rows = (y.floor()[:, :, None, None] + 0.5 - y[:, :, None, None]) + below
    spread = (labels.radius * min(height, width) / 2 / 3).clamp(min=0.7)[:, :, None, None]
    bump = torch.exp(-(columns.square() + rows.square()) / (2 * spread.square()))
    return *torch.broadcast_tensors(right, below), bump * labels.there[:, :, None, None]  # type: ignore[return-value]


def focal(logits: Tensor, bump: Tensor, things: Tensor) -> Tensor:
    """The focal loss of CornerNet (Law and Deng 2018, arXiv:1808.01244): cells beside a centre are blamed less.

    logits, bump : shape = (batch, height, width)
    """
    sure, unsure = F.logsigmoid(logits), F.logsigmoid(-logits)
    share = logits.sigmoid()
    centres = bump > 0.999
    hits = (1 - share).square() * sure * centres
    misses = share.square() * unsure * (1 - bump).pow(4) * ~centres
    return -(hits + misses).sum() / things.clamp(min=1)


def _surprise(logits: Tensor, true: Tensor) -> Tensor:
    """-log of the probability of each thing's own class in each cell. shape = (batch, things, height, width)."""
    index = true.clamp(min=0)[:, :, None, None].expand(-1, -1, *logits.shape[-2:])
    return -logits.log_softmax(1).gather(1, index)


@torch.no_grad()
def measure(checker: Checker, vae: VAE | None, device: torch.device, pictures: int) -> dict[str, float]:
    """How often the checker is right on drawings that it never saw, half of them of held-out combinations.

    Shares of things whose shape, colour and place it reads (`clean_…`, `reconstructed_…`, `shape_flat` …), of pictures
    whose style and background it reads, and of spoiled things of which it says that they have none of the shapes.
    """
    scenes = [sample_scene(MEASURING_SEEDS + n, only_held_out=n % 2 == 1) for n in range(pictures)]
    clean = draw(pack(scenes), 2 * checker.side, 2 * checker.side, device)
    readings = checker.read(clean)
    found = {f"clean_{name}": share for name, share in agreement(scenes, readings).items()}
    for style in STYLES:
        of_style = [n for n, scene in enumerate(scenes) if scene.style == style]
        shares = agreement([scenes[n] for n in of_style], [readings[n] for n in of_style])
        found[f"shape_{style}"] = shares["shape"]
    if vae is not None:
        some = max(1, pictures // (2 if device.type == "cuda" else 16))
        decoded = [vae.decode(vae.encode(part)[0]).float().clamp(-1, 1) for part in clean[:some].split(8)]
        shares = agreement(scenes[:some], checker.read(torch.cat(decoded)))
        found |= {f"reconstructed_{name}": share for name, share in shares.items()}
    found["malformed"] = malformed(checker, device, pictures // 2)
    return {name: round(share, 4) for name, share in found.items()}


def agreement(scenes: Sequence[Scene], readings: Sequence[Reading]) -> dict[str, float]:
    """Shares of things whose shape, colour and place were read, and of pictures whose style and background were."""
    hits: dict[str, list[bool]] = {name: [] for name in ("shape", "colour", "place", "style", "background")}
    for scene, reading in zip(scenes, readings, strict=True):
        for thing in scene.things:
            seen = nearest(reading.things, thing.x, thing.y)
            hits["place"].append(seen is not None)
            hits["shape"].append(seen is not None and seen.shape == thing.shape)
            hits["colour"].append(seen is not None and seen.colour == thing.colour)
        ground = scene.background
        colours = tuple(name for name in (ground.colour, ground.second) if name)
        hits["style"].append(reading.style == scene.style)
        hits["background"].append((reading.background, reading.colours) == (ground.kind, colours))
    return {name: sum(them) / max(1, len(them)) for name, them in hits.items()}


def nearest(things: Iterable[Seen], x: float, y: float) -> Seen | None:
    """The surest thing seen at a place, if there is one."""
    here = [seen for seen in things if max(abs(seen.x - x), abs(seen.y - y)) <= NEAR]
    return max(here, key=lambda seen: seen.score, default=None)


def malformed(checker: Checker, device: torch.device, pictures: int) -> float:
    """The share of broken and blended things of which the checker says that they have none of the shapes."""
    spoiling = Spoiling(reconstructed=0, bent=0, broken=0.5, blended=0.5, softened=0)
    painter = Painter(spoiling, None, device, 0)
    hits: list[bool] = []
    feed, frame = Feed(Lessons(), MEASURING_SEEDS, processes=0), Frame(checker.side, checker.side)
    for _ in range(-(-pictures // CHUNK)):
        pixels, labels = painter.paint(feed.take(CHUNK, frame), frame)
        spoiled = (labels.shape == len(SHAPES)).nonzero().tolist()
        readings = checker.read(pixels)
        for row, thing in spoiled:
            seen = nearest(readings[row].things, labels.x[row, thing].item(), labels.y[row, thing].item())
            hits.append(seen is None or seen.shape == MALFORMED)
    return sum(hits) / max(1, len(hits))
