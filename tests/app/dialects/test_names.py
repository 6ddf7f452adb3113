"""What vendors call models and sizes, and what we make of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from pydantic import Field

from app.dialects.body import Asked, checked, in_their_words
from app.dialects.models import card_named, default_card, find_card
from app.dialects.partials import jpeg_size
from app.dialects.sizes import fitted, of_ratio
from app.limits import Catalog
from tests.app.dialects.painter import picture_of
from tests.app.fake_worker import LARGE, TINY, TURBO
from worker.contract.cards import ModelCard
from worker.contract.errors import InvalidField, UnknownModel

DEMO = replace(TINY, name="demo", aliases=("sd3.5-large", "sd3.5-medium"))
CARDS = {card.name: card for card in (LARGE, TURBO, TINY)}


class Workers:
    def __init__(self, **held: int) -> None:
        self._held = held

    async def workers(self) -> dict[str, int]:
        return self._held


def catalog(*cards: ModelCard) -> Catalog:
    async def fetch() -> dict[str, ModelCard]:
        return {card.name: card for card in cards}

    return Catalog(fetch)


@pytest.mark.parametrize(
    ("name", "card"),
    [
        ("sd3.5-large", "sd3.5-large"),
        ("sd3-turbo", "sd3.5-large-turbo"),
        ("stabilityai/sd3.5", "sd3.5-large"),
        ("stabilityai/stable-diffusion-3.5-large-turbo", "sd3.5-large-turbo"),
        ("stability-ai/Stable-Diffusion-3.5-Large", "sd3.5-large"),
        ("anybody/tiny", "tiny"),
    ],
)
def test_vendors_name_finds_the_card(name: str, card: str) -> None:
    found = find_card(CARDS, name)
    assert found is not None
    assert found.name == card


@pytest.mark.parametrize("name", ["", "/", "sd3.5-medium", "gpt-image-2", "stabilityai/", "sd3.5-large/other"])
def test_other_name_finds_none(name: str) -> None:
    assert find_card(CARDS, name) is None


async def test_alias_answers_only_while_no_card_has_that_name() -> None:
    assert (await card_named(catalog(DEMO), "stabilityai/sd3.5-medium")).name == "demo"
    assert (await card_named(catalog(DEMO, LARGE), "stabilityai/sd3.5")).name == "sd3.5-large"
    with pytest.raises(UnknownModel, match="known models: demo"):
        await card_named(catalog(DEMO), "flux")


async def test_default_is_the_operators_choice_else_one_that_is_held() -> None:
    cards: Any = catalog(LARGE, TURBO, TINY)
    idle: Any = Workers()
    held: Any = Workers(tiny=1)
    assert (await default_card(cards, held, "sd3-turbo")).name == "sd3.5-large-turbo"
    assert (await default_card(cards, held, "")).name == "tiny"
    assert (await default_card(cards, idle, "")).name == "sd3.5-large"
    with pytest.raises(UnknownModel, match="no worker has started"):
        await default_card(catalog(), held, "")


def test_ratio_is_the_vendors_size_only_for_a_model_of_a_megapixel() -> None:
    assert of_ratio("16:9", LARGE) == {"width": 1344, "height": 768}
    assert of_ratio("16:9", TINY) == {"aspect_ratio": "16:9"}


@pytest.mark.parametrize("size", [(256, 256), (512, 512), (1024, 1024), (1792, 1024), (1024, 1536), (4096, 4096)])
@pytest.mark.parametrize("card", [LARGE, DEMO])
def test_fitted_size_is_legal_and_of_the_same_shape(size: tuple[int, int], card: ModelCard) -> None:
    width, height = fitted(*size, card)
    assert card.limits.allows(width, height)
    assert width / height == pytest.approx(size[0] / size[1], rel=0.15)
    if card.limits.allows(*size):
        assert (width, height) == size


def test_size_of_a_jpeg_is_read_from_its_header() -> None:
    assert jpeg_size(picture_of(40, 24, "jpeg")) == (40, 24)
    for broken in (b"", b"\xff\xd8\xff", picture_of(8, 8, "png")[:3], b"\xff\xd8" + b"\xff\xe0\x00\x02" * 3):
        with pytest.raises(ValueError, match="no size"):
            jpeg_size(broken)


class Example(Asked):
    text: str = Field(min_length=1, description="text")
    scale: float | None = Field(None, ge=1, le=10, description="a number from 1 to 10")


def test_numbers_may_be_words_and_the_empty_is_absent() -> None:
    assert checked(Example, {"text": "x", "scale": "2.5", "more": 1}) == Example(text="x", scale=2.5)
    assert checked(Example, {"text": "x", "scale": ""}) == checked(Example, {"text": "x", "scale": None})


@pytest.mark.parametrize("scale", ["high", 11, True and [1], float("nan"), float("inf")])
def test_wrong_value_is_told_with_what_is_allowed(scale: Any) -> None:
    with pytest.raises(InvalidField, match="allowed: a number from 1 to 10") as caught:
        checked(Example, {"text": "x", "scale": scale})
    assert caught.value.field == "scale"


def test_refusal_of_ours_names_the_field_and_value_as_they_were_sent() -> None:
    ours = InvalidField("guidance_scale", 2.5, "0 to 2")
    theirs = in_their_words(ours, {"guidance_scale": "scale"}, Example(text="x", scale=2.5))
    assert (theirs.field, str(theirs)) == ("scale", "scale is 2.5; allowed: 0 to 2")
    assert in_their_words(ours, {"guidance_scale": "scale"}, Example(text="x")) is ours
