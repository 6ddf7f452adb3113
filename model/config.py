"""The shapes of the networks, and the three published variants. Plain data; no torch."""

from __future__ import annotations

from dataclasses import dataclass

from model.params import Sampler

TIMESTEP_DIM = 256
"""Sinusoids that a timestep becomes."""

MOST_LAYERS = 256
"""Several times what any such net has: each layer costs time and memory before a name in the files is compared."""


@dataclass(frozen=True, kw_only=True)
class MMDiTConfig:
    """The multimodal diffusion transformer (arXiv:2403.03206); MMDiT-X when `dual_blocks` is not empty."""

    depth: int  # joint blocks; the last one drops its context stream
    hidden: int
    heads: int
    context_dim: int = 4096  # width of the text sequence
    pooled_dim: int = 2048  # width of the pooled text vector
    pos_embed_grid: int = 192  # side of the position table, in patches
    dual_blocks: tuple[int, ...] = ()  # blocks with a second self-attention over the image tokens
    qk_norm: bool = True  # RMSNorm per head on queries and keys
    in_channels: int = 16
    patch: int = 2
    mlp_ratio: int = 4

    def __post_init__(self) -> None:
        if not 1 <= self.depth <= MOST_LAYERS:
            raise ValueError(f"depth is {self.depth}, expected from 1 to {MOST_LAYERS}")
        if self.hidden % self.heads:
            raise ValueError(f"hidden {self.hidden} is not a multiple of heads {self.heads}")
        if any(not 0 <= block < self.depth for block in self.dual_blocks):
            raise ValueError(f"dual_blocks {self.dual_blocks} are not all within depth {self.depth}")

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden // self.heads


@dataclass(frozen=True, kw_only=True)
class VAEConfig:
    """The autoencoder: f8, 16 channels, no quant convolutions."""

    channels: tuple[int, ...] = (128, 256, 512, 512)
    encoder_blocks: int = 2  # residual blocks a level; the decoder has one more
    latent_channels: int = 16
    groups: int = 32  # of every GroupNorm
    scale: float = 1.5305
    shift: float = 0.0609


@dataclass(frozen=True, kw_only=True)
class VariantSpec:
    """A published model: its network, and what its publisher recommends."""

    name: str
    title: str
    mmdit: MMDiTConfig
    steps: int
    guidance_scale: float
    sampler: Sampler = "euler"
    guided: bool = True  # False: distilled to run without guidance, so a negative prompt has no effect
    max_side: int = 3072  # pixels


_LARGE = MMDiTConfig(depth=38, hidden=2432, heads=38)
_MEDIUM = MMDiTConfig(depth=24, hidden=1536, heads=24, pos_embed_grid=384, dual_blocks=tuple(range(13)))

VARIANTS: dict[str, VariantSpec] = {
    spec.name: spec
    for spec in (
        VariantSpec(name="large", title="Stable Diffusion 3.5 Large", mmdit=_LARGE, steps=28, guidance_scale=4.5),
        VariantSpec(
            name="large-turbo",
            title="Stable Diffusion 3.5 Large Turbo",
            mmdit=_LARGE,
            steps=4,
            guidance_scale=1.0,
            guided=False,
        ),
        VariantSpec(name="medium", title="Stable Diffusion 3.5 Medium", mmdit=_MEDIUM, steps=40, guidance_scale=4.5),
    )
}
