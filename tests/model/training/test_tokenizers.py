"""The demo's tokenizers: whole words of captions, any other text without error, the same after saving."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from model.training.captions import caption
from model.training.scenes import sample_scene
from model.training.tokenizers import CLIP_LENGTH, Tokenizers, caption_words, demo_tokenizers


@pytest.fixture(scope="module")
def tokenizers() -> Tokenizers:
    return demo_tokenizers()


def test_pads_and_ends_are_those_that_the_encoders_expect(tokenizers: Tokenizers) -> None:
    clip_l, clip_g, t5 = tokenizers
    assert clip_l.eos_token_id == clip_g.eos_token_id == len(clip_l) - 1  # found as the largest id
    assert clip_l.pad_token_id == clip_l.eos_token_id
    assert (clip_g.pad_token_id, clip_g.convert_tokens_to_ids("!")) == (0, 0)
    assert (t5.pad_token_id, t5.eos_token_id) == (0, 1)
    assert clip_l.model_max_length == clip_g.model_max_length == CLIP_LENGTH


def test_frequent_words_are_one_token(tokenizers: Tokenizers) -> None:
    clip_l, _, t5 = tokenizers
    for word, _ in caption_words(500).most_common(60):
        assert len(clip_l(word)["input_ids"]) == (3 if word.isalpha() else 4)  # CLIP takes each digit alone
        assert len(t5(word)["input_ids"]) == 2


def test_captions_fit(tokenizers: Tokenizers) -> None:
    clip_l, _, t5 = tokenizers
    captions = [caption(sample_scene(seed), Random(seed)) for seed in range(3000)]
    assert max(len(clip_l(text)["input_ids"]) for text in captions) <= CLIP_LENGTH
    assert max(len(t5(text)["input_ids"]) for text in captions) <= 64


def test_case_and_spaces_do_not_matter(tokenizers: Tokenizers) -> None:
    for tokenizer in tokenizers:
        assert tokenizer("A Red  CIRCLE")["input_ids"] == tokenizer("a red circle")["input_ids"]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=40))
def test_any_text_has_ids_of_the_vocabulary(tokenizers: Tokenizers, text: str) -> None:
    for tokenizer in tokenizers:
        ids = tokenizer(text, verbose=False)["input_ids"]
        assert ids[-1] == tokenizer.eos_token_id
        assert all(0 <= id_ < len(tokenizer) for id_ in ids)


def test_unknown_letters_keep_their_bytes(tokenizers: Tokenizers) -> None:
    _, _, t5 = tokenizers
    assert t5.decode(t5("日本 red")["input_ids"], skip_special_tokens=True) == "日本 red"
    assert t5.unk_token_id not in t5("日本 🌊")["input_ids"]


def test_a_saved_tokenizer_gives_the_same_ids(tokenizers: Tokenizers, tmp_path: Path) -> None:
    texts = ["A large, yellow star: left of a heart!", "日本 🌊", ""]
    for n, tokenizer in enumerate(tokenizers):
        tokenizer.save_pretrained(tmp_path / str(n))
        loaded = AutoTokenizer.from_pretrained(tmp_path / str(n), local_files_only=True)
        assert [loaded(text)["input_ids"] for text in texts] == [tokenizer(text)["input_ids"] for text in texts]
        assert loaded.pad_token_id == tokenizer.pad_token_id


def test_made_twice_they_are_the_same(tokenizers: Tokenizers) -> None:
    for first, second in zip(tokenizers, demo_tokenizers(), strict=True):
        assert first.get_vocab() == second.get_vocab()
