"""Looks at a model while it learns: sheets of pictures for fixed prompts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from model.mmdit import MMDiT
from model.params import GenerationParams
from model.pipeline import Pipeline, generate, run
from model.training.demo import T5_LENGTH, TextTower
from model.training.sheets import contact_sheet
from model.vae import VAE

STEPS, GUIDANCE, SHIFT = 16, 4.0, 3.0

PROMPTS = (
    "a red circle on a blue background",
    "a yellow star in the night sky",
    "a large white heart on a red background",
    "a green square on the left, on a yellow background",
    "an orange sun over the sea",
    "a pink flower in a meadow",
    "a purple triangle to the right of a white circle, on a teal background",
    "a black star above a yellow heart on a light blue background",
    "a white cloud at the top, on a gradient from blue to pink",
    "a small red square in the bottom right corner, on a grey background",
    "a yellow moon in the top left corner at night",
    "a red circle, a white square and a blue star in a row, on a black background",
    "gradient from orange to purple, a white star in the centre",
    "a teal flower and a pink heart on a white background",
    "a blue triangle on an orange background",
    "a white flower above a green star, in a meadow",
)  # the blue triangle, the white flower and the green star are held-out combinations: see scenes.held_out


def write_samples(mmdit: MMDiT, vae: VAE, tower: TextTower, out: Path, prompts: Sequence[str] = PROMPTS) -> None:
    """`samples.png` at 512x512 and, for some of the prompts, `samples-wide.png` at 768x512."""
    modes = [(net, net.training) for net in (mmdit, vae, tower)]
    for net, _ in modes:
        net.eval()
    pipeline = Pipeline(mmdit, vae, tower.encoders(), shift=SHIFT, t5_length=T5_LENGTH)
    write_sheet(pipeline, prompts, (512, 512), out / "samples.png")
    write_sheet(pipeline, prompts[:8], (768, 512), out / "samples-wide.png")
    for net, training in modes:
        net.train(training)


def write_sheet(
    pipeline: Pipeline, prompts: Sequence[str], size: tuple[int, int], path: Path, steps: int = STEPS
) -> None:
    """One picture a prompt, `size` (width, height) each, shown at half its side."""
    pictures = []
    for n, prompt in enumerate(prompts):
        params = GenerationParams(
            prompt=prompt, width=size[0], height=size[1], steps=steps, guidance_scale=GUIDANCE, seed=n
        )
        pictures.append(run(generate(params, pipeline.shift), pipeline).pixels)
    pixels = torch.stack(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
    half = torch.nn.functional.avg_pool2d(pixels, 2)
    contact_sheet(half, list(prompts), columns=4).save(path, optimize=True)
