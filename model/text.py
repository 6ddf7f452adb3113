"""Prompts to what the MMDiT attends to: CLIP-L, CLIP-G and T5, put together as SD3.5 was trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPTextModelWithProjection, PreTrainedTokenizerBase, T5EncoderModel

from model.embeddings import EmbeddingCache, Text

__all__ = ["CLIP_LENGTH", "T5_LENGTH", "Text", "TextEncoders", "Tokenizer", "Tokens"]

CLIP_LENGTH = 77
"""Tokens of both CLIP encoders, which share their part of the context."""

T5_LENGTH = 256
"""Tokens of T5 by default. Pads are attended, so another length gives another picture."""

MAX_QUOTED = 120
"""Characters of a cut prompt that a warning repeats."""


@dataclass(frozen=True)
class Tokens:
    """One prompt as one encoder reads it."""

    ids: list[int]
    cut: int  # tokens of the prompt that did not fit
    unread: str = ""  # the words of the prompt that they stand for


class Tokenizer:
    """A tokenizer with the length and padding that its encoder was trained with."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, eos_id: int, pad_id: int) -> None:
        self.tokenizer, self.eos_id, self.pad_id = tokenizer, eos_id, pad_id

    def __call__(self, prompt: str, length: int) -> Tokens:
        """Exactly `length` ids: cut before the end token, or padded after it."""
        encoded = self.tokenizer(prompt, truncation=False, verbose=False, return_offsets_mapping=self.tokenizer.is_fast)
        ids: list[int] = encoded["input_ids"]
        if len(ids) <= length:
            return Tokens(ids + [self.pad_id] * (length - len(ids)), 0)
        kept = length - 1  # and the end token, whose place in the prompt is nowhere
        unread = prompt[encoded["offset_mapping"][kept][0] :] if self.tokenizer.is_fast else ""
        return Tokens([*ids[:kept], self.eos_id], len(ids) - length, unread)


class TextEncoders:
    """The three encoders. T5 may be absent: its part of the context is then zeros."""

    def __init__(
        self,
        clip_l: CLIPTextModelWithProjection,
        clip_g: CLIPTextModelWithProjection,
        t5: T5EncoderModel | None,
        tokenizers: Sequence[PreTrainedTokenizerBase | None],
        context_dim: int,
    ) -> None:
        self.clip_l, self.clip_g, self.t5, self.context_dim = clip_l, clip_g, t5, context_dim
        self.cache = EmbeddingCache()
        clip_l_tokenizer, clip_g_tokenizer, t5_tokenizer = tokenizers
        if clip_l_tokenizer is None or clip_g_tokenizer is None:
            raise ValueError("both CLIP encoders need a tokenizer")
        # The pads are part of the trained model: CLIP-L was padded with its end token, CLIP-G and T5 with id 0.
        self.clip_l_tokenizer = Tokenizer(clip_l_tokenizer, _eos(clip_l_tokenizer), _eos(clip_l_tokenizer))
        self.clip_g_tokenizer = Tokenizer(clip_g_tokenizer, _eos(clip_g_tokenizer), 0)
        if t5 is not None and t5_tokenizer is None:
            raise ValueError("T5 needs a tokenizer")
        self.t5_tokenizer = Tokenizer(t5_tokenizer, _eos(t5_tokenizer), 0) if t5_tokenizer is not None else None

    @property
    def device(self) -> torch.device:
        """Where the encoders live."""
        return next(self.clip_l.parameters()).device

    def encode(self, prompts: Sequence[str], t5_length: int = T5_LENGTH) -> list[Text]:
        """Encode prompts as one batch.

        context : CLIP-L and CLIP-G side by side, zero-padded to the joint width, followed by T5;
            shape = (clip length + t5_length, context_dim)
        pooled : CLIP-L, then CLIP-G; shape = (pooled_dim,)
        """
        tokens_l, sequence_l, pooled_l = self._clip(self.clip_l, self.clip_l_tokenizer, prompts)
        tokens_g, sequence_g, pooled_g = self._clip(self.clip_g, self.clip_g_tokenizer, prompts)
        tokens_t5, sequence_t5 = self._t5(prompts, t5_length)
        clip = torch.cat([sequence_l, sequence_g], dim=-1)
        clip = F.pad(clip, (0, self.context_dim - clip.shape[-1]))
        context = torch.cat([clip, sequence_t5.to(clip.dtype)], dim=1)
        pooled = torch.cat([pooled_l, pooled_g], dim=-1)
        warnings = [
            _warnings({"CLIP": max(lg, g, key=lambda tokens: tokens.cut), "T5": t5})
            for lg, g, t5 in zip(tokens_l, tokens_g, tokens_t5, strict=True)
        ]
        # Clones: a text that is kept must not hold the memory of its whole batch.
        return [Text(context[i].clone(), pooled[i].clone(), warnings[i]) for i in range(len(prompts))]

    def _clip(
        self, encoder: CLIPTextModelWithProjection, tokenizer: Tokenizer, prompts: Sequence[str]
    ) -> tuple[list[Tokens], Tensor, Tensor]:
        """Tokens, the penultimate layer without final norm, and the projected pooled vector."""
        tokens = [tokenizer(prompt, _positions(encoder.config)) for prompt in prompts]
        ids = torch.tensor([t.ids for t in tokens], device=self.device)
        out = encoder(input_ids=ids, output_hidden_states=True)
        return tokens, out.hidden_states[-2], out.text_embeds

    def _t5(self, prompts: Sequence[str], length: int) -> tuple[list[Tokens | None], Tensor]:
        """Tokens and the last layer with final norm. No mask anywhere: pads are attended, as in training."""
        if self.t5 is None or self.t5_tokenizer is None:
            zeros = torch.zeros(len(prompts), length, self.context_dim, device=self.device)
            return [None] * len(prompts), zeros
        tokens = [self.t5_tokenizer(prompt, length) for prompt in prompts]
        ids = torch.tensor([t.ids for t in tokens], device=self.device)
        return list(tokens), self.t5(input_ids=ids).last_hidden_state


def _eos(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.eos_token_id is None:
        raise ValueError(f"a tokenizer needs an end token; {tokenizer!r} has none")
    return int(tokenizer.eos_token_id)


def _positions(config: Any) -> int:
    return int(config.max_position_embeddings)


def _warnings(read: dict[str, Tokens | None]) -> tuple[str, ...]:
    """A sentence for each encoder that missed the end of the prompt, with the words that it missed."""
    return tuple(
        f"the prompt was cut for {name}: its last {tokens.cut} tokens were not read{_quoted(tokens.unread)}"
        for name, tokens in read.items()
        if tokens and tokens.cut
    )


def _quoted(words: str) -> str:
    if not words:
        return ""
    shown = words if len(words) <= MAX_QUOTED else f"{words[:MAX_QUOTED].rstrip()}..."
    return f': "{shown}"'
