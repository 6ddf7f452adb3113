"""Looks at a model while it learns: sheets of pictures for fixed prompts."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch

from model.params import GenerationParams
from model.pipeline import Pipeline, run
from model.sampling import Growth, Shift
from model.training.net import FlowNet
from model.training.sheets import contact_sheet
from model.vae import VAE
from model.work import generate

STEPS, GUIDANCE = 24, 5.0
SHIFT = Shift(Growth(base_shift=1.5, max_shift=2.08, base_image_seq_len=1024, max_image_seq_len=4096))
"""4.5 at 512x512 and 8 at 1024x1024: about what the pictures were trained with (see plan.Size.shift).

At 512x512 the demo draws 85 % of the shapes right in 16 steps with 3, 91 % in 24 with 4.5, hardly more in 48.
"""

SECONDS = 20.0
"""Sheets that are not begun by then are left out."""

PROMPTS = (
    "a red circle on a blue background",
    "a yellow star in the night sky",
    "a large white heart on a red background",
    "a green square on the left, on a yellow background",
    "an orange sun over the sea",
    "a pink flower in a meadow",
    "a purple triangle to the right of a white circle, on a teal background",
    "a black star above a yellow heart on a light blue background",
    "a watercolour painting of a red house on a white background",
    "a watercolour painting of a blue boat on the sea",
    "a line drawing of a green tree on a white background",
    "a line drawing of a purple heart and an orange star on a yellow background",
    "a blue boat at sea, pixel art",
    "a pink heart on a black background, pixel art",
    "a 3D render of a red square on a grey background",
    "a 3D render of a green circle and a white heart on a purple background",
    "a white cloud at the top, on a gradient from blue to pink",
    "a yellow moon in the top left corner at night",
    "a red circle, a white square and a blue star in a row, on a black background",
    "a brown house in a meadow",
    "a grey mountain above a green tree on a light blue background",
    "a blue triangle on an orange background",
    "a white flower above a green star, in a meadow",
    "a heart",
)  # some of them held-out combinations: see scenes.held_out


def write_samples(net: FlowNet, vae: VAE, out: Path, prompts: Sequence[str] | None = None) -> None:
    """`samples.png` at 512x512; of some prompts `samples-wide.png` at 768x512 and `samples-large.png` at 1024x1024.

    prompts : None for those of our drawings
    """
    prompts = PROMPTS if prompts is None else prompts
    started = time.monotonic()
    modes = [(part, part.training) for part in (net, vae)]
    for part, _ in modes:
        part.eval()
    pipeline = Pipeline(net.mmdit, vae, net.tower.encoders(), shift=SHIFT, t5_length=net.t5_length)
    sheets = (
        ("samples", prompts, (512, 512)),
        ("samples-wide", prompts[:8], (768, 512)),
        ("samples-large", prompts[:1], (1024, 1024)),
    )
    for name, asked, size in sheets:
        if time.monotonic() - started < SECONDS:
            write_sheet(pipeline, asked, size, out / f"{name}.png")
    for part, training in modes:
        part.train(training)


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
