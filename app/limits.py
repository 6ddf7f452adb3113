"""What may be asked of which model: the cards that workers publish, and a request checked against one."""

from __future__ import annotations

import secrets
import time
from collections.abc import Awaitable, Callable

from app.errors import Shown, shortened
from app.schemas import GenerationCreate
from model.params import GenerationParams, InvalidParams
from worker.contract.cards import Limits, ModelCard
from worker.contract.errors import InvalidField, UnknownModel
from worker.contract.job import Job, Output, new_job_id

CARDS_FRESH_S = 1.0


class Catalog:
    """The model cards, asked of Redis at most once a second."""

    def __init__(self, fetch: Callable[[], Awaitable[dict[str, ModelCard]]]) -> None:
        self._fetch = fetch
        self._cards: dict[str, ModelCard] = {}
        self._fetched_at = float("-inf")

    async def cards(self) -> dict[str, ModelCard]:
        """All cards ever published, by name. QueueUnavailable."""
        if time.monotonic() - self._fetched_at > CARDS_FRESH_S:
            self._cards = await self._fetch()
            self._fetched_at = time.monotonic()
        return self._cards

    async def card(self, name: str) -> ModelCard:
        """The card of a model. UnknownModel, QueueUnavailable."""
        cards = await self.cards()
        if name not in cards:
            raise UnknownModel(shortened(name), list(cards))
        return cards[name]


def resolve(create: GenerationCreate, card: ModelCard, *, record_lifetime_s: int, request_id: str) -> Job:
    """The job of a request: every default filled in from the card, every limit of the card held. InvalidField."""
    defaults, limits = card.defaults, card.limits
    width, height = create.width or defaults.width, create.height or defaults.height
    steps = create.steps or defaults.steps
    guidance_scale = defaults.guidance_scale if create.guidance_scale is None else create.guidance_scale
    _check_prompts(create, limits)
    _check_size(width, height, limits)
    _check_most("steps", steps, 1, limits.max_steps)
    _check_most("guidance_scale", guidance_scale, 0, limits.max_guidance_scale)
    _check_most("num_images", create.num_images, 1, limits.max_num_images)
    try:
        params = GenerationParams(
            prompt=create.prompt,
            negative_prompt=create.negative_prompt,
            width=width,
            height=height,
            steps=steps,
            guidance_scale=guidance_scale,
            # 32 bits, so that the seed can be pasted into any other tool
            seed=secrets.randbelow(2**32) if create.seed is None else create.seed,
            sampler=create.sampler or defaults.sampler,
        )
    except InvalidParams as error:
        raise InvalidField(error.field, Shown(error.value), error.allowed) from error
    now = time.time()
    return Job(
        id=new_job_id(),
        model=card.name,
        revision=card.revision,
        params=params,
        num_images=create.num_images,
        deterministic=create.deterministic,
        output=Output(format=create.output_format, quality=create.output_quality, metadata=create.metadata),
        priority=create.priority,
        created_at=now,
        deadline=now + (create.deadline_s or record_lifetime_s),
        request_id=request_id,
    )


def _check_prompts(create: GenerationCreate, limits: Limits) -> None:
    for field in ("prompt", "negative_prompt"):
        text: str = getattr(create, field)
        if len(text) > limits.max_prompt_chars:
            value = f"{len(text):,} characters long"
            raise InvalidField(field, _Words(value), f"at most {limits.max_prompt_chars:,} characters")
        if "\0" in text:
            raise InvalidField(field, Shown(text), "text without U+0000")


def _check_size(width: int, height: int, limits: Limits) -> None:
    multiple = limits.side_multiple
    for field, side in (("width", width), ("height", height)):
        if not limits.min_side <= side <= limits.max_side or side % multiple:
            allowed = f"a multiple of {multiple} from {limits.min_side} to {limits.max_side}"
            raise InvalidField(field, Shown(side), f"{allowed}, such as {_nearest(side, limits)}")
    if not limits.min_pixels <= width * height <= limits.max_pixels:
        allowed = f"width x height from {limits.min_pixels:,} to {limits.max_pixels:,} pixels"
        raise InvalidField("width", _Words(f"{width} and height is {height}, {width * height:,} pixels"), allowed)


def _nearest(side: int, limits: Limits) -> int:
    multiple = limits.side_multiple
    lowest, highest = -(-limits.min_side // multiple) * multiple, limits.max_side // multiple * multiple
    return min(max((side + multiple // 2) // multiple * multiple, lowest), highest)


def _check_most(field: str, value: float, least: float, most: float) -> None:
    if not least <= value <= most:
        raise InvalidField(field, Shown(value), f"{least:g} to {most:g}")


class _Words(str):
    """Words that say a value, shown without quotes."""

    def __repr__(self) -> str:
        return str(self)
