"""A bundle's pictures to look at: one prompt through styles and seeds, and a few prompts of all kinds.

python -m model.evaluation.gallery --model model/bundles/demo --styles styles.jpg --prompts prompts.jpg
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from model.evaluation.subject import Subject, load_subject
from model.pipeline import run
from model.training.samples import PROMPTS
from model.training.sheets import contact_sheet
from model.weights import CheckpointError
from model.work import generate

STYLES = ("flat illustration", "line art", "pixel art", "watercolour", "3D render")
SEEDS = 4
SHOWN = 2  # a picture's side in the sheet is so many times shorter


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the sheets that are asked for; 1 if the model cannot be read."""
    parser = argparse.ArgumentParser(
        prog="python -m model.evaluation.gallery", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--model", type=Path, required=True, help="a bundle's folder")
    parser.add_argument("--prompt", default="a red boat at sea", help="of the sheet of styles and seeds")
    parser.add_argument(
        "--styles", type=Path, help="a picture file: the prompt in a style each row, a seed each column"
    )
    parser.add_argument("--prompts", type=Path, help="a picture file: two dozen prompts, held-out ones among them")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        subject = load_subject(options.model, device, "bf16" if device.type == "cuda" else "fp32")
    except (CheckpointError, OSError) as error:
        print(f"model.evaluation.gallery: {error}", file=sys.stderr)
        return 1
    if options.styles:
        asked = [(f"{options.prompt}, {style}", seed) for style in STYLES for seed in range(SEEDS)]
        _write(sheet(subject, asked, columns=SEEDS), options.styles)
    if options.prompts:
        _write(sheet(subject, [(prompt, n) for n, prompt in enumerate(PROMPTS)], columns=6), options.prompts)
    return 0


def sheet(subject: Subject, asked: Sequence[tuple[str, int]], columns: int) -> Image.Image:
    """Prompts and seeds as pictures, by the model's own defaults."""
    pictures = torch.stack([picture(subject, prompt, seed) for prompt, seed in asked])
    small = torch.nn.functional.avg_pool2d(pictures, SHOWN)
    return contact_sheet(small, [prompt for prompt, _ in asked], columns=columns)


def picture(subject: Subject, prompt: str, seed: int) -> Tensor:
    """shape = (3, height, width), from -1 to 1."""
    params = subject.card.params(prompt, seed)
    pixels = run(generate(params, subject.pipeline.shift), subject.pipeline).pixels
    return pixels.permute(2, 0, 1).float() / 127.5 - 1


def _write(sheet: Image.Image, path: Path) -> None:
    sheet.save(path, quality=88, subsampling=0, optimize=True)  # of a JPEG; other formats take what they know


if __name__ == "__main__":
    sys.exit(main())
