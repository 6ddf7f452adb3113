"""The diffusers folder layout: its config files, both ways, and writing a whole folder."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from reprlib import repr as short  # what is in a file may be long
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from model.config import MOST_LAYERS, MMDiTConfig, VAEConfig
from model.keys import Rule, mmdit_rules, vae_rules
from model.mmdit import MMDiT
from model.sampling import SHIFT, TRAIN_STEPS, Growth, Shift
from model.text import TextEncoders
from model.vae import VAE
from model.weights import CheckpointError

DIFFUSERS_VERSION = "0.32.0"
"""The oldest that reads every key written here."""

TRANSFORMER, VAE_FOLDER = "transformer", "vae"
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")  # CLIP-L, CLIP-G, T5
TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")
NET_STEM, TEXT_STEM = "diffusion_pytorch_model", "model"

OTHER_SCHEDULES = (
    "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "invert_sigmas", "stochastic_sampling"
)  # fmt: skip
UNSHIFTED = Shift(1.0)
LARGEST_LOG_SHIFT = 10.0
MOST_TOKENS = 16_384  # twice what two megapixels have
LARGEST_NUMBER = 1e9
JSON_LIMIT = 2**24  # bytes; indexes of shards are the longest, and take a hundredth

Json = dict[str, Any]


def read_json(path: Path) -> Json:
    """An object from a JSON file."""
    try:
        with path.open("rb") as file:
            text = file.read(JSON_LIMIT + 1)
        if len(text) > JSON_LIMIT:
            raise CheckpointError(f"{path} is too long, expected at most {JSON_LIMIT} bytes")
        data = json.loads(text.decode())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds a {type(data).__name__}, expected an object")
    return data


def mmdit_config_from(path: Path) -> MMDiTConfig:
    """Read transformer/config.json."""
    config = _Config(path)
    heads = config.number("num_attention_heads", 18)
    hidden = heads * config.number("attention_head_dim", 64)
    channels = config.number("in_channels", 16)
    qk_norm = config.only("qk_norm", None, "rms_norm", default=None)
    config.only("caption_projection_dim", hidden, default=1152)
    config.only("out_channels", channels, default=16)
    return config.build(
        MMDiTConfig,
        depth=config.number("num_layers", 18, most=MOST_LAYERS),
        hidden=hidden,
        heads=heads,
        context_dim=config.number("joint_attention_dim", 4096),
        pooled_dim=config.number("pooled_projection_dim", 2048),
        pos_embed_grid=config.number("pos_embed_max_size", 96),
        dual_blocks=tuple(config.numbers("dual_attention_layers", [])),
        qk_norm=qk_norm is not None,
        in_channels=channels,
        patch=config.number("patch_size", 2),
    )


def vae_config_from(path: Path) -> VAEConfig:
    """Read vae/config.json."""
    config = _Config(path)
    channels = tuple(config.numbers("block_out_channels", [64]))
    config.only("down_block_types", ["DownEncoderBlock2D"] * len(channels), default=["DownEncoderBlock2D"])
    config.only("up_block_types", ["UpDecoderBlock2D"] * len(channels), default=["UpDecoderBlock2D"])
    for key in ("use_quant_conv", "use_post_quant_conv"):
        config.only(key, False, default=True)
    config.only("mid_block_add_attention", True, default=True)
    config.only("act_fn", "silu", default="silu")
    scale = float(config.number("scaling_factor", 0.18215, kind=(int, float)))
    if scale <= 0:
        raise CheckpointError(f"{path}: scaling_factor is {scale:g}, expected more than 0")
    return config.build(
        VAEConfig,
        channels=channels,
        encoder_blocks=config.number("layers_per_block", 1, most=MOST_LAYERS),
        latent_channels=config.number("latent_channels", 4),
        groups=config.number("norm_num_groups", 32),
        scale=scale,
        shift=float(config.number("shift_factor", 0.0, kind=(int, float), null=0.0, signed=True)),
    )


def shift_from(path: Path, default: Shift = UNSHIFTED) -> Shift:
    """Read the timestep shift of scheduler/scheduler_config.json, or of a variant's card, whose base has `default`."""
    config = _Config(path)
    for key in OTHER_SCHEDULES:
        config.only(key, False, default=False)
    terminal = float(config.number("shift_terminal", default.terminal, kind=(int, float), null=0.0))
    if terminal >= 1:
        raise CheckpointError(f"{path}: shift_terminal is {terminal:g}, expected less than 1")
    usual = default.by
    growth, fixed = (usual, 1.0) if isinstance(usual, Growth) else (Growth(), usual)
    if config.only("use_dynamic_shifting", True, False, default=usual is growth and "shift" not in config.data):
        return Shift(_growth(config, growth), terminal)
    shift = float(config.number("shift", fixed, kind=(int, float)))
    if shift <= 0 or abs(math.log(shift)) > LARGEST_LOG_SHIFT:
        least, most = math.exp(-LARGEST_LOG_SHIFT), math.exp(LARGEST_LOG_SHIFT)
        raise CheckpointError(f"{path}: shift is {shift:g}, expected from {least:.2g} to {most:.2g}")
    return Shift(shift, terminal)


def _growth(config: _Config, usual: Growth) -> Growth:
    config.only("time_shift_type", "exponential", default="exponential")
    found = Growth(
        base_shift=float(config.number("base_shift", usual.base_shift, kind=(int, float), signed=True)),
        max_shift=float(config.number("max_shift", usual.max_shift, kind=(int, float), signed=True)),
        base_image_seq_len=config.number("base_image_seq_len", usual.base_image_seq_len),
        max_image_seq_len=config.number("max_image_seq_len", usual.max_image_seq_len),
    )
    if found.base_image_seq_len >= found.max_image_seq_len:
        raise CheckpointError(
            f"{config.path}: base_image_seq_len is {found.base_image_seq_len}, "
            f"expected less than max_image_seq_len, which is {found.max_image_seq_len}"
        )
    for tokens in (0, MOST_TOKENS):
        if abs(found.logarithm(tokens)) > LARGEST_LOG_SHIFT:
            raise CheckpointError(
                f"{config.path}: by base_shift and max_shift the shift's logarithm is {found.logarithm(tokens):g} "
                f"for {tokens} tokens, expected from -{LARGEST_LOG_SHIFT:g} to {LARGEST_LOG_SHIFT:g}"
            )
    return found


def shift_json(shift: Shift) -> Json:
    """The keys that `shift_from` reads."""
    by = {"use_dynamic_shifting": True, **asdict(shift.by)} if isinstance(shift.by, Growth) else {"shift": shift.by}
    return {**by, "shift_terminal": shift.terminal} if shift.terminal else by


class _Config:
    """One config.json of diffusers; a key that is absent has diffusers' own default."""

    def __init__(self, path: Path) -> None:
        self.path, self.data = path, read_json(path)

    def only(self, key: str, *allowed: object, default: object) -> Any:
        value = self.data.get(key, default)
        if value not in allowed:
            raise CheckpointError(f"{self.path}: {key} is {short(value)}, expected {' or '.join(map(repr, allowed))}")
        return value

    def number(
        self,
        key: str,
        default: Any,
        *,
        kind: type[int] | tuple[type[int], type[float]] = int,
        null: Any = None,
        signed: bool = False,
        most: float = LARGEST_NUMBER,
    ) -> Any:
        value: Any = self.data.get(key, default)
        if value is None and null is not None:
            return null
        least = -most if signed else 0
        if isinstance(value, bool) or not isinstance(value, kind) or not least <= value <= most:  # NaN is refused too
            expected = f"a {'whole ' if kind is int else ''}number from {least:g} to {most:g}"
            raise CheckpointError(f"{self.path}: {key} is {short(value)}, expected {expected}")
        return value

    def numbers(self, key: str, default: list[int]) -> list[int]:
        value = self.data.get(key, default)
        right = isinstance(value, list) and all(type(item) is int and 0 <= item <= LARGEST_NUMBER for item in value)
        if not right or len(value) > MOST_LAYERS:
            expected = f"a list of at most {MOST_LAYERS} whole numbers from 0 to {LARGEST_NUMBER:g}"
            raise CheckpointError(f"{self.path}: {key} is {short(value)}, expected {expected}")
        return value

    def build(self, kind: type, **values: Any) -> Any:
        try:
            return kind(**values)
        except (ValueError, ArithmeticError) as error:
            raise CheckpointError(f"{self.path}: no such network can be built: {error}") from error


def mmdit_json(config: MMDiTConfig, sample_size: int = 128) -> Json:
    """The contents of transformer/config.json; `sample_size` is the usual side, in latents."""
    if config.mlp_ratio != 4:
        raise ValueError(f"mlp_ratio is {config.mlp_ratio}; diffusers knows only 4")
    return {
        "_class_name": "SD3Transformer2DModel",
        "_diffusers_version": DIFFUSERS_VERSION,
        "attention_head_dim": config.head_dim,
        "caption_projection_dim": config.hidden,
        "dual_attention_layers": list(config.dual_blocks),
        "in_channels": config.in_channels,
        "joint_attention_dim": config.context_dim,
        "num_attention_heads": config.heads,
        "num_layers": config.depth,
        "out_channels": config.in_channels,
        "patch_size": config.patch,
        "pooled_projection_dim": config.pooled_dim,
        "pos_embed_max_size": config.pos_embed_grid,
        "qk_norm": "rms_norm" if config.qk_norm else None,
        "sample_size": sample_size,
    }


def vae_json(config: VAEConfig, sample_size: int = 1024) -> Json:
    """The contents of vae/config.json; `sample_size` is the usual side, in pixels."""
    levels = len(config.channels)
    return {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": DIFFUSERS_VERSION,
        "act_fn": "silu",
        "block_out_channels": list(config.channels),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "force_upcast": True,
        "in_channels": 3,
        "latent_channels": config.latent_channels,
        "layers_per_block": config.encoder_blocks,
        "mid_block_add_attention": True,
        "norm_num_groups": config.groups,
        "out_channels": 3,
        "sample_size": sample_size,
        "scaling_factor": config.scale,
        "shift_factor": config.shift,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "use_post_quant_conv": False,
        "use_quant_conv": False,
    }


def export_diffusers(
    folder: Path,
    mmdit: MMDiT,
    vae: VAE,
    text: TextEncoders,
    *,
    shift: Shift = SHIFT,
    max_shard_bytes: int = 5_000_000_000,
    dtype: torch.dtype | None = None,
    sample_side: int = 1024,
) -> None:
    """Write a pipeline as a folder that diffusers and we ourselves read.

    folder : new or empty
    shift : of the schedule
    max_shard_bytes : no weights file is larger, unless one tensor alone is
    dtype : what the weights are stored in; None keeps theirs
    sample_side : the usual picture side in pixels, for diffusers' defaults
    """
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty")
    files = _Shards(max_shard_bytes, dtype)
    latents = sample_side // 2 ** (len(vae.config.channels) - 1)
    _write_json(folder / TRANSFORMER / "config.json", mmdit_json(mmdit.config, latents))
    files.write(folder / TRANSFORMER, NET_STEM, _scattered(mmdit, mmdit_rules(mmdit.config)))
    _write_json(folder / VAE_FOLDER / "config.json", vae_json(vae.config, sample_side))
    files.write(folder / VAE_FOLDER, NET_STEM, _scattered(vae, vae_rules(vae.config)))
    index: Json = {"_class_name": "StableDiffusion3Pipeline", "_diffusers_version": DIFFUSERS_VERSION}
    index |= {TRANSFORMER: ["diffusers", "SD3Transformer2DModel"], VAE_FOLDER: ["diffusers", "AutoencoderKL"]}
    index |= _write_text(folder, text, files)
    index["scheduler"] = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    schedule = {"_class_name": index["scheduler"][1], "num_train_timesteps": TRAIN_STEPS, **shift_json(shift)}
    _write_json(folder / "scheduler" / "scheduler_config.json", schedule)
    _write_json(folder / "model_index.json", index | {"image_encoder": [None, None], "feature_extractor": [None, None]})


def _write_text(folder: Path, text: TextEncoders, files: _Shards) -> Json:
    """The encoders and tokenizers; gives their entries of model_index.json."""
    index: Json = {}
    encoders = (text.clip_l, text.clip_g, text.t5)
    wrappers = (text.clip_l_tokenizer, text.clip_g_tokenizer, text.t5_tokenizer)
    for name, tokenizer_name, encoder, wrapper in zip(TEXT_ENCODERS, TOKENIZERS, encoders, wrappers, strict=True):
        if encoder is None or wrapper is None:
            index |= {name: [None, None], tokenizer_name: [None, None]}
            continue
        files.write(folder / name, TEXT_STEM, iter(_untied(encoder).items()))
        config = copy.deepcopy(encoder.config)
        config.architectures, config.dtype = [type(encoder).__name__], files.dtype or encoder.dtype
        config.save_pretrained(folder / name)
        tokenizer: PreTrainedTokenizerBase = wrapper.tokenizer
        tokenizer.save_pretrained(folder / tokenizer_name)
        index |= {name: ["transformers", type(encoder).__name__]}
        index |= {tokenizer_name: ["transformers", type(tokenizer).__name__]}
    return index


def _scattered(net: torch.nn.Module, rules: tuple[Rule, ...]) -> Iterator[tuple[str, Tensor]]:
    state = net.state_dict()
    for rule in rules:
        yield from rule.scatter(state[rule.name]).items()


def _untied(net: torch.nn.Module) -> dict[str, Tensor]:
    """The state without second names of one tensor (T5's embedding)."""
    seen: dict[int, str] = {}
    state = net.state_dict(keep_vars=True)
    return {name: t for name, t in state.items() if seen.setdefault(id(t), name) == name}


class _Shards:
    """Writes tensors as safetensors files of bounded size, with an index if there are several."""

    def __init__(self, max_bytes: int, dtype: torch.dtype | None) -> None:
        self.max_bytes, self.dtype = max_bytes, dtype

    def write(self, folder: Path, stem: str, tensors: Iterator[tuple[str, Tensor]]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        parts: list[tuple[Path, list[str]]] = []
        total = 0
        for shard in self._filled(tensors):
            part = folder / f"{stem}.part{len(parts)}"
            save_file(shard, part, metadata={"format": "pt"})
            part.chmod(0o644)  # save_file leaves it to the owner alone
            parts.append((part, list(shard)))
            total += sum(tensor.nbytes for tensor in shard.values())
        weight_map: dict[str, str] = {}
        for i, (part, keys) in enumerate(parts):
            name = f"{stem}-{i + 1:05}-of-{len(parts):05}.safetensors" if len(parts) > 1 else f"{stem}.safetensors"
            part.rename(folder / name)
            weight_map |= dict.fromkeys(keys, name)
        if len(parts) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            _write_json(folder / f"{stem}.safetensors.index.json", index)

    def _filled(self, tensors: Iterator[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
        """Shards on the CPU, one at a time."""
        shard: dict[str, Tensor] = {}
        size = 0
        for name, tensor in tensors:
            stored = tensor.detach().to("cpu", self.dtype, copy=True).contiguous()  # rows of qkv share storage
            if shard and size + stored.nbytes > self.max_bytes - _header_room(shard):
                yield shard
                shard, size = {}, 0
            shard[name] = stored
            size += stored.nbytes
        yield shard


def _header_room(shard: Mapping[str, Tensor]) -> int:
    """Bytes enough for the header of a shard with one more tensor."""
    return 256 * (len(shard) + 2)


def _write_json(path: Path, data: Json) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", "utf-8")
