"""The demo's tokenizers, made of the captions' words: CLIP's byte-level BPE, twice, and a unigram one for T5."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable
from random import Random

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE, Unigram
from tokenizers.trainers import BpeTrainer
from transformers import CLIPTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from model.training.captions import sentence
from model.training.scenes import sample_scene

CLIP_LENGTH = 77
CLIP_MERGES = 400  # enough for nearly every word of the captions to be one token
START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"
SPACE = "▁"

Tokenizers = tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase, PreTrainedTokenizerBase]


def demo_tokenizers() -> Tokenizers:
    """Those of the drawings' captions. The same every time."""
    return tokenizers_of(caption_words())


def tokenizers_of(words: Counter[str]) -> Tokenizers:
    """CLIP-L's (padded with its end token), CLIP-G's (padded with "!", id 0) and T5's, for captions of these words."""
    merges = _merges(words)
    vocabulary = _clip_vocabulary(merges)
    clip_l, clip_g = (
        CLIPTokenizer(vocab=dict(vocabulary), merges=merges, pad_token=pad, model_max_length=CLIP_LENGTH)  # type: ignore[arg-type]
        for pad in (END, "!")
    )
    return clip_l, clip_g, _t5(words)


def caption_words(scenes: int = 4000) -> Counter[str]:
    """How often each word stands in captions, lower case, without marks."""
    return count_words(sentence(sample_scene(seed), Random(seed)) for seed in range(scenes))


def count_words(captions: Iterable[str]) -> Counter[str]:
    """How often each word stands in the captions, lower case, without marks."""
    separate = pre_tokenizers.Split(Regex(r"[^\w]+"), behavior="removed")
    words: Counter[str] = Counter()
    for text in captions:
        words.update(word for word, _ in separate.pre_tokenize_str(text.lower()))
    return words


def _merges(words: Counter[str]) -> list[tuple[str, str]]:
    model = Tokenizer(BPE(end_of_word_suffix=WORD_END))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    bytewise = pre_tokenizers.ByteLevel(add_prefix_space=False)  # for words beyond ASCII, as CLIP writes them
    words = Counter({"".join(part for part, _ in bytewise.pre_tokenize_str(word)): n for word, n in words.items()})
    letters = len({letter for word in words for letter in word}) * 2
    trainer = BpeTrainer(
        vocab_size=letters + CLIP_MERGES, end_of_word_suffix=WORD_END, min_frequency=1, show_progress=False
    )
    model.train_from_iterator((f"{word} " * count for word, count in sorted(words.items())), trainer)
    return [(left, right) for left, right in json.loads(model.to_str())["model"]["merges"]]


def _clip_vocabulary(merges: list[tuple[str, str]]) -> dict[str, int]:
    """CLIP's order: every byte ("!" first), every byte at a word's end, the merges, start, end."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(letter + WORD_END for letter in letters), *(a + b for a, b in merges), START, END]
    return {token: id_ for id_, token in enumerate(tokens)}


def _t5(words: Counter[str]) -> PreTrainedTokenizerBase:
    """Whole words, then letters, then bytes; lower case, since there are few words to learn from."""
    total = sum(words.values())
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(f"<0x{byte:02X}>", 0.0) for byte in range(256)]
    pieces += [(SPACE + word, math.log(count / total)) for word, count in sorted(words.items())]
    pieces += [(SPACE + mark, -5.0) for mark in ".,:"]
    pieces += [(SPACE, -12.0)]
    pieces += [(letter, -14.0) for letter in "abcdefghijklmnopqrstuvwxyz0123456789.,:;!?'\"()-"]
    model = Tokenizer(Unigram(pieces, unk_id=2, byte_fallback=True))
    model.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Punctuation(),
            pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always"),
        ]
    )
    model.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(replacement=SPACE)])
    model.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    model.add_special_tokens([AddedToken(token, special=True) for token in ("<pad>", "</s>", "<unk>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )
