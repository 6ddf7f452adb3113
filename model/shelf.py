"""What several models have in common, held once: nets whose tensors are the same byte for byte, wherever they lie.

Published models each bring their text encoders and VAE in a folder of their own, T5 alone of ten gigabytes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from torch import nn
from transformers import PreTrainedConfig

from model.bundle import TOKENIZERS
from model.text import TextEncoders, numbers_of
from model.weights import Weights

N = TypeVar("N", bound=nn.Module)


class Shelf:
    """The VAEs and text encoders of the models loaded so far, all on one device and in one dtype."""

    def __init__(self) -> None:
        self._nets: list[tuple[nn.Module, Weights]] = []
        self._texts: list[tuple[TextEncoders, Path]] = []

    def find(self, like: N, weights: Weights) -> N | None:
        """The net that `like`, which may be empty, would be with these weights; None: it is not here.

        raises CheckpointError : a file cannot be read
        """
        for net, its_weights in self._nets:
            if type(net) is type(like) and _numbers(net) == _numbers(like) and its_weights.same_as(weights):
                return net
        return None

    def put(self, net: nn.Module, weights: Weights) -> None:
        """Keeps a net for the models to come."""
        self._nets.append((net, weights))

    def text(self, made: TextEncoders, tokenizers: Path) -> TextEncoders:
        """The same encoders with the same tokenizers, if they are here, with all that they remember; else `made`."""
        for text, place in self._texts:
            nets = text.clip_l is made.clip_l and text.clip_g is made.clip_g and text.t5 is made.t5
            folders = TOKENIZERS if made.t5 else TOKENIZERS[:-1]
            if (
                nets
                and text.context_dim == made.context_dim
                and all(_files(place / name) == _files(tokenizers / name) for name in folders)
            ):
                return text
        self._texts.append((made, tokenizers))
        return made


def _numbers(net: nn.Module) -> object:
    """What of its config a net depends on."""
    config: Any = net.config
    return numbers_of(config) if isinstance(config, PreTrainedConfig) else config


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
