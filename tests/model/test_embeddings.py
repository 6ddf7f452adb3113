"""The cache of encoded prompts, alone and in the pipeline's Encode."""

from __future__ import annotations

import pytest
import torch

from model.checkpoint import Components
from model.embeddings import EmbeddingCache, Text
from model.pipeline import Lookups, Pipeline
from model.work import Encode


def text(value: float = 0.0) -> Text:
    """100 bytes."""
    return Text(torch.full((4, 5), value), torch.full((5,), value))


@pytest.fixture
def pipeline(components: Components) -> Pipeline:
    components.text.cache = EmbeddingCache()
    return Pipeline(components.mmdit, components.vae, components.text, t5_length=77)


def test_cache_drops_the_least_recently_used_when_its_bytes_are_full() -> None:
    cache = EmbeddingCache(max_bytes=250)
    for name in "ab":
        cache.put(name, text())
    cache.get("a")
    cache.put("c", text())
    assert [cache.get(name) is not None for name in "abc"] == [True, False, True]
    assert (len(cache), cache.nbytes) == (2, 200)


def test_cache_does_not_keep_what_alone_exceeds_its_bytes() -> None:
    cache = EmbeddingCache(max_bytes=99)
    cache.put("a", text())
    assert (cache.get("a"), cache.nbytes) == (None, 0)


def test_cache_counts_a_key_that_is_put_twice_once() -> None:
    cache = EmbeddingCache()
    cache.put("a", text(1.0))
    cache.put("a", text(2.0))
    assert cache.nbytes == 100


def test_encoding_the_same_words_again_is_a_hit_and_gives_the_same_text(pipeline: Pipeline) -> None:
    [[first, empty]] = pipeline.run([Encode(("the red cat", ""))])
    [[again, other, empty_again]] = pipeline.run([Encode(("the red cat", "a dog", ""))])
    assert (again, empty_again) == (first, empty)
    assert other is not first
    assert pipeline.lookups == Lookups(hits=2, misses=3)


def test_words_that_several_works_of_a_batch_share_are_encoded_once(pipeline: Pipeline) -> None:
    [[_, one], [_, two]] = pipeline.run([Encode(("a cat", "")), Encode(("a dog", ""))])
    assert one is two
    assert pipeline.lookups == Lookups(hits=0, misses=3)


def test_few_texts_at_a_time_are_the_same_as_all_at_once(pipeline: Pipeline) -> None:
    [together] = pipeline.run([Encode(("a", "b", "c"))])
    pipeline.text.cache = EmbeddingCache()
    [by_two] = pipeline.run([Encode(("a", "b", "c"))], max_rows=2)
    for one, other in zip(together, by_two, strict=True):
        torch.testing.assert_close(one.context, other.context, atol=1e-4, rtol=1e-4)


def test_another_length_is_another_text(pipeline: Pipeline, components: Components) -> None:
    shorter = Pipeline(components.mmdit, components.vae, components.text, t5_length=20)
    [[long]] = pipeline.run([Encode(("a cat",))])
    [[short]] = shorter.run([Encode(("a cat",))])
    assert long.context.shape[0] - short.context.shape[0] == 57


def test_pipelines_of_the_same_encoders_share_their_texts(pipeline: Pipeline, components: Components) -> None:
    twin = Pipeline(components.mmdit, components.vae, components.text, t5_length=77)
    [[mine]] = pipeline.run([Encode(("a cat",))])
    [[theirs]] = twin.run([Encode(("a cat",))])
    assert mine is theirs


def test_a_deterministic_text_is_never_one_that_was_encoded_beside_others(pipeline: Pipeline) -> None:
    [[batched, _]] = pipeline.run([Encode(("a cat", "a longer prompt than that"))])
    [[alone]] = pipeline.run([Encode(("a cat",), deterministic=True)])
    assert alone is not batched
    [[once_more, _]] = pipeline.run([Encode(("a cat", "something new"), deterministic=True)])
    assert once_more is alone


def test_a_deterministic_text_has_the_same_bytes_as_a_hit_and_as_a_miss(pipeline: Pipeline) -> None:
    [[hit, _]] = [pipeline.run([Encode(("a cat", ""), deterministic=True)])[0] for _ in range(2)][1:]
    pipeline.text.cache = EmbeddingCache()
    [[_, miss]] = pipeline.run([Encode(("other words", "a cat"), deterministic=True)])
    assert torch.equal(hit.context, miss.context)
    assert torch.equal(hit.pooled, miss.pooled)


def test_a_kept_text_owns_no_more_memory_than_its_own(pipeline: Pipeline) -> None:
    [[first, _, _]] = pipeline.run([Encode(("a", "b", "c"))])
    assert first.context.untyped_storage().nbytes() == first.context.nbytes
