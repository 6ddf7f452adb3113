"""Distils a guided model into few steps without guidance: a low-rank change of its MMDiT.

The run is cut into one window a step. At each window's start the teacher solves its guided ODE to the window's end; the
student learns the straight line there (PeRFlow, Yan et al. 2024, arXiv:2405.07510; progressive distillation, Salimans
and Ho 2022, arXiv:2202.00512). No pictures are needed: every run starts from noise. For one part of the rows the next
window starts where the teacher's ended, for the other where the student's did, so that its errors do not pile up: the
teacher shows the way back from wherever the student goes. That makes a phase that matches final pictures needless,
which would send gradients through all the steps, and blur where the two runs part early.
"""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from model.bundle import shift_json
from model.mmdit import MMDiT
from model.sampling import Shift
from model.training import team
from model.training.adapters import adapted
from model.training.descent import Descent
from model.training.feed import Captioned, Feed, first_seed
from model.training.guide import Guide
from model.training.loop import (
    Average,
    Leg,
    adamw,
    device_name,
    learning_rate,
    read_record,
    save_shards,
    what_came_before,
    write_record,
)
from model.training.plan import Phase, Plan, Size, phase_at
from model.training.sources import HELD_OUT_SEEDS, Drawings, Source
from model.training.teacher import Teacher, Texts, load_teacher, write_comparison
from model.training.windows import Window, velocity, windows
from model.work import image_tokens

TERMINAL = 0.4
"""Sigmas 1, 0.91, 0.76 and 0.4 for four steps at shift 3: the published ones would spend the last step on 0.9 %."""

DISTANCES = 2 * HELD_OUT_SEEDS - (1 << 20)
"""Captions from this seed on are for measuring."""


TURBO_TOKENS = 40_000


def turbo_plan(tokens: int = TURBO_TOKENS) -> Plan:
    """Small pictures first: what they teach of guidance and long steps holds for large ones, at a fifth of the time.

    tokens : of the student in one step, text included; the teacher's are twice as many
    """
    small, square, large = (Size.of(side, side, tokens) for side in (256, 512, 1024))
    wide, tall = Size.of(512, 768, tokens), Size.of(768, 512, tokens)
    return Phase(0.35, (small,)), Phase(1.00, (*[square] * 5, wide, tall, large))


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """The settings of a run."""

    out: Path
    teacher: Path  # a bundle, or the folder of a flow's run
    minutes: float
    rank: int = 32
    steps: int = 4
    shift: float | None = None  # of the student's noise levels; None: as the teacher's
    terminal: float = TERMINAL  # its last noise level before 0; 0: as published
    guidance: float | None = None  # the teacher's; None: as its card says
    substeps: int = 4  # of the teacher in one window
    own: float = 0.5  # share of the rows that go on from the student's own windows
    plan: Plan = field(default_factory=turbo_plan)
    source: Source = field(default_factory=Drawings)
    peak: float = 1e-3  # learning rate
    warmup: int = 50  # steps
    average: float = 0.995
    measured: int = 16  # prompts
    seed: int = 1
    begin: float = 0.0
    end: float = 1.0
    resume: Path | None = None
    processes: int | None = None
    samples: bool = True

    def __post_init__(self) -> None:
        for name in ("rank", "steps", "substeps", "measured"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        if not 0 <= self.own <= 1:
            raise ValueError(f"own is {self.own}, expected 0 to 1")
        if self.shift is not None and self.shift <= 0:
            raise ValueError(f"shift is {self.shift}, expected more than 0")
        if not 0 <= self.terminal < 1:
            raise ValueError(f"terminal is {self.terminal}, expected from 0 to below 1")


def distil(settings: Distillation, device: torch.device) -> dict[str, float]:
    """Trains and writes the change, a sheet and training.json to `settings.out`; returns the measures."""
    leg = Leg.start(settings.minutes, 30 if settings.samples else 10, (settings.begin, settings.end), device)
    torch.manual_seed(settings.seed)
    teacher = load_teacher(settings.teacher, device)
    student = adapted(teacher.mmdit, settings.rank).to(device)
    average = Average(student, settings.average)
    if settings.resume:
        restore(average, settings)
    changed = sum(p.numel() for p in average.live)
    leg.log.say(f"{changed:,} parameters of change at rank {settings.rank} on {device_name(device)}")
    torch.manual_seed(settings.seed + team.rank())  # the first weights are alike, noise is not
    run = Run(settings, teacher, student, average, leg)
    measures = run.loop()
    leg.log.row(**measures)
    if not team.leads():
        return measures
    run.save(measures)
    if settings.samples and teacher.vae is not None:
        average.swap()
        write_comparison(teacher, student, settings.steps, run.shift, settings.out / "turbo.png")
        leg.log.say(f"samples after {leg.clock.elapsed:.0f} s")
    return measures


def restore(average: Average, settings: Distillation) -> None:
    """Into the average and the weights that it follows, those of an earlier leg. ValueError if they do not fit."""
    assert settings.resume is not None
    record = read_record(settings.resume)
    for name, now in (("rank", settings.rank), ("steps", settings.steps)):
        if record.get(name) != now:
            raise ValueError(f"{settings.resume} was distilled with {name} {record.get(name)}, not {now}")
    average.restore(settings.resume, "turbo")


class Run:
    """The training loop and what it holds."""

    def __init__(self, settings: Distillation, teacher: Teacher, student: MMDiT, average: Average, leg: Leg) -> None:
        self.settings, self.teacher, self.student, self.average, self.leg = settings, teacher, student, average, leg
        self.clock, self.log, self.device = leg.clock, leg.log, leg.device
        self.scale = teacher.guidance if settings.guidance is None else settings.guidance
        self.guide = Guide(teacher, self.scale)
        self.shift = Shift(settings.shift or teacher.shift.by, settings.terminal)
        self.random = random.Random(settings.seed)
        self.descent = Descent(average, leg, settings.peak, partial(adamw, average, leg))
        self.descent.compiled = False  # so there is no other way to try
        self.earlier = what_came_before(settings.resume) if settings.resume else None
        self.rows, self.before = 0, float("nan")
        reading = Captioned(settings.source, teacher.reader())
        self.feed = Feed(reading, first_seed(settings.seed, settings.begin), settings.processes)

    def loop(self) -> dict[str, float]:
        """Runs until the clock ends; returns figures of the leg. An error late in a run does not lose the run."""
        self.before = self.averaged_distance()
        self.log.say(f"distance to the teacher's last latents before: {self.before:.4f}")
        try:
            with self.descent.guarded():
                self._loop()
        finally:
            self.feed.close()
        return self._figures()

    def _figures(self) -> dict[str, float]:
        distances = {"distance_before": self.before, "distance": self.averaged_distance()}
        descent = self.descent
        return {"steps": descent.steps, "rows": self.rows, "loss": descent.last_loss, **distances}

    def _loop(self) -> None:
        losses: list[Tensor] = []
        since = measured = 0.0
        seen, runs = 0, 0
        while runs == 0 or self.clock.left > 0:
            self.clock.tick()
            losses += self.run()
            runs += 1
            if runs == 2:
                losses[-1].item()  # waits for the device
                self.log.say(f"first runs after {self.clock.elapsed:.0f} s")
                self.clock.run()
                since, seen = self.clock.now, self.rows
            elif runs > 2 and self.clock.now - since > 10:
                loss, rate = torch.stack(losses).mean().item(), (self.rows - seen) / (self.clock.now - since)
                self.descent.report(loss, rows=self.rows, per_s=rate)
                if self.clock.now - measured > 60:
                    figures = self._figures()
                    self.log.row(distance=figures["distance"])
                    self.save(figures)
                    measured = self.clock.now
                self.clock.tick()
                since, seen, losses = self.clock.now, self.rows, []

    def run(self) -> list[Tensor]:
        """One run from noise to latents, an optimizer step a window; returns the losses, still on the device."""
        size = self.random.choice(phase_at(self.settings.plan, self.clock.fraction).sizes)
        texts = self._texts(size)
        channels = self.student.config.in_channels
        x = torch.randn(size.batch, channels, size.height // 8, size.width // 8, device=self.device)
        own = torch.rand(size.batch, 1, 1, 1, device=self.device) < self.settings.own
        losses = []
        for window in self.windows(size):
            loss, ends, own_ends = self._step(x, window, texts)
            losses.append(loss)
            x = torch.where(own, own_ends, ends)
        self.rows += size.batch * team.size()
        return losses

    def windows(self, size: Size) -> list[Window]:
        """A run's windows for pictures of this size."""
        return windows(self.settings.steps, self.shift, self.settings.substeps, image_tokens(size.width, size.height))

    def _texts(self, size: Size) -> Texts:
        tokens = self.feed.take(size.batch, size.frame).tokens
        with self.leg.autocast():
            return self.teacher.read(tuple(ids.to(self.device, torch.long, non_blocking=True) for ids in tokens))

    def _step(self, x: Tensor, window: Window, texts: Texts) -> tuple[Tensor, Tensor, Tensor]:
        """One optimizer step: the loss, where the teacher ended, and where the student did."""
        descent, s = self.descent, self.settings
        span = window.start - window.end
        ends = self.guide(x, window, texts)
        inputs = x, x.new_full((), window.start), (x - ends) / span, texts.context, texts.pooled
        loss, v = descent.gradients(x.shape, self._loss, *inputs)
        descent.step(learning_rate(descent.peak, self.clock.fraction, descent.steps, s.warmup))
        return loss, ends, x - span * v

    def _loss(self, x: Tensor, sigma: Tensor, wanted: Tensor, context: Tensor, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """How far the student's velocity is from the wanted one, and what it is."""
        v = velocity(self.student, x, sigma, Texts(context, pooled))
        return F.mse_loss(v, wanted), v

    def averaged_distance(self) -> float:
        """`distance` with the averaged weights."""
        self.average.swap()
        try:
            return self.distance()
        finally:
            self.average.swap()

    def distance(self) -> float:
        """Between the student's last latents and the teacher's from the same noise, for captions that are kept apart.

        The root of the mean squared difference, as a share of the teacher's standard deviation.
        """
        with torch.no_grad():
            return self._distance()

    def _distance(self) -> float:
        size = self.settings.plan[-1].sizes[0]
        errors, squares = 0.0, 0.0
        generator = torch.Generator().manual_seed(self.settings.seed)
        _, captions = self.settings.source.read(range(DISTANCES, DISTANCES + self.settings.measured), size.frame)
        for first in range(0, len(captions), size.batch):
            texts = self.teacher.read_captions(captions[first : first + size.batch])
            shape = (len(texts.pooled), self.student.config.in_channels, size.height // 8, size.width // 8)
            start = torch.randn(shape, generator=generator).to(self.device)
            theirs, own = start, start
            for window in self.windows(size):
                theirs = self.guide(theirs, window, texts)
                with self.leg.autocast():
                    v = velocity(self.student, own, own.new_full((), window.start), texts)
                own = own - (window.start - window.end) * v
            errors += (own - theirs).square().sum().item()
            squares += (theirs - theirs.mean()).square().sum().item()
        return float((errors / max(squares, 1e-12)) ** 0.5)

    def save(self, measures: dict[str, float]) -> None:
        """Writes the averaged change, the live one and what made them."""
        if not team.leads():
            return
        settings, leg = self.settings, self.leg
        save_shards(self.average.state(), settings.out, "turbo")
        save_shards(dict(zip(self.average.names, self.average.live, strict=True)), settings.out, "live")
        write_record(
            settings.out,
            {
                "what": "turbo", "teacher": self.teacher.revision, "pictures": settings.source.name,
                "rank": settings.rank, "steps": settings.steps, "shift": shift_json(self.shift),
                "guidance": self.scale, "substeps": settings.substeps, "own": settings.own, "metrics": measures,
                "minutes": round(leg.clock.elapsed / 60, 2), "seed": settings.seed, "begin": settings.begin,
                "end": settings.end, "peak": settings.peak, "plan": [asdict(phase) for phase in settings.plan],
                "device": device_name(leg.device), "gpus": team.size(),
                "resumed": str(settings.resume) if settings.resume else None,
                "before": self.earlier,
                "log": leg.log.rows[:: max(1, len(leg.log.rows) // 40)],
            },
        )  # fmt: skip
