"""The 16-channel autoencoder of SD3.5: f8, no quant convolutions. Parameter names are the published checkpoints'."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import VAEConfig

NORM_EPS = 1e-6


class ResnetBlock(nn.Module):
    """GroupNorm, SiLU, convolution, twice, and a skip."""

    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=NORM_EPS)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=NORM_EPS)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """shape = (batch, in_channels, h, w) -> (batch, out_channels, h, w)."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        skip = self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x
        return skip + h


class AttnBlock(nn.Module):
    """Single-head self-attention over all positions."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=NORM_EPS)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """shape = (batch, channels, h, w), in and out."""
        h = self.norm(x)
        q, k, v = (conv(h).flatten(2).transpose(1, 2)[:, None] for conv in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(q, k, v)[:, 0]  # (batch, h * w, channels)
        return x + self.proj_out(attended.transpose(1, 2).reshape_as(x))


class Downsample(nn.Module):
    """Halves both sides; pads right and bottom only, as the published weights expect."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """shape = (batch, channels, h, w) -> (batch, channels, h/2, w/2)."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles both sides: nearest neighbour, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """shape = (batch, channels, h, w) -> (batch, channels, 2h, 2w)."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The residual blocks of one resolution, and the way to the next."""

    def __init__(
        self, in_channels: int, out_channels: int, blocks: int, groups: int, resample: type[nn.Module] | None = None
    ) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            ResnetBlock(in_channels if i == 0 else out_channels, out_channels, groups) for i in range(blocks)
        )
        if resample is Downsample:
            self.downsample = Downsample(out_channels)
        elif resample is Upsample:
            self.upsample = Upsample(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """shape = (batch, in_channels, h, w) -> (batch, out_channels, h/2 or h or 2h, ...)."""
        for block in self.block:
            x = block(x)
        for resample in self.children():
            if resample is not self.block:
                x = resample(x)
        return x


class Middle(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, groups)
        self.attn_1 = AttnBlock(channels, groups)
        self.block_2 = ResnetBlock(channels, channels, groups)

    def forward(self, x: Tensor) -> Tensor:
        """shape = (batch, channels, h, w), in and out."""
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """Pixels to the moments of the latents."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        channels, groups = config.channels, config.groups
        self.conv_in = nn.Conv2d(3, channels[0], 3, padding=1)
        last = len(channels) - 1
        self.down = nn.ModuleList(
            Level(channels[max(i - 1, 0)], width, config.encoder_blocks, groups, Downsample if i < last else None)
            for i, width in enumerate(channels)
        )
        self.mid = Middle(channels[-1], groups)
        self.norm_out = nn.GroupNorm(groups, channels[-1], eps=NORM_EPS)
        self.conv_out = nn.Conv2d(channels[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """shape = (batch, 3, h, w) -> (batch, 32, h/8, w/8): means, then log variances."""
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """Latents to pixels."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        channels, groups = config.channels, config.groups
        self.conv_in = nn.Conv2d(config.latent_channels, channels[-1], 3, padding=1)
        self.mid = Middle(channels[-1], groups)
        last = len(channels) - 1
        # up.0 is the finest; the path runs from the last to the first
        self.up = nn.ModuleList(
            Level(channels[min(i + 1, last)], width, config.encoder_blocks + 1, groups, Upsample if i else None)
            for i, width in enumerate(channels)
        )
        self.norm_out = nn.GroupNorm(groups, channels[0], eps=NORM_EPS)
        self.conv_out = nn.Conv2d(channels[0], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """shape = (batch, 16, h/8, w/8) -> (batch, 3, h, w)."""
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class VAE(nn.Module):
    """Pixels to latents and back."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """The mean and log variance of the raw latents, each of shape = (batch, 16, h/8, w/8).

        pixels : shape = (batch, 3, h, w), in [-1, 1]
        """
        mean, logvar = self.encoder(pixels).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def decode(self, z: Tensor) -> Tensor:
        """Pixels in about [-1, 1], shape = (batch, 3, h, w), of raw latents of shape = (batch, 16, h/8, w/8)."""
        return self.decoder(z)

    def to_model(self, z: Tensor) -> Tensor:
        """Raw latents as the MMDiT sees them."""
        return (z - self.config.shift) * self.config.scale

    def from_model(self, latents: Tensor) -> Tensor:
        """The MMDiT's latents as the decoder sees them."""
        return latents / self.config.scale + self.config.shift

    def to_pixels(self, latents: Tensor) -> Tensor:
        """The MMDiT's latents as 8-bit RGB: shape = (batch, 16, h/8, w/8) -> (batch, h, w, 3), uint8."""
        decoded = self.decode(self.from_model(latents).to(self.decoder.conv_in.weight.dtype)).float()
        return (decoded.add(1).mul(127.5).round().clamp(0, 255)).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def channels_last(module: nn.Module) -> None:
    """Lay out the weights of every convolution with the channels last."""
    for parameter in module.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
