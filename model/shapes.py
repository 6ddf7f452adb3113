"""Sizes of nets told from the shapes of a file's tensors: Stability's layout has no config files."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

from model.config import MMDiTConfig, VAEConfig
from model.keys import Shape


def mmdit_config_of(shapes: Mapping[str, Shape]) -> MMDiTConfig:
    """The MMDiT whose tensors these are, by Stability's names; KeyError names what is missing."""
    hidden, channels, patch, _ = shapes["x_embedder.proj.weight"]
    depth = _count(shapes, "joint_blocks.{}.x_block.attn.qkv.weight")
    tokens = shapes["pos_embed"][1]
    head_dim = shapes.get("joint_blocks.0.x_block.attn.ln_q.weight", (64,))[0]
    return MMDiTConfig(
        depth=depth,
        hidden=hidden,
        heads=hidden // head_dim,
        context_dim=shapes["context_embedder.weight"][1],
        pooled_dim=shapes["y_embedder.mlp.0.weight"][1],
        pos_embed_grid=math.isqrt(tokens),
        dual_blocks=tuple(i for i in range(depth) if f"joint_blocks.{i}.x_block.attn2.qkv.weight" in shapes),
        qk_norm="joint_blocks.0.x_block.attn.ln_q.weight" in shapes,
        in_channels=channels,
        patch=patch,
        mlp_ratio=shapes["joint_blocks.0.x_block.mlp.fc1.weight"][0] // hidden,
    )


def vae_config_of(shapes: Mapping[str, Shape]) -> VAEConfig:
    """The VAE whose tensors these are, by Stability's names; scale and shift are the published ones."""
    levels = _count(shapes, "encoder.down.{}.block.0.conv1.weight")
    return VAEConfig(
        channels=tuple(shapes[f"encoder.down.{level}.block.0.conv1.weight"][0] for level in range(levels)),
        encoder_blocks=_count(shapes, "encoder.down.0.block.{}.conv1.weight"),
        latent_channels=shapes["decoder.conv_in.weight"][1],
    )


def clip_sizes_of(shapes: Mapping[str, Shape]) -> dict[str, int]:
    """The sizes of a CLIP text tower, as transformers' CLIPTextConfig names them; heads are 64 wide."""
    vocabulary, hidden = shapes["embeddings.token_embedding.weight"]
    return {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": shapes["encoder.layers.0.mlp.fc1.weight"][0],
        "max_position_embeddings": shapes["embeddings.position_embedding.weight"][0],
        "num_attention_heads": hidden // 64,
        "num_hidden_layers": _count(shapes, "encoder.layers.{}.layer_norm1.weight"),
        "projection_dim": shapes.get("text_projection.weight", (hidden,))[0],
    }


def t5_sizes_of(shapes: Mapping[str, Shape]) -> dict[str, int]:
    """The sizes of a T5 v1.1 encoder, as transformers' T5Config names them."""
    vocabulary, d_model = shapes["shared.weight"]
    first = "encoder.block.0.layer.{}"
    buckets, heads = shapes[first.format("0.SelfAttention.relative_attention_bias.weight")]
    return {
        "vocab_size": vocabulary,
        "d_model": d_model,
        "d_kv": shapes[first.format("0.SelfAttention.q.weight")][0] // heads,
        "d_ff": shapes[first.format("1.DenseReluDense.wi_0.weight")][0],
        "num_heads": heads,
        "num_layers": _count(shapes, "encoder.block.{}.layer.0.layer_norm.weight"),
        "relative_attention_num_buckets": buckets,
    }


def _count(shapes: Mapping[str, Shape], pattern: str) -> int:
    """How many of pattern 0, 1, 2, ... are there without a gap; KeyError if none is."""
    count = next(i for i in itertools.count() if pattern.format(i) not in shapes)
    if count == 0:
        raise KeyError(pattern.format(0))
    return count
