"""Width and height from an aspect ratio and megapixels."""

from __future__ import annotations

import math
import re

import httpx
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from app.size import MEGAPIXEL, size_of
from tests.app.fake_worker import LARGE, TINY
from worker.contract.cards import Limits
from worker.contract.errors import InvalidField


@pytest.mark.parametrize(
    ("ratio", "megapixels", "size"),
    [
        ("1:1", None, (1024, 1024)),
        ("1:1", 0.25, (512, 512)),
        ("1:1", 2.0, (1440, 1440)),
        ("16:9", 1.0, (1360, 768)),
        ("9:16", 1.0, (768, 1360)),
        ("21:9", 1.0, (1568, 672)),
        ("3:2", 1.0, (1248, 832)),
        ("4:5", 1.0, (912, 1136)),
        ("1000:1000", 1.0, (1024, 1024)),
        (None, 0.5, (720, 720)),
    ],
)
def test_size_is_the_nearest_legal_one(ratio: str | None, megapixels: float | None, size: tuple[int, int]) -> None:
    assert size_of(ratio, megapixels, LARGE.defaults, LARGE.limits) == size


@given(width=st.integers(1, 32), height=st.integers(1, 32), megapixels=st.floats(0.25, 2, width=32))
@hypothesis_settings(max_examples=300, deadline=None, derandomize=True)
def test_size_is_legal_and_close(width: int, height: int, megapixels: float) -> None:
    limits, ratio = LARGE.limits, width / height
    if math.sqrt(megapixels * MEGAPIXEL * max(ratio, 1 / ratio)) > limits.max_side - 16:
        return  # may be too long
    w, h = size_of(f"{width}:{height}", megapixels, LARGE.defaults, limits)
    assert w % 16 == h % 16 == 0
    assert max(w, h) <= limits.max_side
    assert limits.min_pixels <= w * h <= limits.max_pixels
    assert abs(math.log(w / h / ratio)) < 0.15  # at the longest; a hundredth where the shape is usual
    assert abs(math.log(w * h / MEGAPIXEL / megapixels)) < 0.15  # at the longest; a hundredth where the shape is usual


def test_size_follows_the_card() -> None:
    assert size_of("2:1", None, TINY.defaults, TINY.limits) == (112, 64)
    with pytest.raises(InvalidField, match=r"megapixels is 0\.25; allowed: 0\.00390625 to 0\.0625"):
        size_of(None, 0.25, TINY.defaults, TINY.limits)


@pytest.mark.parametrize(
    ("ratio", "megapixels", "allowed"),
    [
        ("4:3", 2.0, "up to 1.1:1 or 1:1.1 with 2 megapixels, or at most 1.6 megapixels at 4:3"),
        ("3:4", 2.0, "up to 1.1:1 or 1:1.1 with 2 megapixels, or at most 1.6 megapixels at 3:4"),
        ("2:1", 0.25, "up to 1:1 or 1:1 with 0.25 megapixels, or at least 0.5 megapixels at 2:1"),
        ("50:1", 1.0, "up to 2.2:1 or 1:2.2 with 1 megapixels"),
    ],
)
def test_aspect_ratio_that_is_too_steep_is_told_what_would_do(ratio: str, megapixels: float, allowed: str) -> None:
    limits = Limits(max_side=1536, min_side=64 if megapixels > 0.25 else 512)
    with pytest.raises(InvalidField) as caught:
        size_of(ratio, megapixels, LARGE.defaults, limits)
    assert str(caught.value) == f'aspect_ratio is "{ratio}"; allowed: {allowed}'


@given(width=st.integers(1, 40), height=st.integers(1, 40), megapixels=st.floats(0.25, 2, width=32))
@hypothesis_settings(max_examples=300, deadline=None, derandomize=True)
def test_what_would_do_does(width: int, height: int, megapixels: float) -> None:
    limits, ratio = Limits(max_side=1536, min_side=256), f"{width}:{height}"
    try:
        size_of(ratio, megapixels, LARGE.defaults, limits)
    except InvalidField as error:
        if found := re.search(r"or at (?:most|least) ([0-9.]+) megapixels", str(error)):
            size_of(ratio, float(found[1]), LARGE.defaults, limits)


async def test_request_by_aspect_ratio_is_answered_with_width_and_height(served: httpx.AsyncClient) -> None:
    asked = {"model": "sd3.5-large", "prompt": "x", "aspect_ratio": "16:9", "megapixels": 1}
    answer = await served.post("/v1/generations", json=asked)
    assert answer.status_code == 202
    params = answer.json()["params"]
    assert (params["width"], params["height"]) == (1360, 768)
    assert "aspect_ratio" not in params
