"""Encoders elsewhere than the MMDiT: the same texts, and weights that are on the device only while their layer runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from model import offload as offload_module
from model.checkpoint import Components, load_components
from model.offload import offload
from model.room import NoRoom
from model.shelf import Shelf
from tests.model import tiny
from tests.model.tiny import assert_same_weights

CPU = torch.device("cpu")
PROMPTS = ["the red cat", "a"]


def encode(parts: Components) -> list[Tensor]:
    with torch.inference_mode():
        texts = parts.text.encode(PROMPTS, 20)
    return [tensor for text in texts for tensor in (text.context, text.pooled)]


def test_offloaded_encoders_give_the_same_texts_twice(diffusers_folder: Path, components: Components) -> None:
    found = load_components(diffusers_folder, "cpu", torch.float32, encoders="offload")
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(encode(found), encode(components), strict=True))
    assert_same_weights(found, components)


def test_offloaded_encoders_are_shared_as_others_are(diffusers_folder: Path) -> None:
    shelf = Shelf()
    first, second = (
        load_components(diffusers_folder, "cpu", torch.float32, encoders="offload", shelf=shelf) for _ in range(2)
    )
    assert second.text is first.text


class Host:
    """Stands for a GPU: what is there is what was copied."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.visits: list[int] = []
        copied = torch.empty_like

        def empty_like(tensor: Tensor, device: object) -> Tensor:
            self.visits.append(tensor.nbytes)
            return copied(tensor)

        monkeypatch.setattr(offload_module.torch, "empty_like", empty_like)


def test_layers_visit_one_by_one_and_nothing_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    net = tiny.t5(tiny.t5_tokenizer())
    ids = torch.tensor([[1, 2, 3]])
    with torch.inference_mode():
        before = net(input_ids=ids).last_hidden_state
    size = sum(parameter.nbytes for parameter in net.parameters())
    offload(net, CPU)
    homes = {name: parameter.data_ptr() for name, parameter in net.named_parameters()}
    host = Host(monkeypatch)
    with torch.inference_mode():
        assert torch.equal(net(input_ids=ids).last_hidden_state, before)
    assert len(host.visits) == 2 + tiny.t5(tiny.t5_tokenizer()).config.num_layers  # the embedding and the last norm
    assert max(host.visits) < size / 2
    assert size <= sum(host.visits) < 1.1 * size
    assert {name: parameter.data_ptr() for name, parameter in net.named_parameters()} == homes
    assert net.shared.weight is net.encoder.embed_tokens.weight


def test_a_layer_that_fails_goes_home(monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(3, 3)])

        def forward(self, x: Tensor) -> Tensor:
            return self.layers[0](x)

    net = Failing().requires_grad_(False)
    offload(net, CPU)
    home = net.layers[0].weight.data_ptr()
    with pytest.raises(RuntimeError, match="shape"):
        net(torch.ones(2, 2))
    assert net.layers[0].weight.data_ptr() == home


def test_encoders_on_the_cpu_send_their_texts_to_the_device_in_a_dtype_of_their_own(diffusers_folder: Path) -> None:
    found = load_components(
        diffusers_folder, "cpu", torch.bfloat16, encoders="cpu", host_dtype=torch.float32, free=lambda device: None
    )
    assert next(found.text.clip_l.parameters()).dtype == torch.float32
    assert found.mmdit.context_embedder.weight.dtype == torch.bfloat16
    assert (found.text.device, found.text.to) == (CPU, CPU)
    found.text._to = torch.device("meta")
    assert {tensor.device.type for tensor in encode(found)} == {"meta"}


@pytest.mark.parametrize("encoders", ["cpu", "offload"])
def test_each_place_is_asked_for_what_it_is_to_hold(diffusers_folder: Path, encoders: str) -> None:
    def free(device: torch.device) -> int:
        return 10**9 if device.type == "meta" else 1000

    with pytest.raises(
        NoRoom, match=r"on cpu \(CLIP-L [\d.]+ MB, CLIP-G [\d.]+ MB, T5 [\d.]+ MB\), and 1000 bytes are"
    ):
        load_components(diffusers_folder, "meta", torch.float32, encoders=encoders, free=free)  # type: ignore[arg-type]
