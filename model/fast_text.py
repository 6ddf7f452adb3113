"""Text encoding for CUDA: one function of ids that launches the same kernels for all prompts, so that a graph holds it.

It does what model.text.TextEncoders.forward does, from the parameters of the same modules. transformers' own forward
passes are not recorded: they make their masks in another way while a graph is captured, and T5's norms and activation
are some eight kernels each.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.embeddings import Text
from model.graphs import Graphs
from model.text import T5_LENGTH, TextEncoders

SIZES = (8, 4, 2, 1)
"""Prompts of a batch: other numbers go in several batches, so that few graphs are enough."""

CLIP_ARGMAX_EOS = 2
"""An end token in a config of CLIP that stands for "the largest id", as OpenAI's and LAION's configs have it."""


class FastTextEncoders:
    """The same encoders, by graphs where there are some. For one thread.

    Encoders whose weights only visit the device they compute on go the plain way: what is recorded must stay in place.

    text : whose modules, tokenizers and cache are used
    graphs : where the batches of one size and T5 length share a graph, of encoders on a GPU; None: nothing is recorded
    """

    def __init__(self, text: TextEncoders, graphs: Graphs | None = None) -> None:
        self.text, self.graphs = text, graphs
        nets: list[Any] = [net for net in (text.clip_l, text.clip_g, text.t5) if net is not None]
        homes = {weight.device.type for net in nets for weight in net.parameters()}
        self.resident = homes == {text.device.type}
        self._position_biases: dict[int, Tensor] = {}
        # CLIP's kernels are too small to fill a GPU, and T5 waits for memory most of the time: they run side by side.
        self._beside = torch.cuda.Stream(text.device) if text.device.type == "cuda" else None

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], t5_length: int = T5_LENGTH) -> list[Text]:
        """As TextEncoders.encode."""
        if not self.resident:
            return self.text.encode(prompts, t5_length)
        texts: list[Text] = []
        while left := prompts[len(texts) :]:
            size = len(left) if self.graphs is None else next(size for size in SIZES if size <= len(left))
            texts += self._encode(left[:size], t5_length)
        return texts

    def _encode(self, prompts: Sequence[str], t5_length: int) -> list[Text]:
        ids, warnings = self.text.read(prompts, t5_length)
        self.prepare(t5_length)
        function = partial(self.forward, t5_length=t5_length)
        on_device = self._on_device(ids)
        key = ("text", self, len(ids), t5_length)
        context, pooled = function(on_device) if self.graphs is None else self.graphs.run(key, function, on_device)
        return self.text.apart(context, pooled, warnings)

    def _on_device(self, ids: list[list[int]]) -> Tensor:
        if self._beside is None:
            return torch.tensor(ids, device=self.text.device)
        return torch.tensor(ids, pin_memory=True).to(self.text.device, non_blocking=True)

    def prepare(self, t5_length: int) -> None:
        """What is computed once for a length: T5's position bias, which its first block holds for all."""
        if self.text.t5 is not None and t5_length not in self._position_biases:
            first: Any = self.text.t5.encoder.block[0]
            bias = first.layer[0].SelfAttention.compute_bias(t5_length, t5_length)
            self._position_biases[t5_length] = bias.contiguous()

    def forward(self, ids: Tensor, t5_length: int, fused: bool | None = None) -> tuple[Tensor, Tensor]:
        """Contexts, shape = (prompts, tokens, context_dim), and pooled vectors, shape = (prompts, pooled_dim).

        Launches the same kernels whatever the ids are. `prepare` comes first.

        ids : shape = (prompts, tokens of all encoders), as TextEncoders.read gives them
        fused : T5's norms and activation by torch's fused functions, which round less often than transformers' many;
            absent: on CUDA
        """
        fused = ids.is_cuda if fused is None else fused
        ids_l, ids_g, ids_t5 = self.text.split(ids)
        if self._beside is None:
            clip, pooled = self._clips(ids_l, ids_g)
            t5 = self._t5(ids_t5, t5_length, fused)
        else:
            here = torch.cuda.current_stream(ids.device)
            self._beside.wait_stream(here)
            try:
                with torch.cuda.stream(self._beside):
                    clip, pooled = self._clips(ids_l, ids_g)
                t5 = self._t5(ids_t5, t5_length, fused)
            finally:
                # The stream's memory is used again only by what comes after its next wait for this one.
                here.wait_stream(self._beside)
        return self.text.joined(clip, t5, t5_length), pooled

    def _clips(self, ids_l: Tensor, ids_g: Tensor) -> tuple[Tensor, Tensor]:
        sequence_l, pooled_l = clip(self.text.clip_l, ids_l)
        sequence_g, pooled_g = clip(self.text.clip_g, ids_g)
        return torch.cat([sequence_l, sequence_g], dim=-1), torch.cat([pooled_l, pooled_g], dim=-1)

    def _t5(self, ids: Tensor, length: int, fused: bool) -> Tensor | None:
        return None if self.text.t5 is None else t5(self.text.t5, ids, self._position_biases[length], fused)


def clip(net: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The penultimate layer without final norm, shape = (prompts, tokens, width), and the projected pooled vector.

    net : CLIPTextModelWithProjection
    """
    text, eos = net.text_model, net.config.eos_token_id
    embeddings, (*layers, last) = text.embeddings, text.encoder.layers
    x = embeddings.token_embedding(ids) + embeddings.position_embedding.weight[: ids.shape[1]]
    for layer in layers:
        x = _clip_layer(layer, x)
    end = (ids if eos == CLIP_ARGMAX_EOS else (ids == eos).int()).argmax(-1)
    ends = _clip_layer(last, x)[torch.arange(len(ids), device=ids.device), end]
    return x, net.text_projection(text.final_layer_norm(ends))


def _clip_layer(layer: Any, x: Tensor) -> Tensor:
    attention, normed = layer.self_attn, layer.layer_norm1(x)
    q, k, v = (
        project(normed).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
        for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=attention.scale)
    x = x + attention.out_proj(attended.transpose(1, 2).flatten(2))
    return x + layer.mlp(layer.layer_norm2(x))


def t5(net: Any, ids: Tensor, position_bias: Tensor, fused: bool) -> Tensor:
    """The last layer with final norm, all tokens attended: shape = (prompts, tokens, width).

    net : T5EncoderModel
    position_bias : shape = (1, heads, tokens, tokens)
    """
    stack = net.encoder
    gelu = fused and net.config.dense_act_fn == "gelu_new"
    x = stack.embed_tokens(ids)
    for block in stack.block:
        first, second = block.layer
        attention, normed = first.SelfAttention, _rms_norm(first.layer_norm, x, fused)
        q, k, v = (
            project(normed).unflatten(-1, (attention.n_heads, -1)).transpose(1, 2)
            for project in (attention.q, attention.k, attention.v)
        )
        # T5 does not scale its scores.
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=position_bias, scale=1.0)
        x = _in_range(x + attention.o(attended.transpose(1, 2).flatten(2)))
        dense = second.DenseReluDense
        if gelu and hasattr(dense, "wi_1"):
            normed = _rms_norm(second.layer_norm, x, fused)
            hidden = F.gelu(dense.wi_0(normed), approximate="tanh") * dense.wi_1(normed)
            x = _in_range(x + dense.wo(hidden.to(dense.wo.weight.dtype)))
        else:
            x = _in_range(second(x))
    return _rms_norm(stack.final_layer_norm, x, fused)


def _rms_norm(norm: Any, x: Tensor, fused: bool) -> Tensor:
    if fused and x.dtype == norm.weight.dtype:
        return F.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)
    return norm(x)


def _in_range(x: Tensor) -> Tensor:
    """What fp16 cannot hold, cut as transformers cuts it."""
    if x.dtype != torch.float16:
        return x
    largest = torch.finfo(x.dtype).max
    limit = torch.where(torch.isinf(x).any(), largest - 1000, largest)
    return torch.clamp(x, min=-limit, max=limit)
