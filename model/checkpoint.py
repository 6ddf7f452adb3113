"""Published weights to a pipeline's parts: strict, and straight to the device.

Two layouts and their variants, told apart by what is there:

- diffusers: a folder with model_index.json;
- Stability's: a single file (or a folder with one), with clip_l, clip_g and t5xxl files beside it, in text_encoders/ or
  inside it, and the tokenizers' folders beside it;
- a variant: a folder with a low-rank difference and a darkroom.json that names its base, of either layout.

What is wrong with the files is a CheckpointError. All names and shapes are checked before any weights are read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerBase,
    T5EncoderModel,
    T5Tokenizer,
)

from model.bundle import TOKENIZERS
from model.config import MOST_LAYERS, VARIANTS, MMDiTConfig
from model.device import on
from model.fp8 import SCALES, use_fp8
from model.kernels.elementwise import FP8, quantized
from model.keys import Rule, clip_name, mmdit_rules, original, t5_name, vae_rules
from model.layouts import Sources, find
from model.loading import Parcel, lanes_to, load
from model.lowrank import Difference
from model.memory import Encoders
from model.mmdit import MMDiT
from model.offload import offload
from model.room import check_room, free_bytes
from model.sampling import Shift
from model.shelf import Shelf
from model.text import TextEncoders
from model.vae import VAE
from model.weights import CheckpointError, Weights

OTHER = "other"
"""The variant of an MMDiT that is none of the published ones."""

PROJECTION = "text_projection.weight"

MMDIT, VAE_PART, CLIP_L, CLIP_G, T5 = "MMDiT", "VAE", "CLIP-L", "CLIP-G", "T5"
TEXT_PARTS = (CLIP_L, CLIP_G, T5)
HOST = torch.device("cpu")

N = TypeVar("N", bound=nn.Module)


@dataclass(frozen=True)
class Outline:
    """What the headers and config files of a checkpoint say of it."""

    mmdit_config: MMDiTConfig
    variant: str  # large | large-turbo | medium | other
    revision: str  # changes when the files do
    parameters: int  # of the MMDiT


@dataclass(frozen=True, eq=False)
class Components:
    """A loaded checkpoint."""

    mmdit: MMDiT
    vae: VAE
    text: TextEncoders
    variant: str  # large | large-turbo | medium | other
    revision: str  # changes when the files do
    shift: Shift  # of the timesteps

    @property
    def outline(self) -> Outline:
        """What `outline` says of the same files."""
        return Outline(self.mmdit.config, self.variant, self.revision, parameters(self.mmdit))


def load_components(
    path: Path,
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    tokenizers: Path | None = None,
    load_t5: bool = True,
    variant: str | None = None,
    shelf: Shelf | None = None,
    free: Callable[[torch.device], int | None] = free_bytes,
    encoders: Encoders = "gpu",
    host_dtype: torch.dtype = torch.float32,
    fp8: bool = False,
) -> Components:
    """Load a checkpoint of either layout, or a variant of one.

    path : a diffusers folder, Stability's single file, a folder with one, or a variant's folder
    dtype : of every weight (T5's `wo` stays fp32 where this is fp16, which it overflows)
    tokenizers : the folder of tokenizer/, tokenizer_2/ and tokenizer_3/ for weights that have none beside them
    load_t5 : False leaves T5 out; its part of the context is then zeros
    variant : what the operator says this is. Turbo has Large's shapes: only this tells them apart.
    shelf : of the models loaded before, on the same device and in the same dtype: what is the same is not read again
    free : the bytes that are free on a device
    encoders : where the text encoders live and compute; `gpu` is the device of all else, whatever it is
    host_dtype : of the encoders' weights where they compute on the CPU
    fp8 : whether the MMDiT's large matrices are kept in fp8, see model.fp8
    raises CheckpointError : names the file or tensor, what was found and what is expected; nothing stays loaded
    raises NoRoom : the weights do not fit; none was read
    """
    sources, shelf = find(Path(path), load_t5), shelf or Shelf()
    name = variant_of(sources.mmdit_config, variant)
    device = torch.device(device)
    plans = _plans(sources, fp8)
    beside = (sources.tokenizers / TOKENIZERS[0]).is_dir()
    place = sources.tokenizers if beside or tokenizers is None else tokenizers
    tokens = _tokenizers(place, sources)
    nets = {part: shelf.find(plan.net, plan.weights) for part, plan in plans.items() if part != MMDIT}
    missing = {part: plan for part, plan in plans.items() if nets.get(part) is None}
    homes = dict.fromkeys(plans, (device, dtype))
    if encoders != "gpu":
        homes |= {part: (HOST, host_dtype if encoders == "cpu" else dtype) for part in TEXT_PARTS if part in plans}
    _check_rooms(missing, homes, free)
    with on(device):
        for part, plan in missing.items():
            nets[part] = plan.filled(*homes[part], sources.difference if part == MMDIT else None)
    revision = sources.revision
    sources.require_unchanged()
    for part, plan in missing.items():
        if part in TEXT_PARTS and encoders == "offload":
            offload(plan.net, device)
        if part != MMDIT:
            shelf.put(plan.net, plan.weights)
    for file in sources.files:
        file.close()
    clip_l, clip_g, t5 = (cast(Any, nets.get(part)) for part in TEXT_PARTS)
    at = HOST if encoders == "cpu" else device
    text = TextEncoders(clip_l, clip_g, t5, tokens, sources.mmdit_config.context_dim, device=at, to=device)
    return Components(
        mmdit=cast(MMDiT, nets[MMDIT]),
        vae=cast(VAE, nets[VAE_PART]),
        text=shelf.text(text, place),
        variant=name,
        revision=revision,
        shift=sources.shift,
    )


def _check_rooms(
    missing: Mapping[str, _Plan[Any]],
    homes: Mapping[str, tuple[torch.device, torch.dtype]],
    free: Callable[[torch.device], int | None],
) -> None:
    """Refuse nets that do not fit where they are to be. NoRoom."""
    for where in dict.fromkeys(home for home, _ in homes.values()):
        here = {part: plan.nbytes(homes[part][1]) for part, plan in missing.items() if homes[part][0] == where}
        check_room(here, where, free(where))


def outline(path: Path, *, load_t5: bool = True, variant: str | None = None) -> Outline:
    """A checkpoint as its files describe it: no weights are read, and the names and shapes of its MMDiT are checked.

    Arguments and errors are those of `load_components`, for the same revision.
    """
    sources = find(Path(path), load_t5)
    name = variant_of(sources.mmdit_config, variant)
    _check_sizes(sources)
    return Outline(sources.mmdit_config, name, sources.revision, parameters(_mmdit_plan(sources).net))


def footprint(path: Path, dtype: torch.dtype, *, load_t5: bool = True, fp8: bool = False) -> dict[str, int]:
    """The bytes that each net of a checkpoint takes in this dtype, by its files' headers: MMDiT, VAE, CLIP-L, ...

    raises CheckpointError : as `load_components` does
    """
    return {part: plan.nbytes(dtype) for part, plan in _plans(find(Path(path), load_t5), fp8).items()}


def parameters(net: nn.Module) -> int:
    """How many numbers a network has learnt."""
    return sum(parameter.numel() for parameter in net.parameters())


def _plans(sources: Sources, fp8: bool) -> dict[str, _Plan[Any]]:
    """A plan for each net, all widths, names and shapes checked."""
    _check_sizes(sources)
    layout = original if sources.original else tuple
    clip_l, clip_g = sources.clip_l_config, sources.clip_g_config
    plans: dict[str, _Plan[Any]] = {
        MMDIT: _mmdit_plan(sources, fp8),
        VAE_PART: _plan(lambda: VAE(sources.vae_config), sources.vae, layout(vae_rules(sources.vae_config))),
        CLIP_L: _plan(lambda: CLIPTextModelWithProjection(clip_l), sources.clip_l, clip_name, PROJECTION),
        CLIP_G: _plan(lambda: CLIPTextModelWithProjection(clip_g), sources.clip_g, clip_name),
    }
    if sources.t5 is not None and (t5 := sources.t5_config) is not None:
        plans[T5] = _plan(lambda: T5EncoderModel(t5), sources.t5, t5_name)
    return plans


def _mmdit_plan(sources: Sources, fp8: bool = False) -> _Plan[MMDiT]:
    layout = original if sources.original else tuple
    plan = _plan(lambda: MMDiT(sources.mmdit_config), sources.mmdit, layout(mmdit_rules(sources.mmdit_config)))
    if fp8:
        use_fp8(plan.net)
    return plan


def variant_of(config: MMDiTConfig, said: str | None = None) -> str:
    """The published variant with this network, or what the operator says if that agrees with it."""
    if said is None:
        return next((name for name, spec in VARIANTS.items() if spec.mmdit == config), OTHER)
    if said != OTHER and said not in VARIANTS:
        raise CheckpointError(f"variant is {said!r}, expected one of {', '.join((*VARIANTS, OTHER))}")
    if said != OTHER and VARIANTS[said].mmdit != config:
        raise CheckpointError(f"the files hold no {said}: found {config}, expected {VARIANTS[said].mmdit}")
    return said


@dataclass(frozen=True)
class _Plan(Generic[N]):
    """A net built without memory, whose names and shapes agree with its files."""

    net: N
    weights: Weights
    rules: tuple[Rule, ...]
    identity: str | None  # a square tensor that the files may lack and lack

    def nbytes(self, dtype: torch.dtype) -> int:
        """What the net takes in memory."""
        state = self.net.state_dict()
        read = {rule.sources: state[rule.name] for rule in self.rules}.values()
        scales = sum(tensor.nbytes for name, tensor in state.items() if name.endswith(SCALES))
        return scales + sum(t.numel() * (t.itemsize if t.dtype is FP8 else dtype.itemsize) for t in read)

    def filled(self, device: torch.device, dtype: torch.dtype, difference: Difference | None = None) -> N:
        """The net with its weights on the device, ready to run; a difference is added to them in fp32."""
        parameters = {name for name, _ in self.net.named_parameters(remove_duplicate=False)}
        kinds = {name: tensor.dtype for name, tensor in self.net.state_dict().items()}
        state: dict[str, Tensor] = {}
        for rules in self._portions():
            straight = self._straight(rules, device, dtype, difference)
            read: dict[tuple[str, ...], Tensor] = {}  # by source: T5's embedding has two names and stays one tensor
            for rule in rules:
                if rule.sources not in read:
                    tensor = straight.pop(rule.sources, None)
                    if tensor is None:
                        tensor = self._changed(rule, device, dtype, difference)
                    if kinds[rule.name] is FP8:
                        tensor, state[rule.name.removesuffix("weight") + SCALES] = quantized(tensor)
                    kept = nn.Parameter(tensor, requires_grad=False) if rule.name in parameters else tensor
                    read[rule.sources] = kept
                state[rule.name] = read[rule.sources]
        if self.identity is not None:
            width = self.net.get_parameter(self.identity).shape[0]
            state[self.identity] = torch.eye(width, dtype=dtype, device=device)
        self.net.load_state_dict(state, strict=True, assign=True)
        _fill_position_ids(self.net, device)
        unfilled = [name for name, t in (*self.net.named_parameters(), *self.net.named_buffers()) if t.is_meta]
        if unfilled:
            raise CheckpointError(f"tensor {unfilled[0]} of {type(self.net).__name__} has no source")
        return self.net.requires_grad_(False).eval()

    def _portions(self) -> list[list[Rule]]:
        """What is read together: all, or where there is fp8 a block at a time: until it is fp8 it is twice as large."""
        if all(tensor.dtype is not FP8 for tensor in self.net.state_dict().values()):
            return [list(self.rules)]
        return [list(rules) for _, rules in groupby(self.rules, key=lambda rule: rule.name.split(".")[:2])]

    def _straight(
        self, rules: Sequence[Rule], device: torch.device, dtype: torch.dtype, difference: Difference | None
    ) -> dict[tuple[str, ...], Tensor]:
        """The tensors that are in the files as they are, read in parallel; by source. {} without lanes."""
        if not (lanes := lanes_to(device)):
            return {}
        state = self.net.state_dict()
        found: dict[tuple[str, ...], Tensor] = {}
        parcels: list[Parcel] = []
        for rule in rules:
            changed = difference is not None and difference.changes(rule.name)
            if rule.sources in found or changed or any(source in self.weights.scales for source in rule.sources):
                continue
            tensor = torch.empty(state[rule.name].shape, dtype=_dtype_of(rule.sources[0], dtype), device=device)
            if (places := rule.places(tensor)) is not None:
                found[rule.sources] = tensor
                entries = [self.weights.entries[source] for source in rule.sources]
                parcels += [Parcel(entry, place) for entry, place in zip(entries, places, strict=True)]
        load(parcels, lanes)
        return found

    def _changed(self, rule: Rule, device: torch.device, dtype: torch.dtype, difference: Difference | None) -> Tensor:
        """One tensor, by whatever way the files keep it."""
        change = difference.of(rule.name, device) if difference else None
        kind = dtype if change is None else torch.float32
        parts = [self.weights.read(source, device, _dtype_of(source, kind)) for source in rule.sources]
        return rule.gather(parts) if change is None else (rule.gather(parts) + change).to(dtype)


def _dtype_of(source: str, dtype: torch.dtype) -> torch.dtype:
    """What a tensor is kept in where its net is in `dtype`."""
    return torch.float32 if dtype == torch.float16 and source.endswith("DenseReluDense.wo.weight") else dtype


def _plan(
    build: Callable[[], N],
    weights: Weights,
    rules: Sequence[Rule] | Callable[[str], str],
    identity: str | None = None,
) -> _Plan[N]:
    """Check a net's files against it. `rules` are a table, or a function from our names to the files'."""
    try:
        with torch.device("meta"):
            net = build()
    except Exception as error:  # configs that no net can have; torch and transformers complain in many types
        raise CheckpointError(f"{weights.where}: no such network can be built: {error}") from error
    shapes = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
    table = [Rule(name, (rules(name),)) for name in shapes] if callable(rules) else rules
    square = identity is not None and len(set(shapes[identity])) == 1
    lacked = identity if square and identity not in weights.entries else None
    table = tuple(rule for rule in table if rule.name != lacked)
    weights.expect({source: rule.source_shape(shapes[rule.name]) for rule in table for source in rule.sources})
    return _Plan(net, weights, table, lacked)


def _fill_position_ids(net: nn.Module, device: torch.device) -> None:
    """CLIP's positions are in no file."""
    for name, buffer in list(net.named_buffers()):
        if buffer.is_meta and name.endswith("position_ids"):
            owner = net.get_submodule(name.rpartition(".")[0])
            owner.position_ids = torch.arange(buffer.shape[-1], device=device).expand(buffer.shape)


def _check_sizes(sources: Sources) -> None:
    """The parts must be small enough to be built, and fit each other and what is the same for every model."""
    mmdit, vae, clips = sources.mmdit_config, sources.vae_config, (sources.clip_l_config, sources.clip_g_config)
    layers = {VAE_PART: vae.encoder_blocks, T5: getattr(sources.t5_config, "num_layers", 1)}
    layers |= {part: clip.num_hidden_layers for part, clip in zip((CLIP_L, CLIP_G), clips, strict=True)}
    for part, count in layers.items():
        if not 1 <= count <= MOST_LAYERS:
            raise CheckpointError(f"the layers of the {part}: found {count}, expected from 1 to {MOST_LAYERS}")
    # Noise, the sides of pictures and the count of their tokens are made for these, whatever the model.
    for what, found, expected in (("MMDiT's patch size", mmdit.patch, 2), ("VAE's levels", len(vae.channels), 4)):
        if found != expected:
            raise CheckpointError(f"the {what}: found {found}, expected {expected}")
    pairs = [
        ("the VAE's latent channels", vae.latent_channels, mmdit.in_channels),
        ("the projections of CLIP-L and CLIP-G together", sum(c.projection_dim or 0 for c in clips), mmdit.pooled_dim),
        ("the width of T5", getattr(sources.t5_config, "d_model", mmdit.context_dim), mmdit.context_dim),
    ]
    for what, found, expected in pairs:
        if found != expected:
            raise CheckpointError(f"{what}: found {found}, expected {expected} for this MMDiT")
    width = sum(c.hidden_size or 0 for c in clips)
    if width > mmdit.context_dim:
        raise CheckpointError(f"CLIP-L and CLIP-G together are {width} wide, expected at most {mmdit.context_dim}")


def _tokenizers(folder: Path, sources: Sources) -> list[PreTrainedTokenizerBase | None]:
    """None for an encoder that is absent."""
    kinds = (CLIPTokenizer, CLIPTokenizer, T5Tokenizer)
    configs = (sources.clip_l_config, sources.clip_g_config, sources.t5_config)
    found: list[PreTrainedTokenizerBase | None] = []
    for name, kind, config in zip(TOKENIZERS, kinds, configs, strict=True):
        if config is None:
            found.append(None)
            continue
        tokenizer = _tokenizer(folder / name, kind)
        largest, known = max(tokenizer.get_vocab().values(), default=-1), config.vocab_size
        if largest >= known:
            raise CheckpointError(
                f"{folder / name}: the largest token id is {largest}, expected less than {known} for its encoder"
            )
        found.append(tokenizer)
    return found


def _tokenizer(folder: Path, default: type[PreTrainedTokenizerBase]) -> PreTrainedTokenizerBase:
    if not folder.is_dir():
        raise CheckpointError(f"tokenizer folder {folder} is missing: say where {', '.join(TOKENIZERS)} are")
    kind = AutoTokenizer if (folder / "tokenizer_config.json").is_file() else default
    try:
        tokenizer: PreTrainedTokenizerBase = kind.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:
        raise CheckpointError(f"{folder} is not a tokenizer: {error}") from error
    if tokenizer.eos_token_id is None:
        raise CheckpointError(f"{folder}: the tokenizer has no end token")
    return tokenizer
