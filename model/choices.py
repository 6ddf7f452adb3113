"""Which way through the MMDiT is fastest for a shape: measured once for each kind of GPU, and committed.

Two starts on one kind of GPU make the same choice, so they give the same pictures. `python -m model.tuning` measures.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.fast_mmdit import Choice, FastMMDiT
from model.kernels.attention import backends

TABLE = Path(__file__).with_name("choices.json")
"""By the GPU's name, then by precision and the MMDiT's hidden width: a list of what was measured."""

log = logging.getLogger(__name__)


def choice_of(fast: FastMMDiT, x: Tensor) -> Choice:
    """For these latents, one row each. x : shape = (rows, 16, h/8, w/8), in the weights' dtype."""
    patches = x.shape[-2] * x.shape[-1] // fast.config.patch**2
    return choice_for(x.device, x.dtype, fast.precision, fast.config.hidden, len(x), patches)


def choice_for(
    device: torch.device, dtype: torch.dtype, precision: str, hidden: int, rows: int, image_tokens: int
) -> Choice:
    """The choice for the measured shape that is nearest; for a net or a GPU that was not measured, PyTorch's own."""
    if device.type != "cuda" or dtype.itemsize != 2:  # no backend but PyTorch's own takes fp32
        return Choice()
    name = torch.cuda.get_device_name(device)
    if name not in _table():
        _say_once(f"which way is fastest was not measured on {name}: python -m model.tuning does")
    choice = nearest(_table().get(name, {}).get(f"{precision} {hidden}", []), rows, image_tokens)
    if choice.attention not in backends(device):
        _say_once(f"attention by {choice.attention} is not installed: PyTorch's own is used")
        return replace(choice, attention="default")
    return choice


def nearest(measured: Sequence[dict[str, Any]], rows: int, image_tokens: int) -> Choice:
    """The choice of the line whose shape is nearest; PyTorch's own if there is none."""
    found = min(measured, key=lambda known: _distance(known, rows, image_tokens), default=None)
    return Choice(**found["choice"]) if found else Choice()


def entry(rows: int, image_tokens: int, choice: Choice, ms: dict[str, float]) -> dict[str, Any]:
    """A line of the table; `ms`: of each choice that was measured, for whoever reads it."""
    return {"rows": rows, "image_tokens": image_tokens, "choice": asdict(choice), "ms": ms}


def _distance(known: dict[str, Any], rows: int, image_tokens: int) -> tuple[float, float]:
    """By the tokens of one picture first, then by rows."""
    return abs(math.log(known["image_tokens"] / image_tokens)), abs(math.log(known["rows"] / rows))


@cache
def _table() -> dict[str, dict[str, list[dict[str, Any]]]]:
    table: dict[str, dict[str, list[dict[str, Any]]]] = json.loads(TABLE.read_text("utf-8"))
    return table


@cache
def _say_once(what: str) -> None:
    log.warning(what)
