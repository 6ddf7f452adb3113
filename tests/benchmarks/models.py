"""The models that are measured: real files, the tiny bundle, or full-size nets with random weights."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from model.config import VARIANTS, VAEConfig
from model.mmdit import MMDiT
from model.pipeline import Pipeline
from model.text import T5_LENGTH, TextEncoders
from model.tuning import born, randomized
from model.vae import VAE
from tests.benchmarks.workload import Request
from tests.gpu.nets import full_encoders, tiny_encoders
from tests.model import tiny
from tests.tiny_bundle import save_tiny_bundle
from worker.models import Loader, pick_device
from worker.settings import ModelSource, WorkerSettings

TINY = "tiny"


def loaded(sources: Sequence[ModelSource], settings: WorkerSettings) -> dict[str, Pipeline]:
    """Models from files."""
    loader = Loader(settings)
    return {source.name: loader.load(source).pipeline for source in sources}


def tiny_pipelines(settings: WorkerSettings) -> dict[str, Pipeline]:
    """The bundle of the tests: tiny random weights."""
    with tempfile.TemporaryDirectory() as folder:
        return loaded([ModelSource(TINY, save_tiny_bundle(Path(folder) / TINY))], settings)


def random_pipelines(names: Sequence[str], settings: WorkerSettings) -> dict[str, Pipeline]:
    """Published variants with random weights, one VAE and one set of encoders for all, built on the device.

    On a CPU they are of toy size: that tries the script itself.
    """
    device = pick_device(settings.device)
    full = device.type == "cuda"
    with born(device, torch.bfloat16 if full else torch.float32):
        vae = randomized(VAE(VAEConfig() if full else tiny.TINY_VAE))
        encoders: Any = [net.requires_grad_(False).eval() for net in (full_encoders if full else tiny_encoders)()]
        nets = {name: randomized(MMDiT(VARIANTS[name].mmdit if full else tiny.MMDIT_X)) for name in names}
    tokenizers = (tiny.clip_tokenizer("<|endoftext|>"), tiny.clip_tokenizer("!"), tiny.t5_tokenizer())
    text = TextEncoders(*encoders, tokenizers, next(iter(nets.values())).config.context_dim)
    length = T5_LENGTH if full else 32
    return {name: Pipeline(net, vae, text, t5_length=length) for name, net in nets.items()}


def mix_of(names: Sequence[str], sides: tuple[int, int], most_steps: int) -> list[Request]:
    """Short and long requests, small and large, for these models.

    Of published variants each asks for its own steps, at most `most_steps`; any other gets 4, and a third as often 28.
    """
    small, large = sides
    found = []
    for name in names:
        spec = VARIANTS.get(name)
        if spec is None:
            found += [
                Request(name, small, 4, 3.0, weight=0.45, short=True),
                Request(name, large, 4, 3.0, weight=0.30, short=True),
                Request(name, small, 28, 3.0, weight=0.15),
                Request(name, large, 28, 3.0, weight=0.10),
            ]
        else:
            many = 1.0 if spec.steps < 10 else 0.25  # few long ones, so that a run ends
            pair = [(small, 0.6 * many), (large, 0.4 * many)]
            found += [
                Request(name, side, min(spec.steps, most_steps), spec.guidance_scale, weight, short=spec.steps < 10)
                for side, weight in pair
            ]
    return found
