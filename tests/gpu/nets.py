"""What is built on a GPU without files: published sizes, or tiny ones of the same kinds, with random weights."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from model.bundle import export_diffusers
from model.config import VARIANTS, MMDiTConfig, VAEConfig
from model.pipeline import Pipeline
from model.text import T5_LENGTH, TextEncoders
from model.tuning import born, random_mmdit, randomized
from model.vae import VAE
from tests.model import tiny

Encoders = tuple[CLIPTextModelWithProjection, CLIPTextModelWithProjection, T5EncoderModel]


@dataclass(frozen=True)
class Size:
    """What is built."""

    name: str
    mmdit: MMDiTConfig
    vae: VAEConfig
    side: int  # pixels
    t5_length: int
    steps: int
    guidance_scale: float
    encoders: Callable[[], Encoders]


def full_encoders() -> Encoders:
    """CLIP-L, CLIP-G and T5-XXL v1.1 as published."""
    clip_l = CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768,
        vocab_size=49408, hidden_act="quick_gelu", eos_token_id=2,
    )  # fmt: skip
    clip_g = CLIPTextConfig(
        hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, projection_dim=1280,
        vocab_size=49408, hidden_act="gelu", eos_token_id=2,
    )  # fmt: skip
    t5 = T5Config(
        vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu"
    )
    return CLIPTextModelWithProjection(clip_l), CLIPTextModelWithProjection(clip_g), T5EncoderModel(t5)


def tiny_encoders() -> Encoders:
    """Those of the tests."""
    clip = tiny.clip_tokenizer("!")
    towers = (tiny.clip(clip, width, "gelu") for width in (tiny.CLIP_L_WIDTH, tiny.CLIP_G_WIDTH))
    return (*towers, tiny.t5(tiny.t5_tokenizer()))  # type: ignore[return-value]


def sized(name: str, small: bool) -> Size:
    """A published variant at 1024x1024, or a tiny net of its kind at 64x64."""
    spec = VARIANTS[name]
    if not small:
        return Size(name, spec.mmdit, VAEConfig(), 1024, T5_LENGTH, spec.steps, spec.guidance_scale, full_encoders)
    plain = MMDiTConfig(depth=3, hidden=128, heads=2, context_dim=256, pooled_dim=192, pos_embed_grid=24)
    net = tiny.MMDIT_X if spec.mmdit.dual_blocks else plain
    return Size(name, net, tiny.TINY_VAE, 64, 77, 4, spec.guidance_scale, tiny_encoders)


def random_parts(size: Size, device: torch.device, *, encoders: bool = True) -> tuple[VAE, TextEncoders]:
    """VAE and encoders in bf16, which models of one family share; tiny encoders where nothing is to be encoded."""
    with born(device, torch.bfloat16):
        vae = randomized(VAE(size.vae))
        towers: Any = [net.requires_grad_(False).eval() for net in (size.encoders if encoders else tiny_encoders)()]
    tokenizers = (tiny.clip_tokenizer("<|endoftext|>"), tiny.clip_tokenizer("!"), tiny.t5_tokenizer())
    return vae, TextEncoders(*towers, tokenizers, size.mmdit.context_dim)


def random_pipeline(size: Size, device: torch.device, *, encoders: bool = True) -> Pipeline:
    """One model in bf16; without `encoders` it can denoise and decode, but not read."""
    mmdit = random_mmdit(size.mmdit, device)
    return Pipeline(mmdit, *random_parts(size, device, encoders=encoders), t5_length=size.t5_length)


def written(pipeline: Pipeline, folder: Path) -> int:
    """The weights, without T5, as a diffusers folder; gives the bytes of its weights."""
    text = pipeline.text
    tokenizers = (text.clip_l_tokenizer.tokenizer, text.clip_g_tokenizer.tokenizer, None)
    without_t5 = TextEncoders(text.clip_l, text.clip_g, None, tokenizers, text.context_dim)
    export_diffusers(folder, pipeline.mmdit, pipeline.vae, without_t5)
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))


def released(device: torch.device) -> None:
    """Give back what nothing holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
