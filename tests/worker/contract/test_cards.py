"""Model cards as JSON."""

import json

from worker.contract.cards import Defaults, Limits, ModelCard

CARD = ModelCard(
    name="demo",
    description="small",
    variant="other",
    revision="r1",
    parameters=7,
    defaults=Defaults(steps=20, guidance_scale=4.0),
    limits=Limits(max_side=1536),
    aliases=("sd3.5-large",),
    trained_pixels=1_048_576,
)


def test_a_card_survives_its_json() -> None:
    assert ModelCard.from_json(CARD.to_json()) == CARD


def test_what_a_newer_worker_adds_is_passed_over() -> None:
    data = json.loads(CARD.to_json()) | {"loras": ["x"]}
    data["limits"]["max_loras"] = 3
    assert ModelCard.from_json(json.dumps(data)) == CARD


def test_a_card_from_before_there_were_aliases_is_read() -> None:
    data = json.loads(CARD.to_json())
    del data["aliases"], data["trained_pixels"]
    card = ModelCard.from_json(json.dumps(data))
    assert (card.aliases, card.trained_pixels) == ((), None)
