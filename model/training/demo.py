"""The demo's networks: the SD3.5 architecture at a size that two CPU cores run in seconds."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, PreTrainedTokenizerBase, T5Config, T5EncoderModel

from model.config import MMDiTConfig, VAEConfig
from model.layers import position_table
from model.mmdit import MMDiT
from model.text import TextEncoders
from model.training.tokenizers import CLIP_LENGTH, Tokenizers, demo_tokenizers

CLIP_WIDTH = 64  # of each CLIP; one head
T5_WIDTH = 144
T5_LENGTH = 64  # tokens; the longest caption has about 45

DEMO_VAE = VAEConfig(channels=(16, 48, 96, 96), encoder_blocks=1, groups=8, scale=1.0, shift=0.0)
"""2.2 M parameters. The widths at full and half size decide what decoding costs: 0.75 s for 512x512 on two CPU cores.
Scale and shift are measured after training."""

DEMO_MMDIT = MMDiTConfig(
    depth=5, hidden=192, heads=3, context_dim=T5_WIDTH, pooled_dim=2 * CLIP_WIDTH, pos_embed_grid=96, dual_blocks=(0, 1)
)
"""7.0 M parameters and a position table for sides up to 1,536 pixels."""

MMDITS: dict[str, MMDiTConfig] = {
    "demo": DEMO_MMDIT,
    "deep": replace(DEMO_MMDIT, depth=7, hidden=160, heads=5),
    "deep-single": replace(DEMO_MMDIT, depth=7, hidden=160, heads=5, dual_blocks=()),
    "narrow-heads": replace(DEMO_MMDIT, heads=6),
}
"""What else fits into the demo bundle, to be compared at equal time. See `python -m model.training flow --net`."""


def new_mmdit(config: MMDiTConfig = DEMO_MMDIT) -> MMDiT:
    """Random weights as in DiT (Peebles and Xie 2022, arXiv:2212.09748): every block begins as the identity."""
    mmdit = MMDiT(config)
    for module in mmdit.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(module.weight.view(len(module.weight), -1))
            nn.init.zeros_(module.get_parameter("bias"))
    for name, weight in mmdit.named_parameters():
        if name.startswith(("t_embedder", "y_embedder")) and weight.ndim > 1:
            nn.init.normal_(weight, std=0.02)
        if "adaLN_modulation" in name or name.startswith("final_layer"):
            nn.init.zeros_(weight)
    mmdit.pos_embed.copy_(position_table(config.hidden, config.pos_embed_grid))
    return mmdit


class TextTower(nn.Module):
    """The three encoders as one trainable module: tokens to what TextEncoders.encode gives for their text."""

    def __init__(
        self,
        clip_l: CLIPTextModelWithProjection,
        clip_g: CLIPTextModelWithProjection,
        t5: T5EncoderModel,
        tokenizers: Tokenizers,
        context_dim: int = T5_WIDTH,
    ) -> None:
        super().__init__()
        self.clip_l, self.clip_g, self.t5 = clip_l, clip_g, t5
        self.tokenizers, self.context_dim = tokenizers, context_dim

    @classmethod
    def of(cls, text: TextEncoders) -> TextTower:
        """Loaded encoders, which must be all three."""
        assert text.t5 is not None
        assert text.t5_tokenizer is not None
        wrappers = (text.clip_l_tokenizer, text.clip_g_tokenizer, text.t5_tokenizer)
        clip_l, clip_g, t5 = (wrapper.tokenizer for wrapper in wrappers)
        return cls(text.clip_l, text.clip_g, text.t5, (clip_l, clip_g, t5), text.context_dim)

    def encoders(self) -> TextEncoders:
        """The same modules, as the pipeline takes them."""
        return TextEncoders(self.clip_l, self.clip_g, self.t5, self.tokenizers, self.context_dim)

    def forward(self, ids_l: Tensor, ids_g: Tensor, ids_t5: Tensor) -> tuple[Tensor, Tensor]:
        """The context, shape = (batch, tokens, context_dim), and the pooled vector, shape = (batch, pooled_dim).

        ids_l, ids_g, ids_t5 : shape = (batch, that encoder's tokens)
        """
        clip_l = self.clip_l(input_ids=ids_l, output_hidden_states=True)
        clip_g = self.clip_g(input_ids=ids_g, output_hidden_states=True)
        clip = torch.cat([clip_l.hidden_states[-2], clip_g.hidden_states[-2]], dim=-1)
        clip = nn.functional.pad(clip, (0, self.context_dim - clip.shape[-1]))
        t5 = self.t5(input_ids=ids_t5).last_hidden_state
        pooled = torch.cat([clip_l.text_embeds, clip_g.text_embeds], dim=-1)
        return torch.cat([clip, t5.to(clip.dtype)], dim=1), pooled


class Reader:
    """Captions to the ids that the tower takes; without networks, so that any process can hold it."""

    def __init__(self, encoders: TextEncoders, t5_length: int = T5_LENGTH) -> None:
        assert encoders.t5_tokenizer is not None
        self.lengths = (
            (encoders.clip_l_tokenizer, CLIP_LENGTH),
            (encoders.clip_g_tokenizer, CLIP_LENGTH),
            (encoders.t5_tokenizer, t5_length),
        )

    def __call__(self, text: str) -> tuple[list[int], ...]:
        """The ids for CLIP-L, CLIP-G and T5."""
        return tuple(tokenizer(text, length).ids for tokenizer, length in self.lengths)


def new_tower(tokenizers: Tokenizers | None = None) -> TextTower:
    """The demo's encoders with random weights; without tokenizers with those of the drawings."""
    tokenizers = tokenizers or demo_tokenizers()
    clip_l, clip_g = new_clip(tokenizers[0], "quick_gelu"), new_clip(tokenizers[1], "gelu")
    with torch.no_grad():  # of CLIP-L, published models pool without a projection
        clip_l.text_projection.weight.copy_(torch.eye(CLIP_WIDTH)).requires_grad_(False)
    return TextTower(clip_l, clip_g, new_t5(tokenizers[2], T5_WIDTH), tokenizers)


def new_clip(tokenizer: PreTrainedTokenizerBase, activation: str) -> CLIPTextModelWithProjection:
    """A CLIP text tower of two layers."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=CLIP_WIDTH,
        intermediate_size=4 * CLIP_WIDTH,
        projection_dim=CLIP_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=CLIP_WIDTH // 64,
        max_position_embeddings=tokenizer.model_max_length,
        hidden_act=activation,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=2,  # transformers then finds the end token as the largest id, as in the published encoders
        pad_token_id=tokenizer.pad_token_id,
    )
    clip = CLIPTextModelWithProjection(config)
    # The sequence goes to the MMDiT without a norm: CLIP's own start, 0.02, would make it next to nothing.
    nn.init.normal_(clip.get_input_embeddings().get_parameter("weight"), std=0.5)
    return clip


def new_t5(tokenizer: PreTrainedTokenizerBase, width: int) -> T5EncoderModel:
    """A T5 v1.1 encoder of two layers."""
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=32,
        d_ff=256,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return T5EncoderModel(config)
