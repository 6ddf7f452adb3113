"""Which files hold what, in either published layout. Headers and config files only; no weights are read here."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeVar

from transformers import CLIPTextConfig, T5Config

from model import bundle
from model.bundle import NET_STEM, TEXT_ENCODERS, TEXT_STEM, TRANSFORMER, VAE_FOLDER, read_json
from model.card import CARD, Variant, variant_at
from model.config import MMDiTConfig, VAEConfig
from model.keys import Shape, clip_name, t5_name
from model.lowrank import Difference
from model.sampling import SHIFT, Shift
from model.shapes import clip_sizes_of, mmdit_config_of, t5_sizes_of, vae_config_of
from model.weights import PICKLES, CheckpointError, Entry, WeightFile, Weights, tensors_of, under

IGNORED = ("position_ids", "logit_scale", "betas", "alphas_cumprod", "denoiser.sigmas", "model_sampling.sigmas")
"""Endings of names that some files carry and nothing needs."""

MMDIT_PREFIXES = ("model.diffusion_model.", "diffusion_model.")
VAE_PREFIXES = ("first_stage_model.", "vae.")
CLIP_L_STEM, CLIP_G_STEM, T5_STEM = "clip_l", "clip_g", "t5xxl"
FETCHED = Path(".fetch", "record.json")
"""What `darkroom fetch` (app/weights.py) says of a folder: `written` is null unless all files are of one revision."""

TEXT_PREFIX = "text_encoders.{}."
MMDIT_KEY = "x_embedder.proj.weight"

# What shapes cannot say. The end token is found as the largest id (transformers' meaning of 2), as published.
CLIP_L_REST: dict[str, Any] = {
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "eos_token_id": 2,
    "bos_token_id": None,
    "pad_token_id": None,
}
CLIP_G_REST: dict[str, Any] = CLIP_L_REST | {"hidden_act": "gelu"}
T5_REST: dict[str, Any] = {"feed_forward_proj": "gated-gelu", "relative_attention_max_distance": 128}

C = TypeVar("C")


@dataclass(frozen=True)
class Fetched:
    """What `darkroom fetch` said of a folder."""

    folder: Path
    record: Mapping[str, Any] | None  # None: nothing

    @classmethod
    def of(cls, folder: Path) -> Self:
        """Of now. CheckpointError unless the folder is complete, or was filled by somebody else."""
        record = read_json(folder / FETCHED) if (folder / FETCHED).is_file() else None
        if record is not None and record.get("written") is None:
            raise CheckpointError(
                f"{folder} is not complete: `darkroom fetch` is at work there, or was cut off and may have left files"
                " of two revisions; the same `darkroom fetch` goes on from there"
            )
        return cls(folder, record)


@dataclass(frozen=True)
class Sources:
    """Where everything is."""

    mmdit: Weights
    mmdit_config: MMDiTConfig
    vae: Weights
    vae_config: VAEConfig
    clip_l: Weights
    clip_l_config: CLIPTextConfig
    clip_g: Weights
    clip_g_config: CLIPTextConfig
    t5: Weights | None
    t5_config: T5Config | None
    tokenizers: Path  # the folder of tokenizer/, tokenizer_2/ and tokenizer_3/
    original: bool  # Stability's names; else diffusers'
    shift: Shift = SHIFT
    difference: Difference | None = None  # from the MMDiT of these files
    fetched: Fetched | None = None  # what was said of the folder when they were found

    @property
    def files(self) -> list[WeightFile]:
        """Every weights file."""
        nets = [net for net in (self.mmdit, self.vae, self.clip_l, self.clip_g, self.t5) if net is not None]
        files = {file.path: file for net in nets for file in net.files}
        return [*files.values(), *([self.difference.file] if self.difference else [])]

    @property
    def revision(self) -> str:
        """Changes when a weights file does, or the MMDiT's config, the VAE's or the shift."""
        return _digest((self.mmdit_config, self.vae_config, self.shift), self.files)

    @property
    def base_revision(self) -> str:
        """Changes when the MMDiT that a variant may differ from does."""
        return _digest((self.mmdit_config,), self.mmdit.files)

    def require_unchanged(self) -> None:
        """Returns if no fetch has put other files in the place of these since they were found. CheckpointError."""
        if self.fetched and Fetched.of(self.fetched.folder) != self.fetched:
            raise CheckpointError(
                f"{self.fetched.folder} was fetched anew while it was read; the next start loads that"
            )


def _digest(said: tuple[object, ...], files: Iterable[WeightFile]) -> str:
    """Twelve hex digits of the weights files' fingerprints and of what the config files say."""
    digest = hashlib.sha256(repr(said).encode())
    for fingerprint in sorted(file.fingerprint() for file in files):
        digest.update(fingerprint)
    return digest.hexdigest()[:12]


def find(path: Path, load_t5: bool = True) -> Sources:
    """The parts of a checkpoint: a diffusers folder, Stability's single file, a folder with one, or a variant's."""
    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    if (variant := variant_at(path)) is not None:
        return _differing(variant, find(variant.base, load_t5))
    fetched = Fetched.of(path)
    found = _diffusers if (path / "model_index.json").is_file() else _original
    return replace(found(path, load_t5), fetched=fetched)


def _differing(variant: Variant, base: Sources) -> Sources:
    """The parts of a variant."""
    if variant.base_revision not in (None, base.base_revision):
        raise CheckpointError(
            f"{variant.folder} is a difference from revision {variant.base_revision}, "
            f"but {variant.base} is {base.base_revision}"
        )
    difference = Difference(WeightFile(variant.file), base.mmdit_config)
    return replace(base, difference=difference, shift=bundle.shift_from(variant.folder / CARD, base.shift))


def _diffusers(folder: Path, load_t5: bool) -> Sources:
    index = read_json(folder / "model_index.json")
    kind = str(index.get("_class_name"))
    if not kind.startswith("StableDiffusion3"):
        raise CheckpointError(f"{folder / 'model_index.json'} is for a {kind}, expected StableDiffusion3Pipeline")
    l_folder, g_folder, t5_folder = (folder / name for name in TEXT_ENCODERS)
    has_t5 = load_t5 and index.get(t5_folder.name) not in (None, [None, None])
    return Sources(
        mmdit=Weights(_kept(_folder_tensors(folder / TRANSFORMER, NET_STEM)), folder / TRANSFORMER),
        mmdit_config=bundle.mmdit_config_from(folder / TRANSFORMER / "config.json"),
        vae=Weights(_kept(_folder_tensors(folder / VAE_FOLDER, NET_STEM)), folder / VAE_FOLDER),
        vae_config=bundle.vae_config_from(folder / VAE_FOLDER / "config.json"),
        clip_l=Weights(_kept(_folder_tensors(l_folder, TEXT_STEM), clip_name), l_folder),
        clip_l_config=_text_config(CLIPTextConfig, l_folder),
        clip_g=Weights(_kept(_folder_tensors(g_folder, TEXT_STEM), clip_name), g_folder),
        clip_g_config=_text_config(CLIPTextConfig, g_folder),
        t5=Weights(_kept(_folder_tensors(t5_folder, TEXT_STEM), t5_name), t5_folder) if has_t5 else None,
        t5_config=_text_config(T5Config, t5_folder) if has_t5 else None,
        tokenizers=folder,
        original=False,
        shift=bundle.shift_from(folder / "scheduler" / "scheduler_config.json"),
    )


def _folder_tensors(folder: Path, stem: str) -> dict[str, Entry]:
    """The tensors of one net's folder: one file, or shards under an index."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is missing: a folder with {stem}.safetensors or its index is expected")
    named = [folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"]
    found = [path for path in named if path.is_file()][:1]
    found = found or sorted(folder.glob("*.safetensors.index*.json")) or sorted(folder.glob("*.safetensors"))
    if len(found) != 1:
        raise CheckpointError(f"{folder} holds {_listed(folder, found)}, expected {stem}.safetensors or its index")
    if found[0].suffix == ".json":
        return _sharded(found[0])
    return tensors_of([WeightFile(found[0])])


def _sharded(index: Path) -> dict[str, Entry]:
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(name, str) for name in where.values()):
        raise CheckpointError(f"{index} has no weight_map of tensors to files")
    for name in where.values():
        if Path(name).name != name:
            raise CheckpointError(f"{index} points to {name!r}, expected a file beside it")
        if not (index.parent / name).is_file():
            raise CheckpointError(f"{index.parent / name} is missing: {index.name} names it as a shard")
    entries = tensors_of([WeightFile(index.parent / name) for name in sorted(set(where.values()))])
    for key, name in where.items():
        if key not in entries or entries[key].file.path.name != name:
            raise CheckpointError(f"{index.parent / name}: tensor {key} is missing: {index.name} says it is there")
    return entries


def _text_config(kind: type[C], folder: Path) -> C:
    # Nothing here classifies; transformers would make a table of as many labels as the file says.
    data = {
        k: v for k, v in read_json(folder / "config.json").items() if k not in ("num_labels", "id2label", "label2id")
    }
    return _configured(lambda: kind.from_dict(data), folder / "config.json")  # type: ignore[attr-defined]


def _configured(make: Callable[[], C], where: object) -> C:
    """A config of transformers, whose complaints are of many types."""
    try:
        return make()
    except Exception as error:
        raise CheckpointError(f"{where}: {error}") from error


def _original(path: Path, load_t5: bool) -> Sources:
    folder = path if path.is_dir() else path.parent
    main = _main_file(folder) if path.is_dir() else WeightFile(path)
    entries = tensors_of([main])
    prefixed = under(entries, *MMDIT_PREFIXES)
    texts = (TEXT_PREFIX.format(stem) for stem in (CLIP_L_STEM, CLIP_G_STEM, T5_STEM))
    elsewhere = (*MMDIT_PREFIXES, *VAE_PREFIXES, *texts)
    bare = {name: entry for name, entry in entries.items() if not name.startswith(elsewhere)}
    mmdit = Weights(_kept(prefixed | bare), main.path)
    if MMDIT_KEY not in mmdit.entries:
        raise CheckpointError(f"{main.path} holds no MMDiT: tensor {MMDIT_KEY} is missing")
    vae = Weights(_kept(under(entries, *VAE_PREFIXES) or _vae_file(folder, main)), main.path)
    # A projection of CLIP-L, if its file brings one, was not used in training: the identity takes its place.
    clip_l = _text(entries, folder, CLIP_L_STEM, clip_name, ignored=(*IGNORED, "text_projection.weight"))
    clip_g = _text(entries, folder, CLIP_G_STEM, clip_name)
    t5 = _text(entries, folder, T5_STEM, t5_name) if load_t5 else None
    if clip_l is None or clip_g is None:
        missing = CLIP_L_STEM if clip_l is None else CLIP_G_STEM
        raise CheckpointError(
            f"{missing}.safetensors is missing: expected in {folder} or in {folder / 'text_encoders'}"
        )
    return Sources(
        mmdit=mmdit,
        mmdit_config=_inferred(mmdit_config_of, mmdit),
        vae=vae,
        vae_config=_inferred(vae_config_of, vae),
        clip_l=clip_l,
        clip_l_config=_inferred(partial(_clip_config, rest=CLIP_L_REST), clip_l),
        clip_g=clip_g,
        clip_g_config=_inferred(partial(_clip_config, rest=CLIP_G_REST), clip_g),
        t5=t5,
        t5_config=_inferred(_t5_config, t5) if t5 else None,
        tokenizers=folder,
        original=True,
    )


def _clip_config(shapes: Mapping[str, Shape], rest: Mapping[str, Any]) -> CLIPTextConfig:
    return CLIPTextConfig(**{**clip_sizes_of(shapes), **rest})


def _t5_config(shapes: Mapping[str, Shape]) -> T5Config:
    return T5Config(**{**t5_sizes_of(shapes), **T5_REST})


def _main_file(folder: Path) -> WeightFile:
    """The one file of a folder that holds an MMDiT."""
    files = sorted(folder.glob("*.safetensors"))
    names = (MMDIT_KEY, *(prefix + MMDIT_KEY for prefix in MMDIT_PREFIXES))
    mains = [file for file in map(WeightFile, files) if any(name in file.header for name in names)]
    if len(mains) != 1:
        held = _listed(folder, [main.path for main in mains])
        raise CheckpointError(f"{folder} holds {held}, expected model_index.json or one safetensors file with an MMDiT")
    return mains[0]


def _vae_file(folder: Path, main: WeightFile) -> dict[str, Entry]:
    files = [*folder.glob("*vae*.safetensors"), *folder.glob("vae/*.safetensors")]
    files = [path for path in files if path != main.path]
    if len(files) != 1:
        held = f"{main.path} holds no VAE, and {folder} holds {_listed(folder, files)}"
        raise CheckpointError(f"{held}, expected one *vae*.safetensors")
    entries = tensors_of([WeightFile(files[0])])
    return under(entries, *VAE_PREFIXES) or entries


def _text(
    entries: Mapping[str, Entry],
    folder: Path,
    stem: str,
    rename: Callable[[str], str],
    ignored: tuple[str, ...] = IGNORED,
) -> Weights | None:
    """A text encoder's tensors, from inside the main file or from a file of its own."""
    prefix = TEXT_PREFIX.format(stem)
    if inside := under(entries, prefix):
        named = {name.removeprefix("transformer."): entry for name, entry in inside.items()}
        return Weights(_kept(named, rename, ignored), prefix)
    file = _text_file(folder, stem)
    return None if file is None else Weights(_kept(tensors_of([WeightFile(file)]), rename, ignored), file)


def _text_file(folder: Path, stem: str) -> Path | None:
    """clip_l.safetensors, t5xxl_fp16.safetensors and the like; of several, the most precise."""
    files = [p for place in (folder, folder / "text_encoders") for p in sorted(place.glob(f"{stem}*.safetensors"))]

    def loss(path: Path) -> tuple[bool, bool, bool]:
        return path.stem != stem, "fp8" in path.stem, "fp8" in path.stem and "scaled" not in path.stem

    best = [path for path in files if loss(path) == min(map(loss, files))]
    if len(best) > 1:
        raise CheckpointError(f"both {best[0]} and {best[1]} could be the {stem} encoder, expected one")
    return best[0] if best else None


def _inferred(of: Callable[[Mapping[str, Shape]], C], weights: Weights) -> C:
    """A config from shapes, whatever these may be."""
    try:
        return of(weights.shapes)
    except KeyError as error:
        raise CheckpointError(f"{weights.where}: tensor {error.args[0]} is missing") from error
    except Exception as error:
        raise CheckpointError(f"{weights.where}: its tensors are of no known shape: {error}") from error


def _kept(
    entries: Mapping[str, Entry], rename: Callable[[str], str] = str, ignored: tuple[str, ...] = IGNORED
) -> dict[str, Entry]:
    """The tensors that are needed, under our names for the text encoders."""
    endings = tuple(f".{name}" for name in ignored)
    return {rename(name): entry for name, entry in entries.items() if not f".{name}".endswith(endings)}


def _listed(folder: Path, found: list[Path]) -> str:
    """What a folder holds of files that might be meant."""
    pickles = [path for path in sorted(folder.iterdir()) if path.suffix in PICKLES]
    if not found and pickles:
        return f"only pickles, which can run code when loaded ({pickles[0].name})"
    return ", ".join(path.name for path in found) or "no weights"
