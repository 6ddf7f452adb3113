"""What vendors call the models that Darkroom serves, and the card that answers for each name."""

from __future__ import annotations

from collections.abc import Mapping

from app.errors import shortened
from app.limits import Catalog, named
from worker.contract.cards import ModelCard
from worker.contract.errors import UnknownModel
from worker.contract.queue import JobQueue

OUR_NAMES = {
    # Stability; the older three have been answered by the newer ones since 2025
    "sd3": "sd3.5-large",
    "sd3-turbo": "sd3.5-large-turbo",
    "sd3-large": "sd3.5-large",
    "sd3-large-turbo": "sd3.5-large-turbo",
    "sd3-medium": "sd3.5-medium",
    # DeepInfra
    "sd3.5": "sd3.5-large",
    # Hugging Face and Replicate
    "stable-diffusion-3": "sd3.5-medium",
    "stable-diffusion-3-medium": "sd3.5-medium",
    "stable-diffusion-3-medium-diffusers": "sd3.5-medium",
    "stable-diffusion-3.5-large": "sd3.5-large",
    "stable-diffusion-3.5-large-turbo": "sd3.5-large-turbo",
    "stable-diffusion-3.5-medium": "sd3.5-medium",
}
"""What we call the models that vendors call so, without the owner that some put before the name."""


async def card_named(catalog: Catalog, name: str) -> ModelCard:
    """The card of a model as a vendor's client names it: `stabilityai/sd3.5`. UnknownModel, QueueUnavailable."""
    cards = await catalog.cards()
    if (card := find_card(cards, name)) is None:
        raise UnknownModel(shortened(name), list(cards))
    return card


async def default_card(catalog: Catalog, queue: JobQueue, default_model: str | None) -> ModelCard:
    """The card for who names none that we know: the operator's choice, else one that a worker holds, else any.

    UnknownModel: there is none. QueueUnavailable.
    """
    if default_model:
        return await card_named(catalog, default_model)
    cards, held = await catalog.cards(), await queue.workers()
    names = sorted(cards, key=lambda name: (not held.get(name), name))
    if not names:
        raise UnknownModel("", [])
    return cards[names[0]]


def find_card(cards: Mapping[str, ModelCard], name: str) -> ModelCard | None:
    """The card of that name or alias; else of the name without its owner; else of what we call that."""
    bare = name.rpartition("/")[2]
    return named(cards, name) or named(cards, bare) or named(cards, OUR_NAMES.get(bare.lower(), ""))
