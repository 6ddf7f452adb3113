"""A user's own pictures as a source: a folder with captions, or a function that draws."""

from __future__ import annotations

import hashlib
import importlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from random import Random

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from model.training.sources import HELD_OUT_SEEDS, Frame

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
METADATA = "metadata.jsonl"
HELD_OUT_EVERY = 20
"""Of a folder with at least twice as many pictures, every twentieth is measured on and never trained on."""
CHUNK_PIXELS = 1 << 22


class SourceError(ValueError):
    """Pictures or captions that cannot be trained on: says which file and what is wrong."""


class Painted(ABC):
    """What a folder and a function share: their pictures are read as pixels, already of the frame's size."""

    def chunk(self, frame: Frame) -> int:
        """As many as make about four million pixels."""
        return max(1, min(64, CHUNK_PIXELS // frame.pixels))

    @abstractmethod
    def picture(self, seed: int) -> tuple[Image.Image, str]:
        """One picture and its caption."""

    def read(self, seeds: Sequence[int], frame: Frame) -> tuple[np.ndarray, list[str]]:
        """Pixels, 8-bit RGB: shape = (seeds, height, width, 3)."""
        pairs = [self.picture(seed) for seed in seeds]
        pixels = [np.asarray(fit(image, frame, seed)) for (image, _), seed in zip(pairs, seeds, strict=True)]
        return np.stack(pixels), [text for _, text in pairs]

    def pixels(self, rows: Tensor, frame: Frame, device: torch.device) -> Tensor:  # noqa: ARG002
        """On the device, from -1 to 1."""
        return rows.to(device, non_blocking=True).permute(0, 3, 1, 2).float() / 127.5 - 1


class Folder(Painted):
    """Pictures (PNG, JPEG, WebP) in a folder and below it, each with its caption.

    The caption of NAME.png stands in NAME.txt beside it, or in metadata.jsonl (`file_name`, `text`) as in the
    "imagefolder" of Hugging Face's datasets.

    smallest : what the shorter side of every picture must have, pixels
    raises SourceError : no pictures, a caption missing or empty, a picture that is unreadable or too small
    """

    def __init__(self, folder: Path, smallest: int = 64) -> None:
        if not folder.is_dir():
            raise SourceError(f"{folder} is not a folder")
        self.paths, self.texts = _listed(folder)
        self.shorter = sorted(min(_size(path, smallest)) for path in self.paths)
        digest = hashlib.sha256(
            repr([(path.name, text) for path, text in zip(self.paths, self.texts, strict=True)]).encode()
        )
        self.name = f"{len(self.paths)} pictures of {folder} ({digest.hexdigest()[:12]})"
        every = HELD_OUT_EVERY if len(self.paths) >= 2 * HELD_OUT_EVERY else 0
        order = range(len(self.paths))
        self.held_out = [n for n in order if every and n % every == every - 1] or list(order)
        self.trained = [n for n in order if not every or n % every != every - 1]

    def index(self, seed: int) -> int:
        """Which picture a seed is: every one once, in an order of its own, before any comes again."""
        kept, seed = (self.held_out, seed - HELD_OUT_SEEDS) if seed >= HELD_OUT_SEEDS else (self.trained, seed)
        turn, place = divmod(seed, len(kept))
        if kept is self.held_out:
            return kept[place]
        # A step that shares no factor with the length visits all of them.
        step = next(n for n in range(1 + turn * 7919 % len(kept), 2 * len(kept) + 2) if np.gcd(n, len(kept)) == 1)
        return kept[(turn + place * step) % len(kept)]

    def picture(self, seed: int) -> tuple[Image.Image, str]:
        """The picture of a seed, and its caption. Errors: SourceError where the file is damaged."""
        n = self.index(seed)
        try:
            with Image.open(self.paths[n]) as image:
                return _rgb(image), self.texts[n]
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise SourceError(f"{self.paths[n]} cannot be read: {error}") from error

    def captions(self) -> Iterable[str]:
        """All of them."""
        return self.texts


class Function(Painted):
    """Pictures of a function `package.module:function` that takes a seed and gives a PIL image and its caption.

    raises SourceError : no such function, or what it gives is not that
    """

    def __init__(self, name: str) -> None:
        self.name = name
        module, _, attribute = name.partition(":")
        if not module or not attribute:
            raise SourceError(f"source is {name!r}, expected package.module:function")
        try:
            function = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise SourceError(f"source {name!r} cannot be imported: {error}") from error
        if not callable(function):
            raise SourceError(f"source {name!r} is not a function")
        self.function: Callable[[int], object] = function
        self.picture(0)

    def picture(self, seed: int) -> tuple[Image.Image, str]:
        """What the function gives for a seed."""
        given = self.function(seed)
        match given:
            case (Image.Image() as image, str() as text):
                return _rgb(image), text
        raise SourceError(f"{self.name}({seed}) gave {type(given).__name__}, expected a PIL image and its caption")

    def captions(self) -> Iterable[str]:
        """Of the first pictures."""
        return (self.picture(seed)[1] for seed in range(1000))


def fit(image: Image.Image, frame: Frame, seed: int) -> Image.Image:
    """A picture scaled to cover the frame and cut to it, in the middle; for windows, scaled and placed at random."""
    rng = Random(~seed)
    scale = max(frame.height / image.height, frame.width / image.width)
    if frame.largest is not None:
        scale *= rng.uniform(1.0, max(1.0, min(frame.largest / max(frame.height, frame.width), 1 / scale)))
    width, height = max(frame.width, round(image.width * scale)), max(frame.height, round(image.height * scale))
    across, down = (rng.random(), rng.random()) if frame.largest is not None else (0.5, 0.5)
    left, top = round((width - frame.width) * across), round((height - frame.height) * down)
    resized = image.resize((width, height), Image.Resampling.LANCZOS)
    return resized.crop((left, top, left + frame.width, top + frame.height))


def _listed(folder: Path) -> tuple[list[Path], list[str]]:
    """The folder's pictures and their captions."""
    metadata = folder / METADATA
    if metadata.is_file():
        lines = enumerate(metadata.read_text("utf-8").splitlines(), 1)
        captions = dict(_metadata_row(metadata, n, line) for n, line in lines if line.strip())
        paths = list(captions)
        missing = next((path for path in paths if not path.is_file()), None)
        if missing:
            raise SourceError(f"{metadata} names {missing.name}, which is not there")
    else:
        paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
        captions = {path: _caption_beside(path) for path in paths}
    if not paths:
        raise SourceError(f"{folder} holds no pictures ({', '.join(SUFFIXES)})")
    return paths, list(captions.values())


def _metadata_row(metadata: Path, line_number: int, line: str) -> tuple[Path, str]:
    where = f"{metadata}, line {line_number}"
    try:
        row = json.loads(line)
    except ValueError as error:
        raise SourceError(f"{where} is not JSON: {error}") from error
    name, text = (row.get("file_name"), row.get("text")) if isinstance(row, dict) else (None, None)
    if not isinstance(name, str) or not isinstance(text, str) or not text.strip():
        raise SourceError(f'{where}: expected {{"file_name": ..., "text": ...}}, found {line[:80]}')
    path = metadata.parent / name
    if not path.resolve().is_relative_to(metadata.parent.resolve()):
        raise SourceError(f"{where}: {name} is outside the folder")
    return path, " ".join(text.split())


def _caption_beside(path: Path) -> str:
    beside = path.with_suffix(".txt")
    try:
        text = " ".join(beside.read_text("utf-8").split())
    except FileNotFoundError:
        raise SourceError(f"{path} has no caption: expected {beside.name} beside it, or {METADATA}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{beside} cannot be read: {error}") from error
    if not text:
        raise SourceError(f"{beside} is empty")
    return text


def _size(path: Path, smallest: int) -> tuple[int, int]:
    try:
        with Image.open(path) as image:
            size = image.size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise SourceError(f"{path} cannot be read: {error}") from error
    if min(size) < smallest:
        raise SourceError(f"{path} is {size[0]}x{size[1]}, expected at least {smallest} pixels a side")
    return size


def _rgb(image: Image.Image) -> Image.Image:
    """Upright, in RGB; what is transparent becomes white."""
    upright = ImageOps.exif_transpose(image)
    if upright.mode in ("RGBA", "LA", "PA") or "transparency" in upright.info:
        upright = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright)
    return upright.convert("RGB")
