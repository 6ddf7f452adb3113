"""The models that a worker holds: loaded, warmed up, each with the card that it publishes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
import torch

from model.card import CARD, card_at
from model.checkpoint import MMDIT, T5, TEXT_PARTS, Outline, footprint, load_components, outline
from model.config import VARIANTS
from model.fp8 import has_fp8
from model.memory import Encoders, choose_encoders, gigabytes
from model.params import SAMPLERS, GenerationParams
from model.pipeline import Pipeline, run
from model.previews import fit_to, published
from model.room import NoRoom, free_bytes
from model.shelf import Shelf
from model.text import T5_LENGTH
from model.weights import CheckpointError
from model.work import Work, generate
from worker import fingerprint
from worker.contract.cards import Defaults, Limits, ModelCard
from worker.settings import ModelSource, WorkerSettings

log = structlog.get_logger()

TRAINED_PIXELS = {"large": 1_048_576, "large-turbo": 1_048_576}
"""The largest pictures that a variant was trained on, where it draws larger ones worse."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, eq=False)
class Model:
    """One model, ready to serve."""

    card: ModelCard
    pipeline: Pipeline
    load_s: float
    fingerprint: str  # see worker.fingerprint
    pace: Mapping[str, float]  # seconds a token while it warmed up, by stage


class NoSuchDevice(OSError):
    """The device asked for is not there, or too small."""


def pick_device(name: str) -> torch.device:
    """The device of a setting; `auto` is CUDA where there is a GPU. NoSuchDevice."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type != "cuda":
        return device
    index, found = device.index or 0, torch.cuda.device_count()
    if index >= found:
        raise NoSuchDevice(f"DARKROOM_DEVICE is {name!r}; CUDA devices that PyTorch finds here: {found}")
    return torch.device("cuda", index)  # as tensors name it: "cuda" alone is equal to no tensor's device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of a setting; `auto` is bf16 where the device multiplies it fast."""
    if name != "auto":
        return DTYPES[name]
    return torch.bfloat16 if device.type == "cuda" or _cpu_has_bf16() else torch.float32


def _cpu_has_bf16() -> bool:
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "amx_bf16" in flags or "avx512_bf16" in flags


class Loader:
    """Loads models. What they have in common, mostly encoders and VAE, is held once, whatever folders it is in."""

    def __init__(self, settings: WorkerSettings, free: Callable[[torch.device], int | None] = free_bytes) -> None:
        self._settings, self._free = settings, free
        self._shelf = Shelf()
        self._encoders: Encoders | None = None  # where they are, once that is decided; the shelf's are all there

    def load(self, source: ModelSource) -> Model:
        """Load a model and make a first picture with it.

        CheckpointError says what is wrong with its files, NoRoom what does not fit.
        """
        started, settings = time.perf_counter(), self._settings
        device = pick_device(settings.device)
        dtype = pick_dtype(settings.dtype, device)
        if self._encoders is None:
            self._encoders = self._place_encoders(source, device, dtype)
            log.info("text encoders", place=self._encoders)
        try:
            parts = load_components(
                source.path,
                device,
                dtype,
                tokenizers=settings.tokenizers,
                load_t5=settings.t5,
                variant=source.variant,
                shelf=self._shelf,
                free=self._free,
                encoders=self._encoders,
                host_dtype=pick_dtype("auto", torch.device("cpu")),
                fp8=self._fp8(source, device),
            )
        except NoRoom as error:
            fp8 = footprint(source.path, dtype, load_t5=settings.t5, fp8=True)[MMDIT]
            message = f"{source.name}: {error}; {advice(error, fp8)}"
            raise NoRoom(message, error.needs, error.device, error.free) from None
        told = card_at(source.path)
        card = make_card(source, parts.outline, told)
        pipeline = Pipeline(
            parts.mmdit,
            parts.vae,
            parts.text,
            shift=parts.shift,
            t5_length=settings.t5_length or told.get("t5_length", T5_LENGTH),
            preview_map=published().to(device) if card.variant in VARIANTS else fit_to(parts.vae),
        )
        parts.text.cache.max_bytes = settings.embedding_cache_mb * 2**20
        pace = warm_up(pipeline, card)
        log.info("fingerprint", model=source.name, **fingerprint.parts(pipeline, card.revision))
        return Model(
            card, pipeline, time.perf_counter() - started, fingerprint.fingerprint(pipeline, card.revision), pace
        )

    def _fp8(self, source: ModelSource, device: torch.device) -> bool:
        """As the setting says, where the device multiplies fp8 matrices."""
        if not self._settings.fp8(source.name):
            return False
        dtype = pick_dtype(self._settings.dtype, device)
        if device.type == "cuda" and has_fp8(device) and dtype == torch.bfloat16:
            return True
        log.warning(
            "fp8 is for GPUs from Ada and Hopper on, beside bf16: it is left out",
            model=source.name, device=str(device), dtype=str(dtype),
        )  # fmt: skip
        return False

    def _place_encoders(self, source: ModelSource, device: torch.device, dtype: torch.dtype) -> Encoders:
        """As the setting says; `auto` as this model and all of the settings need it. A CPU has one place only."""
        said = self._settings.text_encoders
        if device.type != "cuda":
            return "gpu"
        if said != "auto":
            return said
        weights, shared = 0, dict[str, int]()
        for one in dict.fromkeys((source, *self._settings.models)):
            try:
                found = footprint(one.path, dtype, load_t5=self._settings.t5, fp8=self._fp8(one, device))
            except CheckpointError:
                continue  # said when it is loaded
            weights += found.pop(MMDIT)
            shared |= {part: max(size, shared.get(part, 0)) for part, size in found.items()}
        encoders = sum(shared.pop(part, 0) for part in TEXT_PARTS)
        return choose_encoders(weights + sum(shared.values()), encoders, self._free(device))


def advice(error: NoRoom, fp8: int) -> str:
    """What would help, with the bytes that would be needed then. fp8: bytes of the MMDiT in that precision."""
    needs, options = error.needs, dict[str, int]()
    whole = sum(needs.values())
    if T5 in needs:
        options["DARKROOM_T5=no"] = whole - needs[T5]
    if error.device.type == "cuda" and (texts := sum(needs.get(part, 0) for part in TEXT_PARTS)):
        options["DARKROOM_TEXT_ENCODERS=offload"] = whole - texts
    if error.device.type == "cuda" and fp8 < needs.get(MMDIT, 0):
        options["DARKROOM_PRECISION=fp8"] = whole - needs[MMDIT] + fp8
    fitting = {setting: size for setting, size in options.items() if size <= error.free}
    told = [f"with {setting} it would need {gigabytes(size)}" for setting, size in fitting.items()]
    if options and not fitting:
        setting, size = min(options.items(), key=lambda option: option[1])
        told = [f"even with {setting} it would need {gigabytes(size)}"]
    return "; ".join(["name fewer models in DARKROOM_MODELS", *told])


WARM_SIDES = (512, 768, 1024)
"""Squares for which a GPU is made ready, beside the model's default size."""


def warm_up(pipeline: Pipeline, card: ModelCard) -> dict[str, float]:
    """Pictures of one step: kernels are chosen, CUDA graphs recorded and memory reserved before anyone waits.

    returns : seconds that a token took at the default size, by stage
    """
    pipeline.prepare()
    d, limits = card.defaults, card.limits
    sizes = [(d.width, d.height)]
    if pipeline.device.type == "cuda":
        squares = [(side, side) for side in WARM_SIDES if side <= limits.max_side and (side, side) not in sizes]
        # The first of a size runs plainly, the second records, the third is as fast as all that come. The default last.
        sizes = [size for size in (*squares, *sizes) for _ in range(3)]
    pace: dict[str, float] = {}
    for seed, (width, height) in enumerate(sizes):
        params = GenerationParams(
            prompt=f"warm up {seed}",
            negative_prompt=f"not {seed}" if seed % 2 else "",  # two new texts, or one beside the one of everybody
            width=width,
            height=height,
            steps=1,
            guidance_scale=d.guidance_scale,
            seed=seed,
        )
        try:
            pace |= _paced(pipeline, params)
        except torch.OutOfMemoryError:
            # A card may be large enough for smaller pictures; who asks for one of these is told.
            log.warning("no room for a picture of this size", width=width, height=height)
            torch.cuda.empty_cache()
    return pace


def _paced(pipeline: Pipeline, params: GenerationParams) -> dict[str, float]:
    pace: dict[str, float] = {}
    last = time.perf_counter()

    def did(work: Work) -> None:
        nonlocal last
        if pipeline.device.type == "cuda":
            torch.cuda.synchronize(pipeline.device)
        now = time.perf_counter()
        pace[work.stage], last = (now - last) / max(1, work.tokens), now

    run(generate(params, pipeline.shift), pipeline, did)
    return pace


def card_of(source: ModelSource, settings: WorkerSettings) -> ModelCard:
    """The card that a worker with these settings would publish: from headers and config files, on any machine.

    raises CheckpointError : what is wrong with the files, as far as these show it
    """
    about = outline(source.path, load_t5=settings.t5, variant=source.variant)
    return make_card(source, about, card_at(source.path))


def make_card(source: ModelSource, about: Outline, told: dict[str, Any]) -> ModelCard:
    """The card of a model: what its own `darkroom.json` says, else what its variant's publisher recommends."""
    known = VARIANTS.get(about.variant)
    if known is None and "defaults" not in told:
        message = f"{source.path} is none of the published variants and has no darkroom.json with its defaults"
        raise CheckpointError(message)
    grid_side = about.mmdit_config.pos_embed_grid * about.mmdit_config.patch * 8
    limits: dict[str, Any] = {"max_side": min(grid_side, known.max_side if known else grid_side)}
    defaults = {"steps": known.steps, "guidance_scale": known.guidance_scale, "sampler": known.sampler} if known else {}
    try:
        card = ModelCard(
            name=source.name,
            description=told.get("description") or (known.title if known else source.name),
            variant=about.variant,
            revision=about.revision,
            parameters=about.parameters,
            defaults=Defaults(**(defaults | told.get("defaults", {}))),
            limits=Limits(**(limits | told.get("limits", {}))),
            negative_prompt=told.get("negative_prompt", known.guided if known else True),
            aliases=_aliases(told),
            trained_pixels=told.get("trained_pixels", TRAINED_PIXELS.get(about.variant)),
        )
        wrong = _outside(card.defaults, card.limits)
    except TypeError as error:  # an unknown or missing name, or no number where one belongs
        raise CheckpointError(f"{source.path / CARD} has wrong defaults or limits: {error}") from error
    if wrong:
        raise CheckpointError(f"{source.path}: the default {wrong} is outside the model's own limits {card.limits}")
    return card


def _aliases(told: dict[str, Any]) -> tuple[str, ...]:
    aliases = told.get("aliases", [])
    if not isinstance(aliases, list) or not all(isinstance(alias, str) and alias for alias in aliases):
        raise CheckpointError(f"aliases in {CARD} is {aliases!r}; allowed: a list of names")
    return tuple(aliases)


def _outside(defaults: Defaults, limits: Limits) -> str:
    """What of the defaults the limits forbid: nobody could leave it out of a request."""
    width, height = defaults.width, defaults.height
    if not limits.allows(width, height):
        return f"size {width}x{height}"
    if not 1 <= defaults.steps <= limits.max_steps:
        return f"steps {defaults.steps}"
    if not 0 <= defaults.guidance_scale <= limits.max_guidance_scale:
        return f"guidance_scale {defaults.guidance_scale}"
    return "" if defaults.sampler in SAMPLERS else f"sampler {defaults.sampler!r}"
