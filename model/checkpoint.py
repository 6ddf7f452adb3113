"""Published weights to a pipeline's parts: strict, and straight to the device.

Two layouts, told apart by what is there:

- diffusers: a folder with model_index.json;
- Stability's: a single file (or a folder with one), with clip_l, clip_g and t5xxl files beside it, in text_encoders/ or
  inside it, and the tokenizers' folders beside it.

What is wrong with the files is a CheckpointError. Names and shapes are checked before any weights are read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

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

from model.bundle import TOKENIZERS, export_diffusers
from model.config import VARIANTS, MMDiTConfig, VAEConfig
from model.keys import Rule, clip_name, mmdit_rules, original, t5_name, vae_rules
from model.layouts import Sources, find
from model.mmdit import MMDiT
from model.text import TextEncoders
from model.vae import VAE
from model.weights import CheckpointError, Weights

__all__ = ["CheckpointError", "Components", "export_diffusers", "load_components"]

OTHER = "other"
"""The variant of an MMDiT that is none of the published ones."""

PROJECTION = "text_projection.weight"

N = TypeVar("N", bound=nn.Module)


@dataclass(frozen=True, eq=False)
class Components:
    """A loaded checkpoint."""

    mmdit: MMDiT
    vae: VAE
    text: TextEncoders
    mmdit_config: MMDiTConfig
    vae_config: VAEConfig
    variant: str  # large | large-turbo | medium | other
    revision: str  # changes when the files do
    shift: float  # of the timesteps


def load_components(
    path: Path,
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    tokenizers: Path | None = None,
    load_t5: bool = True,
    variant: str | None = None,
) -> Components:
    """Load a checkpoint of either layout.

    path : a diffusers folder, Stability's single file, or a folder with one
    dtype : of every weight (T5's `wo` stays fp32 where this is fp16, which it overflows)
    tokenizers : the folder of tokenizer/, tokenizer_2/ and tokenizer_3/, if they are not beside the weights
    load_t5 : False leaves T5 out; its part of the context is then zeros
    variant : what the operator says this is. Turbo has Large's shapes: only this tells them apart.
    raises CheckpointError : names the file or tensor, what was found and what is expected; nothing stays loaded
    """
    sources = find(Path(path), load_t5)
    name = variant_of(sources.mmdit_config, variant)
    _check_widths(sources)
    tokens = _tokenizers(tokenizers or sources.tokenizers, with_t5=sources.t5 is not None)
    loader = _Loader(torch.device(device), dtype, sources.original)
    mmdit = loader.net(lambda: MMDiT(sources.mmdit_config), sources.mmdit, mmdit_rules(sources.mmdit_config))
    vae = loader.net(lambda: VAE(sources.vae_config), sources.vae, vae_rules(sources.vae_config))
    clip_l = loader.clip(lambda: CLIPTextModelWithProjection(sources.clip_l_config), sources.clip_l, bare=True)
    clip_g = loader.clip(lambda: CLIPTextModelWithProjection(sources.clip_g_config), sources.clip_g)
    t5 = None
    if sources.t5 is not None and (t5_config := sources.t5_config) is not None:
        t5 = loader.t5(lambda: T5EncoderModel(t5_config), sources.t5)
    return Components(
        mmdit=mmdit,
        vae=vae,
        text=TextEncoders(clip_l, clip_g, t5, tokens, sources.mmdit_config.context_dim),
        mmdit_config=sources.mmdit_config,
        vae_config=sources.vae_config,
        variant=name,
        revision=_revision(sources),
        shift=sources.shift,
    )


def variant_of(config: MMDiTConfig, said: str | None = None) -> str:
    """The published variant with this network, or what the operator says if that agrees with it."""
    if said is None:
        return next((name for name, spec in VARIANTS.items() if spec.mmdit == config), OTHER)
    if said != OTHER and said not in VARIANTS:
        raise CheckpointError(f"variant is {said!r}, expected one of {', '.join((*VARIANTS, OTHER))}")
    if said != OTHER and VARIANTS[said].mmdit != config:
        raise CheckpointError(f"the files hold no {said}: found {config}, expected {VARIANTS[said].mmdit}")
    return said


class _Loader:
    """Fills nets that were built without memory, tensor by tensor, on the device."""

    def __init__(self, device: torch.device, dtype: torch.dtype, originals: bool) -> None:
        self.device, self.dtype, self.originals = device, dtype, originals

    def net(self, build: Callable[[], N], weights: Weights, rules: tuple[Rule, ...]) -> N:
        """Ours: each tensor is gathered from its sources."""
        net = _on_meta(build, weights)
        shapes = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
        if self.originals:
            rules = original(rules)
        weights.expect({source: r.source_shape(shapes[r.name]) for r in rules for source in r.sources})
        state = {rule.name: rule.gather([self._read(weights, s) for s in rule.sources]) for rule in rules}
        return _assigned(net, state)

    def clip(self, build: Callable[[], N], weights: Weights, bare: bool = False) -> N:
        """A CLIP text tower; `bare`: one whose file may lack the projection, which is then the identity."""
        given = {}
        if bare and PROJECTION not in weights.entries:
            width = weights.shapes.get("final_layer_norm.bias", (0,))[0]
            given[PROJECTION] = torch.eye(width, dtype=self.dtype, device=self.device)
        return self._text(_on_meta(build, weights), weights, clip_name, given)

    def t5(self, build: Callable[[], N], weights: Weights) -> N:
        """A T5 encoder."""
        return self._text(_on_meta(build, weights), weights, t5_name, {})

    def _text(self, net: N, weights: Weights, rename: Callable[[str], str], given: Mapping[str, Tensor]) -> N:
        shapes = {rename(name): tuple(tensor.shape) for name, tensor in net.state_dict().items()}
        weights.expect({name: shape for name, shape in shapes.items() if name not in given})
        read = {name: given[name] if name in given else self._read(weights, name) for name in shapes}
        # One Parameter for both names of T5's embedding keeps them one tensor.
        parameters = {name: nn.Parameter(tensor, requires_grad=False) for name, tensor in read.items()}
        return _assigned(net, {name: parameters[rename(name)] for name in net.state_dict()})

    def _read(self, weights: Weights, name: str) -> Tensor:
        overflows = self.dtype == torch.float16 and name.endswith("DenseReluDense.wo.weight")
        return weights.read(name, self.device, torch.float32 if overflows else self.dtype)


def _on_meta(build: Callable[[], N], weights: Weights) -> N:
    try:
        with torch.device("meta"):
            return build()
    except Exception as error:  # configs that no net can have; torch and transformers complain in many types
        raise CheckpointError(f"{weights.where}: no such network can be built: {error}") from error


def _assigned(net: N, state: Mapping[str, Tensor]) -> N:
    """The net with these tensors as its own, ready to run."""
    net.load_state_dict(state, strict=True, assign=True)
    for name, buffer in net.named_buffers():
        if buffer.is_meta and name.endswith("position_ids"):  # in no file: CLIP of some versions of transformers
            device = next(iter(state.values())).device
            owner = net.get_submodule(name.rpartition(".")[0])
            owner.position_ids = torch.arange(buffer.shape[-1], device=device).expand(buffer.shape)
    unfilled = [name for name, t in (*net.named_parameters(), *net.named_buffers()) if t.is_meta]
    if unfilled:
        raise CheckpointError(f"tensor {unfilled[0]} of {type(net).__name__} has no source")
    return net.requires_grad_(False).eval()


def _check_widths(sources: Sources) -> None:
    """The parts must fit together."""
    mmdit, vae, clips = sources.mmdit_config, sources.vae_config, (sources.clip_l_config, sources.clip_g_config)
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


def _tokenizers(folder: Path, with_t5: bool) -> list[PreTrainedTokenizerBase | None]:
    kinds = (CLIPTokenizer, CLIPTokenizer, T5Tokenizer if with_t5 else None)
    return [
        None if kind is None else _tokenizer(folder / name, kind) for name, kind in zip(TOKENIZERS, kinds, strict=True)
    ]


def _tokenizer(folder: Path, default: type[PreTrainedTokenizerBase]) -> PreTrainedTokenizerBase:
    if not folder.is_dir():
        raise CheckpointError(f"tokenizer folder {folder} is missing: say where {', '.join(TOKENIZERS)} are")
    kind = AutoTokenizer if (folder / "tokenizer_config.json").is_file() else default
    try:
        tokenizer: PreTrainedTokenizerBase = kind.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise CheckpointError(f"{folder} is not a tokenizer: {error}") from error
    if tokenizer.eos_token_id is None:
        raise CheckpointError(f"{folder}: the tokenizer has no end token")
    return tokenizer


def _revision(sources: Sources) -> str:
    """Twelve hex digits of the weights files' fingerprints and of what the config files say."""
    digest = hashlib.sha256(repr((sources.mmdit_config, sources.vae_config, sources.shift)).encode())
    for fingerprint in sorted(file.fingerprint() for file in sources.files):
        digest.update(fingerprint)
    return digest.hexdigest()[:12]
