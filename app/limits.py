"""What may be asked of which model: the cards that workers publish, and a request checked against one."""

from __future__ import annotations

import secrets
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping

from app.errors import Shown, Words, shortened
from app.schemas import GenerationCreate
from app.size import size_of
from model.params import GenerationParams, InvalidParams
from worker.contract.cards import Limits, ModelCard
from worker.contract.errors import InvalidField, UnknownModel
from worker.contract.job import Job, Output, Webhook, new_job_id
from worker.contract.settings import ContractSettings

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
        """The card of a model, or the first that answers for that name. UnknownModel, QueueUnavailable."""
        cards = await self.cards()
        if card := named(cards, name):
            return card
        raise UnknownModel(shortened(name), list(cards))


def named(cards: Mapping[str, ModelCard], name: str) -> ModelCard | None:
    """The card of that name, else the first that answers for it."""
    return cards.get(name) or next((card for card in cards.values() if name in card.aliases), None)


def resolve(create: GenerationCreate, card: ModelCard, settings: ContractSettings, *, request_id: str) -> Job:
    """The job of a request: every default filled in from the card, every limit of the card held. InvalidField."""
    defaults, limits = card.defaults, card.limits
    width, height = _size(create, card)
    steps = create.steps or defaults.steps
    guidance_scale = defaults.guidance_scale if create.guidance_scale is None else create.guidance_scale
    _check_prompts(create, limits)
    _check_size(width, height, limits)
    _check_most("steps", steps, 1, limits.max_steps)
    _check_most("guidance_scale", guidance_scale, 0, limits.max_guidance_scale)
    _check_most("num_images", create.num_images, 1, limits.max_num_images)
    if create.expires_in_s is not None:
        _check_most("expires_in_s", create.expires_in_s, 60, settings.picture_lifetime_s)
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
        deadline=now + (create.deadline_s or settings.record_lifetime_s),
        request_id=request_id,
        picture_lifetime_s=create.expires_in_s,
        warnings=tuple(_warnings(params, card)),
        webhook=_webhook(create),
    )


def _webhook(create: GenerationCreate) -> Webhook | None:
    asked = create.webhook
    return Webhook(url=asked.url, events=tuple(dict.fromkeys(asked.events))) if asked else None


def _size(create: GenerationCreate, card: ModelCard) -> tuple[int, int]:
    """Width and height in pixels, in whichever words they are asked for."""
    for field in ("aspect_ratio", "megapixels"):
        if getattr(create, field) is None:
            continue
        if create.width is not None or create.height is not None:
            raise InvalidField(field, Shown(getattr(create, field)), "nothing beside width or height")
        return size_of(create.aspect_ratio, create.megapixels, card.defaults, card.limits)
    return create.width or card.defaults.width, create.height or card.defaults.height


def _warnings(params: GenerationParams, card: ModelCard) -> Iterator[str]:
    """What will not be as the owner may expect."""
    if params.negative_prompt and not params.guided:
        yield f"negative_prompt has no effect: guidance_scale is {params.guidance_scale:g}"
    elif params.negative_prompt and not card.negative_prompt:
        yield f"negative_prompt has little effect: {card.name} was distilled to do without guidance"
    pixels = params.width * params.height
    if card.trained_pixels and pixels > card.trained_pixels:
        yield (
            f"{params.width}x{params.height} is {pixels:,} pixels: {card.name} was trained on pictures up to "
            f"{card.trained_pixels:,}, and larger ones often repeat their subject"
        )


def _check_prompts(create: GenerationCreate, limits: Limits) -> None:
    for field in ("prompt", "negative_prompt"):
        text: str = getattr(create, field)
        if len(text) > limits.max_prompt_chars:
            value = f"{len(text):,} characters long"
            raise InvalidField(field, Words(value), f"at most {limits.max_prompt_chars:,} characters")
        if "\0" in text:
            raise InvalidField(field, Shown(text), "text without U+0000")
        if not _is_encodable(text):
            raise InvalidField(field, Shown(text), "text without lone surrogates")


def _is_encodable(text: str) -> bool:
    """Whether UTF-8 can carry it; pydantic asks that only of text with a least length or a pattern."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_size(width: int, height: int, limits: Limits) -> None:
    multiple = limits.side_multiple
    for field, side in (("width", width), ("height", height)):
        if not limits.min_side <= side <= limits.max_side or side % multiple:
            allowed = f"a multiple of {multiple} from {limits.min_side} to {limits.max_side}"
            raise InvalidField(field, Shown(side), f"{allowed}, such as {_nearest(side, limits)}")
    if not limits.min_pixels <= width * height <= limits.max_pixels:
        allowed = f"width x height from {limits.min_pixels:,} to {limits.max_pixels:,} pixels"
        raise InvalidField("width", Words(f"{width} and height is {height}, {width * height:,} pixels"), allowed)


def _nearest(side: int, limits: Limits) -> int:
    multiple = limits.side_multiple
    lowest, highest = -(-limits.min_side // multiple) * multiple, limits.max_side // multiple * multiple
    return min(max((side + multiple // 2) // multiple * multiple, lowest), highest)


def _check_most(field: str, value: float, least: float, most: float) -> None:
    if not least <= value <= most:
        raise InvalidField(field, Shown(value), f"{least:g} to {most:g}")
