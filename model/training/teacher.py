"""The model that a distillation learns from, and how the two compare."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from model.card import card_at
from model.checkpoint import load_components
from model.mmdit import MMDiT
from model.params import GenerationParams
from model.pipeline import Pipeline, run
from model.sampling import Shift
from model.text import T5_LENGTH, TextEncoders
from model.training.demo import Reader, TextTower
from model.training.loop import read_record
from model.training.net import load_net
from model.training.samples import GUIDANCE, PROMPTS, SHIFT, STEPS
from model.training.sheets import contact_sheet
from model.vae import VAE
from model.work import generate

COMPARED, SECONDS = 10, 15.0
"""Prompts on the sheet that compares, and the time after which no further one is begun."""


@dataclass(frozen=True)
class Texts:
    """Encoded captions: context of shape = (batch, tokens, context_dim), pooled of shape = (batch, pooled_dim)."""

    context: Tensor
    pooled: Tensor


@dataclass(frozen=True, eq=False)
class Teacher:
    """A trained model, and how its pictures are made."""

    mmdit: MMDiT
    tower: TextTower
    vae: VAE | None  # of a bundle
    shift: Shift
    steps: int
    guidance: float
    t5_length: int
    revision: str | None  # of a bundle

    @cached_property
    def encoders(self) -> TextEncoders:
        """The tower's modules, as a pipeline takes them."""
        return self.tower.encoders()

    def reader(self) -> Reader:
        """Captions to the ids that `read` takes."""
        return Reader(self.encoders, self.t5_length)

    @cached_property
    def empty(self) -> Texts:
        """The empty prompt, which guidance leads away from; one row."""
        return self.read_captions([""])

    @torch.no_grad()
    def read(self, tokens: Sequence[Tensor]) -> Texts:
        """Captions from the ids for CLIP-L, CLIP-G and T5, each of shape = (batch, that encoder's tokens)."""
        return Texts(*self.tower(*tokens))

    @torch.no_grad()
    def read_captions(self, captions: Sequence[str]) -> Texts:
        """Captions from their words."""
        texts = self.encoders.encode(captions, self.t5_length)
        return Texts(torch.stack([text.context for text in texts]), torch.stack([text.pooled for text in texts]))


def load_teacher(folder: Path, device: torch.device) -> Teacher:
    """From a bundle, or from the folder of a flow's run; in fp32, frozen. Errors: FileNotFoundError, ValueError."""
    if (folder / "model_index.json").is_file():
        return _of_bundle(folder, device)
    if not (folder / "training.json").is_file():
        raise ValueError(f"{folder} holds neither model_index.json nor training.json: expected a bundle or a run")
    record = read_record(folder)
    if record.get("what") != "flow":
        raise ValueError(f"{folder} holds a {record.get('what')}, expected a bundle or a trained flow")
    net = load_net(folder).to(device).eval().requires_grad_(False)
    return Teacher(net.mmdit, net.tower, None, SHIFT, STEPS, GUIDANCE, net.t5_length, None)


def _of_bundle(folder: Path, device: torch.device) -> Teacher:
    parts = load_components(folder, device, torch.float32)
    if parts.text.t5 is None:
        raise ValueError(f"{folder} has no T5; a teacher needs all its encoders")
    told = card_at(folder)
    defaults = told.get("defaults", {})
    return Teacher(
        mmdit=parts.mmdit,
        tower=TextTower.of(parts.text).eval().requires_grad_(False),
        vae=parts.vae,
        shift=parts.shift,
        steps=defaults.get("steps", STEPS),
        guidance=defaults.get("guidance_scale", GUIDANCE),
        t5_length=told.get("t5_length", T5_LENGTH),
        revision=parts.revision,
    )


def write_comparison(teacher: Teacher, student: MMDiT, steps: int, shift: Shift, path: Path, size: int = 512) -> None:
    """A sheet of the teacher's pictures, each above the student's for the same prompt and noise, while time lasts."""
    slow = _plain(teacher, teacher.mmdit, teacher.shift)
    fast = _plain(teacher, student, shift)
    started, prompts = time.monotonic(), []
    above: list[Tensor] = []
    below: list[Tensor] = []
    for n, prompt in enumerate(PROMPTS[:COMPARED]):
        asked = GenerationParams(
            prompt=prompt, width=size, height=size, steps=teacher.steps, guidance_scale=teacher.guidance, seed=n
        )
        above.append(run(generate(asked, slow.shift), slow).pixels)
        quick = replace(asked, steps=steps, guidance_scale=1.0)
        below.append(run(generate(quick, fast.shift), fast).pixels)
        prompts.append(prompt)
        if time.monotonic() - started > SECONDS:
            break
    pixels = torch.stack(above + below).permute(0, 3, 1, 2).float() / 127.5 - 1
    half = torch.nn.functional.avg_pool2d(pixels, 2)
    words = [*prompts, *(f"{steps} steps" for _ in prompts)]
    contact_sheet(half, words, columns=len(prompts)).save(path, optimize=True)


def _plain(teacher: Teacher, mmdit: MMDiT, shift: Shift) -> Pipeline:
    """The fast way knows no low-rank layers, nor would a few pictures repay it."""
    assert teacher.vae is not None
    return Pipeline(mmdit, teacher.vae, teacher.encoders, shift=shift, t5_length=teacher.t5_length, fast=False)
