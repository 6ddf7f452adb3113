"""Encoded prompts, and a cache of them: the same words need the encoders once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Text:
    """One encoded prompt."""

    context: Tensor  # shape = (clip tokens + t5 tokens, context_dim)
    pooled: Tensor  # shape = (pooled_dim,)
    warnings: tuple[str, ...] = ()  # what was cut off

    @property
    def nbytes(self) -> int:
        """Memory of its tensors."""
        return self.context.nbytes + self.pooled.nbytes


class EmbeddingCache:
    """The texts used last, within a bound of bytes; the least recently used goes first. For one thread.

    It belongs to its encoders, so models that share encoders share it. Keys say all else that the encoding depends on.
    """

    def __init__(self, max_bytes: int = 256 * 2**20) -> None:
        self.max_bytes = max_bytes
        self.nbytes = 0
        self._texts: OrderedDict[Hashable, Text] = OrderedDict()

    def __len__(self) -> int:
        return len(self._texts)

    def get(self, key: Hashable) -> Text | None:
        """The text of a key, which becomes the last used."""
        text = self._texts.get(key)
        if text is not None:
            self._texts.move_to_end(key)
        return text

    def put(self, key: Hashable, text: Text) -> None:
        """Keep a text, if it fits at all."""
        if text.nbytes > self.max_bytes or key in self._texts:
            return
        self._texts[key] = text
        self.nbytes += text.nbytes
        while self.nbytes > self.max_bytes:
            self.nbytes -= self._texts.popitem(last=False)[1].nbytes
