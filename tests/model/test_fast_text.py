"""The fast encoders against transformers' own forward passes, fp32 on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from model.checkpoint import Components, load_components
from model.embeddings import Text
from model.fast_text import FastTextEncoders
from model.graphs import Graphs
from model.text import TextEncoders

PROMPTS = ["a red cat", "", "The cat, the red CAT! 42", "red cat " * 400, "a", "b", "c", "d", "e"]

# T5's fused norms and activation round in other places; its values reach tens.
TOLERANCE = 1e-4

WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2", "unique_dim"}
"""Operations that wait for the device, or whose result has a size that only the device knows."""


class Watch(TorchDispatchMode):
    """Which operations run, and which of them make a tensor out of nothing or move one."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.moves: list[str] = []
        self.masked: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.names.append(name)
        given = kwargs or {}
        if name in {"_to_copy", "copy_", "lift_fresh", "lift_fresh_copy"} and (given.get("device") or "lift" in name):
            self.moves.append(name)
        if name in {"index", "index_put", "index_put_"} and any(
            t is not None and t.dtype == torch.bool for t in args[1]
        ):
            self.masked.append(name)
        return func(*args, **given)


def same(found: Text, expected: Text) -> bool:
    equal = torch.equal(found.context, expected.context) and torch.equal(found.pooled, expected.pooled)
    return equal and found.warnings == expected.warnings


def recorder(recorded: list[torch.Size]) -> Callable[..., Callable[..., Tensor]]:
    """Stands for the CUDA graphs' recorder."""

    def record(function: Callable[..., Tensor], *inputs: Tensor) -> Callable[..., Tensor]:
        recorded.append(inputs[0].shape)
        return function

    return record


@pytest.mark.parametrize("length", [77, 256])
@torch.inference_mode()
def test_texts_are_those_of_the_plain_way_bit_for_bit(components: Components, length: int) -> None:
    fast = FastTextEncoders(components.text)
    for prompts in (PROMPTS[:1], PROMPTS[:4]):
        expected = components.text.encode(prompts, length)
        found = fast.encode(prompts, length)
        assert len(found) == len(prompts)
        assert all(map(same, found, expected))
    assert expected[3].warnings


@torch.inference_mode()
def test_fused_norms_and_activation_differ_by_rounding(components: Components) -> None:
    text = components.text
    fast = FastTextEncoders(text)
    ids = torch.tensor(text.read(PROMPTS[:3], 77)[0])
    fast.prepare(77)
    context, pooled = fast.forward(ids, 77, fused=True)
    expected_context, expected_pooled = text.forward(ids, 77)
    torch.testing.assert_close(context, expected_context, atol=TOLERANCE, rtol=TOLERANCE)
    assert torch.equal(pooled, expected_pooled)


@torch.inference_mode()
def test_end_token_of_newer_configs_is_found(components: Components, monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenAI's config says 2 and means the largest id; a newer one says which id it is."""
    text = components.text
    for net, tokenizer in ((text.clip_l, text.clip_l_tokenizer), (text.clip_g, text.clip_g_tokenizer)):
        monkeypatch.setattr(net.config, "eos_token_id", tokenizer.eos_id)
        monkeypatch.setattr(net.text_model, "eos_token_id", tokenizer.eos_id)
    expected = text.encode(PROMPTS[:4], 20)
    assert all(map(same, FastTextEncoders(text).encode(PROMPTS[:4], 20), expected))


@torch.inference_mode()
def test_without_t5_its_part_is_zeros(diffusers_folder: Path) -> None:
    text = load_components(diffusers_folder, "cpu", torch.float32, load_t5=False).text
    assert all(map(same, FastTextEncoders(text).encode(PROMPTS[:2], 20), text.encode(PROMPTS[:2], 20)))


@torch.inference_mode()
def test_few_sizes_are_recorded_and_other_numbers_go_in_several_batches(components: Components) -> None:
    recorded: list[torch.Size] = []
    graphs = Graphs(recorder(recorded))
    fast = FastTextEncoders(components.text, graphs)
    for _ in range(2):
        for count in (1, 2, 3, 4, 5, 8, 9):
            found = fast.encode(PROMPTS[:count], 20)
            assert len(found) == count
            expected = components.text.encode(PROMPTS[:count], 20)
            for one, other in zip(found, expected, strict=True):
                # Batches of another size, whose sums run in another order.
                torch.testing.assert_close(one.context, other.context, atol=TOLERANCE, rtol=TOLERANCE)
                torch.testing.assert_close(one.pooled, other.pooled, atol=TOLERANCE, rtol=TOLERANCE)
                assert one.warnings == other.warnings
    assert sorted(shape[0] for shape in recorded) == [1, 2, 4, 8]


@torch.inference_mode()
def test_lengths_and_encoders_do_not_share_a_graph(components: Components, diffusers_folder: Path) -> None:
    recorded: list[torch.Size] = []
    graphs = Graphs(recorder(recorded))
    other = load_components(diffusers_folder, "cpu", torch.float32, load_t5=False).text
    for text in (components.text, other):
        fast = FastTextEncoders(text, graphs)
        for length in (20, 24) * 2:
            assert same(fast.encode(["a red cat"], length)[0], text.encode(["a red cat"], length)[0])
    assert len(recorded) == 4


@torch.inference_mode()
def test_nothing_waits_for_the_device_or_comes_from_the_cpu(components: Components) -> None:
    """What a graph cannot hold: values that Python looks at, and tensors that are made on the CPU meanwhile."""
    fast = FastTextEncoders(components.text)
    ids = torch.tensor(components.text.read(PROMPTS[:2], 20)[0])
    fast.prepare(20)
    watched = []
    for fused in (True, False):
        with Watch() as watch:
            fast.forward(ids, 20, fused=fused)
        watched.append(watch.names)
        assert not WAITS & set(watch.names)
        assert not watch.moves
        assert not watch.masked
        others = ids.flip(0)
        with Watch() as again:
            fast.forward(others, 20, fused=fused)
        assert again.names == watch.names
    assert len(watched[0]) < len(watched[1])


@torch.inference_mode()
def test_position_bias_is_computed_once_for_a_length(components: Components, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []
    assert components.text.t5 is not None
    attention: Any = components.text.t5.encoder.block[0].layer[0].SelfAttention
    compute = attention.compute_bias

    def counted(length: int, *rest: Any) -> Tensor:
        lengths.append(length)
        return compute(length, *rest)

    monkeypatch.setattr(attention, "compute_bias", counted)
    fast = FastTextEncoders(components.text)
    for length in (20, 24, 20):
        fast.encode(["a"], length)
    assert lengths == [20, 24]


@torch.inference_mode()
def test_weights_that_only_visit_the_device_go_the_plain_way(
    components: Components, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = components.text
    monkeypatch.setattr(text, "_device", torch.device("meta"))
    plain: list[int] = []
    monkeypatch.setattr(TextEncoders, "encode", lambda self, prompts, length: plain.append(length) or [])
    fast = FastTextEncoders(text)
    assert fast.encode(["a"], 20) == []
    assert plain == [20]
