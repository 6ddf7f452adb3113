"""Prompts to what the MMDiT attends to: CLIP-L, CLIP-G and T5, put together as SD3.5 was trained."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPTextModelWithProjection, PreTrainedConfig, PreTrainedTokenizerBase, T5EncoderModel

from model.embeddings import EmbeddingCache, Text

CLIP_LENGTH = 77
"""Tokens of both CLIP encoders, which share their part of the context."""

T5_LENGTH = 256
"""Tokens of T5 by default. Pads are attended, so another length gives another picture."""

WORDS = frozenset({"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"})
"""What a config of transformers says that no number of the net depends on."""

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

    @property
    def described(self) -> dict[str, Any]:
        """All that the ids of a prompt depend on."""
        tokenizer: Any = self.tokenizer
        kind = {"kind": type(tokenizer).__name__, "end": self.eos_id, "pad": self.pad_id}
        if not tokenizer.is_fast:
            return kind | {"vocabulary": tokenizer.get_vocab()}
        said = json.loads(tokenizer.backend_tokenizer.to_str())
        # Truncation and padding are as the last prompt had them.
        return kind | {name: part for name, part in said.items() if name not in ("truncation", "padding")}


class TextEncoders:
    """The three encoders. T5 may be absent: its part of the context is then zeros."""

    def __init__(
        self,
        clip_l: CLIPTextModelWithProjection,
        clip_g: CLIPTextModelWithProjection,
        t5: T5EncoderModel | None,
        tokenizers: Sequence[PreTrainedTokenizerBase | None],
        context_dim: int,
        *,
        device: torch.device | None = None,
        to: torch.device | None = None,
    ) -> None:
        """device : where the encoders compute; absent: where they live. to : where texts go; absent: they stay."""
        self.clip_l, self.clip_g, self.t5, self.context_dim = clip_l, clip_g, t5, context_dim
        self._device, self._to = device, to
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

    @cached_property
    def digest(self) -> str:
        """Twelve hex digits of how prompts are read, beside the weights: by which tokenizers and configs."""
        nets = [net for net in (self.clip_l, self.clip_g, self.t5) if net is not None]
        readers = [reader for reader in (self.clip_l_tokenizer, self.clip_g_tokenizer, self.t5_tokenizer) if reader]
        said = [numbers_of(net.config) for net in nets], [reader.described for reader in readers]
        return hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()[:12]

    @property
    def device(self) -> torch.device:
        """Where the encoders compute."""
        return self._device or next(self.clip_l.parameters()).device

    @property
    def to(self) -> torch.device:
        """Where texts go."""
        return self._to or self.device

    @property
    def clip_lengths(self) -> tuple[int, int]:
        """Tokens of CLIP-L and of CLIP-G."""
        return _positions(self.clip_l.config), _positions(self.clip_g.config)

    def encode(self, prompts: Sequence[str], t5_length: int = T5_LENGTH) -> list[Text]:
        """Encode prompts as one batch.

        context : CLIP-L and CLIP-G side by side, zero-padded to the joint width, followed by T5;
            shape = (clip length + t5_length, context_dim)
        pooled : CLIP-L, then CLIP-G; shape = (pooled_dim,)
        """
        ids, warnings = self.read(prompts, t5_length)
        context, pooled = self.forward(torch.tensor(ids, device=self.device), t5_length)
        return self.apart(context, pooled, warnings)

    def read(self, prompts: Sequence[str], t5_length: int) -> tuple[list[list[int]], list[tuple[str, ...]]]:
        """For each prompt the ids for all encoders, CLIP-L's, CLIP-G's, then T5's, if it is there; and the warnings."""
        lengths = self.clip_lengths
        ids, warnings = [], []
        for prompt in prompts:
            clip_l = self.clip_l_tokenizer(prompt, lengths[0])
            clip_g = self.clip_g_tokenizer(prompt, lengths[1])
            t5 = self.t5_tokenizer(prompt, t5_length) if self.t5 and self.t5_tokenizer else None
            ids.append(clip_l.ids + clip_g.ids + (t5.ids if t5 else []))
            clip = max(clip_l, clip_g, key=lambda tokens: tokens.cut)
            warnings.append(_warnings({"CLIP": clip, "T5": t5}))
        return ids, warnings

    def split(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The ids for each encoder, shape = (prompts, tokens) each, of those for all."""
        clip_l, clip_g = self.clip_lengths
        return ids[:, :clip_l], ids[:, clip_l : clip_l + clip_g], ids[:, clip_l + clip_g :]

    def forward(self, ids: Tensor, t5_length: int) -> tuple[Tensor, Tensor]:
        """Contexts and pooled vectors, as encode explains them, of the ids of prompts."""
        ids_l, ids_g, ids_t5 = self.split(ids)
        sequence_l, pooled_l = _clip(self.clip_l, ids_l)
        sequence_g, pooled_g = _clip(self.clip_g, ids_g)
        # No mask anywhere: pads are attended, as in training.
        t5 = None if self.t5 is None else self.t5(input_ids=ids_t5).last_hidden_state
        context = self.joined(torch.cat([sequence_l, sequence_g], dim=-1), t5, t5_length)
        return context, torch.cat([pooled_l, pooled_g], dim=-1)

    def joined(self, clip: Tensor, t5: Tensor | None, t5_length: int) -> Tensor:
        """The context: CLIP's part, zero-padded to the joint width, followed by T5's, or by zeros without T5."""
        clip = F.pad(clip, (0, self.context_dim - clip.shape[-1]))
        if t5 is None:
            t5 = clip.new_zeros(len(clip), t5_length, self.context_dim)
        return torch.cat([clip, t5.to(clip.dtype)], dim=1)

    def apart(self, context: Tensor, pooled: Tensor, warnings: Sequence[tuple[str, ...]]) -> list[Text]:
        """The text of each prompt of a batch."""
        # Copies: a text that is kept must not hold the memory of its whole batch.
        to = self.to
        return [
            Text(context[i].to(to, copy=True), pooled[i].to(to, copy=True), told) for i, told in enumerate(warnings)
        ]


def numbers_of(config: PreTrainedConfig) -> dict[str, Any]:
    """What of its config a net's results depend on."""
    return {name: value for name, value in config.to_diff_dict().items() if name not in WORDS}


def _clip(encoder: CLIPTextModelWithProjection, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The penultimate layer without final norm, and the projected pooled vector."""
    out = encoder(input_ids=ids, output_hidden_states=True)
    return out.hidden_states[-2], out.text_embeds


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
