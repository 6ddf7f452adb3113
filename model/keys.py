"""What each tensor of our nets is called in the diffusers layout, and how to turn one into the other.

Our own names are Stability's original ones, so that layout needs no table. One table a net, for loading and exporting.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from model.config import MMDiTConfig, VAEConfig

Shape = tuple[int, ...]
Op = Literal["same", "stack", "swap", "squeeze"]


@dataclass(frozen=True)
class Rule:
    """One tensor of ours and where a layout keeps it. Every op can be undone.

    - same: one source, as it is.
    - stack: the sources are the equal row blocks of ours, in order (q, k, v -> qkv).
    - swap: the source's halves of rows are the other way round (shift, scale <-> scale, shift).
    - squeeze: the source is a linear's (out, in), ours a 1x1 convolution's (out, in, 1, 1).
    """

    name: str
    sources: tuple[str, ...]
    op: Op = "same"

    def source_shape(self, shape: Shape) -> Shape:
        """The shape of each source of a tensor of ours with this shape."""
        if self.op == "stack":
            return (shape[0] // len(self.sources), *shape[1:])
        return shape[:-2] if self.op == "squeeze" else shape

    def gather(self, sources: Sequence[Tensor]) -> Tensor:
        """Our tensor, of its sources."""
        if self.op == "stack":
            return torch.cat(list(sources))
        if self.op == "swap":
            return torch.cat(sources[0].chunk(2)[::-1])
        return sources[0][..., None, None] if self.op == "squeeze" else sources[0]

    def places(self, tensor: Tensor) -> Sequence[Tensor] | None:
        """The parts of our tensor that the sources fill as they are, in order; None: no such parts, see `gather`."""
        if self.op == "swap":
            return None
        return tensor.chunk(len(self.sources)) if self.op == "stack" else [tensor]

    def scatter(self, tensor: Tensor) -> dict[str, Tensor]:
        """The sources, of our tensor: the inverse of `gather`."""
        if self.op == "stack":
            return dict(zip(self.sources, tensor.chunk(len(self.sources)), strict=True))
        if self.op == "swap":
            tensor = torch.cat(tensor.chunk(2)[::-1])
        return {self.sources[0]: tensor[..., 0, 0] if self.op == "squeeze" else tensor}


def original(rules: Sequence[Rule]) -> tuple[Rule, ...]:
    """The rules of Stability's own layout: every tensor under our name, as it is."""
    return tuple(Rule(rule.name, (rule.name,)) for rule in rules)


def mmdit_rules(config: MMDiTConfig) -> tuple[Rule, ...]:
    """Every tensor of an MMDiT and its keys in diffusers' SD3Transformer2DModel."""
    rules = [Rule("pos_embed", ("pos_embed.pos_embed",))]
    rules += _pair("x_embedder.proj", "pos_embed.proj")
    for ours, theirs in (("t_embedder", "timestep_embedder"), ("y_embedder", "text_embedder")):
        rules += _pair(f"{ours}.mlp.0", f"time_text_embed.{theirs}.linear_1")
        rules += _pair(f"{ours}.mlp.2", f"time_text_embed.{theirs}.linear_2")
    rules += _pair("context_embedder", "context_embedder")
    for block in range(config.depth):
        rules += _joint_block(config, block)
    rules += _pair("final_layer.linear", "proj_out")
    rules += _pair("final_layer.adaLN_modulation.1", "norm_out.linear", op="swap")
    return tuple(rules)


def _joint_block(config: MMDiTConfig, block: int) -> Iterator[Rule]:
    x, context = f"joint_blocks.{block}.x_block", f"joint_blocks.{block}.context_block"
    theirs = f"transformer_blocks.{block}"
    last = block == config.depth - 1
    # Only the 2-chunk modulations (this one of the last block, and final_layer's) are ordered differently.
    yield from _pair(f"{x}.adaLN_modulation.1", f"{theirs}.norm1.linear")
    yield from _pair(f"{context}.adaLN_modulation.1", f"{theirs}.norm1_context.linear", op="swap" if last else "same")
    yield from _attention(config, f"{x}.attn", f"{theirs}.attn", "to_{}", "norm_{}", "to_out.0")
    yield from _attention(
        config, f"{context}.attn", f"{theirs}.attn", "add_{}_proj", "norm_added_{}", None if last else "to_add_out"
    )
    if block in config.dual_blocks:
        yield from _attention(config, f"{x}.attn2", f"{theirs}.attn2", "to_{}", "norm_{}", "to_out.0")
    yield from _pair(f"{x}.mlp.fc1", f"{theirs}.ff.net.0.proj")
    yield from _pair(f"{x}.mlp.fc2", f"{theirs}.ff.net.2")
    if not last:
        yield from _pair(f"{context}.mlp.fc1", f"{theirs}.ff_context.net.0.proj")
        yield from _pair(f"{context}.mlp.fc2", f"{theirs}.ff_context.net.2")


def _attention(config: MMDiTConfig, ours: str, theirs: str, rows: str, norm: str, out: str | None) -> Iterator[Rule]:
    yield from _pair(f"{ours}.qkv", *(f"{theirs}.{rows.format(part)}" for part in "qkv"), op="stack")
    if config.qk_norm:
        for part in "qk":
            yield Rule(f"{ours}.ln_{part}.weight", (f"{theirs}.{norm.format(part)}.weight",))
    if out is not None:
        yield from _pair(f"{ours}.proj", f"{theirs}.{out}")


def vae_rules(config: VAEConfig) -> tuple[Rule, ...]:
    """Every tensor of a VAE and its keys in diffusers' AutoencoderKL (no quant convolutions)."""
    return (*_encoder(config), *_decoder(config))


def _encoder(config: VAEConfig) -> Iterator[Rule]:
    channels = config.channels
    yield from _pair("encoder.conv_in", "encoder.conv_in")
    for level, width in enumerate(channels):
        ours, theirs = f"encoder.down.{level}", f"encoder.down_blocks.{level}"
        narrower = channels[max(level - 1, 0)]
        for block in range(config.encoder_blocks):
            shortcut = block == 0 and narrower != width
            yield from _resnet(f"{ours}.block.{block}", f"{theirs}.resnets.{block}", shortcut)
        if level < len(channels) - 1:
            yield from _pair(f"{ours}.downsample.conv", f"{theirs}.downsamplers.0.conv")
    yield from _middle_and_end("encoder")


def _decoder(config: VAEConfig) -> Iterator[Rule]:
    channels, top = config.channels, len(config.channels) - 1
    yield from _pair("decoder.conv_in", "decoder.conv_in")
    for level, width in enumerate(channels):
        # diffusers counts the decoder's levels in the order they run, the original by resolution.
        ours, theirs = f"decoder.up.{level}", f"decoder.up_blocks.{top - level}"
        wider = channels[min(level + 1, top)]
        for block in range(config.encoder_blocks + 1):
            shortcut = block == 0 and wider != width
            yield from _resnet(f"{ours}.block.{block}", f"{theirs}.resnets.{block}", shortcut)
        if level > 0:
            yield from _pair(f"{ours}.upsample.conv", f"{theirs}.upsamplers.0.conv")
    yield from _middle_and_end("decoder")


def _middle_and_end(half: str) -> Iterator[Rule]:
    ours, theirs = f"{half}.mid", f"{half}.mid_block"
    yield from _resnet(f"{ours}.block_1", f"{theirs}.resnets.0", shortcut=False)
    yield from _pair(f"{ours}.attn_1.norm", f"{theirs}.attentions.0.group_norm")
    for name, linear in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0")):
        weight, bias = _pair(f"{ours}.attn_1.{name}", f"{theirs}.attentions.0.{linear}")
        yield Rule(weight.name, weight.sources, "squeeze")
        yield bias
    yield from _resnet(f"{ours}.block_2", f"{theirs}.resnets.1", shortcut=False)
    yield from _pair(f"{half}.norm_out", f"{half}.conv_norm_out")
    yield from _pair(f"{half}.conv_out", f"{half}.conv_out")


def _resnet(ours: str, theirs: str, shortcut: bool) -> Iterator[Rule]:
    for layer in ("norm1", "conv1", "norm2", "conv2"):
        yield from _pair(f"{ours}.{layer}", f"{theirs}.{layer}")
    if shortcut:
        yield from _pair(f"{ours}.nin_shortcut", f"{theirs}.conv_shortcut")


def _pair(ours: str, *theirs: str, op: Op = "same") -> Iterator[Rule]:
    for leaf in ("weight", "bias"):
        yield Rule(f"{ours}.{leaf}", tuple(f"{key}.{leaf}" for key in theirs), op)


def clip_name(key: str) -> str:
    """A CLIP tensor's name without the prefix that only some files and versions of transformers have."""
    return key.removeprefix("text_model.")


def t5_name(key: str) -> str:
    """A T5 tensor's name; the embedding has two."""
    return "shared.weight" if key == "encoder.embed_tokens.weight" else key
