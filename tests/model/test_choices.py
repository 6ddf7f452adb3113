"""The committed table of which way through the MMDiT is fastest."""

from __future__ import annotations

import json

import pytest
import torch

from model.choices import TABLE, choice_for, entry, nearest
from model.config import VARIANTS
from model.fast_mmdit import Choice
from model.kernels.attention import BACKENDS
from model.tuning import _text

LINES = [
    entry(1, 1024, Choice("cudnn"), {}),
    entry(2, 1024, Choice("cudnn", beside=True), {}),
    entry(2, 4096, Choice("fa3", apart=True), {}),
]


@pytest.mark.parametrize(
    ("rows", "image_tokens", "expected"),
    [
        (1, 1024, Choice("cudnn")),
        (2, 1100, Choice("cudnn", beside=True)),
        (8, 900, Choice("cudnn", beside=True)),
        (1, 3900, Choice("fa3", apart=True)),
    ],
)
def test_the_nearest_shape_decides(rows: int, image_tokens: int, expected: Choice) -> None:
    assert nearest(LINES, rows, image_tokens) == expected


def test_what_was_not_measured_goes_pytorchs_way() -> None:
    assert nearest([], 2, 1024) == Choice()
    assert choice_for(torch.device("cpu"), torch.bfloat16, "bf16", 2432, 2, 4096) == Choice()


def test_the_committed_table_is_as_the_tuning_writes_it() -> None:
    table = json.loads(TABLE.read_text())
    assert _text(table) == TABLE.read_text()
    sizes = {f"{kind} {spec.mmdit.hidden}" for spec in VARIANTS.values() for kind in ("bf16", "fp8")}
    for measured in table.values():
        assert measured.keys() <= sizes
        for lines in measured.values():
            assert {Choice(**line["choice"]).attention for line in lines} <= set(BACKENDS)
