"""MMDiT and MMDiT-X: latents, time and text to velocity (Esser et al. 2024, arXiv:2403.03206)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.config import TIMESTEP_DIM, MMDiTConfig
from model.layers import Embedder, FinalLayer, JointBlock, PatchEmbed, timestep_embedding


class MMDiT(nn.Module):
    """The multimodal diffusion transformer."""

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        self.config = config
        hidden = config.hidden
        self.register_buffer("pos_embed", torch.zeros(1, config.pos_embed_grid**2, hidden))
        self.pos_embed: Tensor
        self.x_embedder = PatchEmbed(config.in_channels, hidden, config.patch)
        self.t_embedder = Embedder(TIMESTEP_DIM, hidden)
        self.y_embedder = Embedder(config.pooled_dim, hidden)
        self.context_embedder = nn.Linear(config.context_dim, hidden)
        self.joint_blocks = nn.ModuleList(
            JointBlock(
                hidden,
                config.heads,
                qk_norm=config.qk_norm,
                mlp_ratio=config.mlp_ratio,
                dual=i in config.dual_blocks,
                last=i == config.depth - 1,
            )
            for i in range(config.depth)
        )
        self.final_layer = FinalLayer(hidden, config.patch, config.in_channels)

    def forward(self, x: Tensor, timestep: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
        """The velocity d x / d sigma of noised latents.

        x : shape = (batch, 16, h/8, w/8), latents at the sigma of each row
        timestep : shape = (batch,), 1000 * sigma, fp32
        context : shape = (batch, tokens, context_dim), the text sequence
        pooled : shape = (batch, pooled_dim), the pooled text
        returns : shape = (batch, 16, h/8, w/8)
        """
        rows, columns = x.shape[-2] // self.config.patch, x.shape[-1] // self.config.patch
        tokens = self.x_embedder(x) + self.positions(rows, columns).to(x.dtype)
        c = self.t_embedder(timestep_embedding(timestep, TIMESTEP_DIM).to(x.dtype)) + self.y_embedder(pooled)
        context = self.context_embedder(context)
        for block in self.joint_blocks:
            tokens, context = block(tokens, context, c)
        return self.unpatchify(self.final_layer(tokens, c), rows, columns)

    def positions(self, rows: int, columns: int) -> Tensor:
        """The central crop of the position table; shape = (1, rows * columns, hidden)."""
        grid = self.config.pos_embed_grid
        if rows > grid or columns > grid:
            raise ValueError(f"{rows} x {columns} patches do not fit the position table of {grid} x {grid}")
        top, left = (grid - rows) // 2, (grid - columns) // 2
        table = self.pos_embed.unflatten(1, (grid, grid))
        return table[:, top : top + rows, left : left + columns].flatten(1, 2)

    def unpatchify(self, tokens: Tensor, rows: int, columns: int) -> Tensor:
        """shape = (batch, rows * columns, p * p * channels) -> (batch, channels, rows * p, columns * p)."""
        p = self.config.patch
        patches = tokens.unflatten(1, (rows, columns)).unflatten(-1, (p, p, -1))  # (b, rows, columns, p, p, channels)
        return patches.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
