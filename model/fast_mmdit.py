"""The MMDiT rearranged for speed: the same weights and the same mathematics as model.mmdit, its plain twin.

What depends on the noise level and the prompt alone is computed beforehand for many steps at once (Conditions); q, k
and v of both streams are made side by side; and what stands between two matrix products is one pass over memory.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import TIMESTEP_DIM
from model.embeddings import Text
from model.fp8 import Fp8Linear
from model.kernels.attention import attend
from model.kernels.elementwise import (
    Branch,
    Modulated,
    Rows,
    add_and_norm,
    gelu_quantized,
    joined_heads,
    norm_heads,
    quantized,
)
from model.layers import Attention, JointBlock, Modulation, StreamBlock, timestep_embedding
from model.mmdit import MMDiT

TOGETHER = 16
"""Sigmas whose modulations are computed together. Always so many, some for nothing: rounding depends on how many rows a
matrix product has."""

CONTEXTS = 64
"""Embedded texts that are kept."""


@dataclass(frozen=True)
class Choice:
    """How one shape runs fastest; the result is the same but for rounding.

    attention : see kernels.attention.BACKENDS
    apart : attention's products for each picture alone, straight into and out of the joint layout; but for the text's
        way out, whose rows are too few to fill a GPU
    mlp_apart : the MLP's first product for each picture alone
    beside : the text stream's products run beside the image's, on a CUDA stream of their own
    """

    attention: str = "default"
    apart: bool = False
    mlp_apart: bool = False
    beside: bool = False


class Places(NamedTuple):
    """Where a block's modulations stand in the row of all of them: first shift, scale, gate, then as the block has."""

    image: tuple[slice, ...]
    text: tuple[slice, ...]


class Stream(NamedTuple):
    """A residual stream, and its normed inputs of the next block: one, or two where its attention is dual."""

    x: Tensor  # shape = (batch, tokens, hidden)
    inputs: tuple[Tensor | Rows, ...]  # shape = (batch * tokens, hidden) each


class FastMMDiT:
    """A faster way through an MMDiT's weights."""

    def __init__(self, mmdit: MMDiT) -> None:
        self.mmdit, self.config = mmdit, mmdit.config
        self.blocks: list[JointBlock] = list(mmdit.joint_blocks)  # type: ignore[arg-type]
        self.places, self.final_place, self.width = _places(self.blocks, mmdit.final_layer.adaLN_modulation)
        self.norms = [_norms(block.x_block.attn, block.context_block.attn) for block in self.blocks]
        self.norms2 = [_norms(block.x_block.attn2) if block.dual else None for block in self.blocks]
        self._side: torch.cuda.Stream | None = None

    @property
    def precision(self) -> str:
        """Of the image stream's products: bf16 (or whatever the weights have) or fp8."""
        return "fp8" if isinstance(self.blocks[0].x_block.attn.qkv, Fp8Linear) else "bf16"

    @property
    def modulations(self) -> Iterator[Modulation]:
        """In the order of their places."""
        for block in self.blocks:
            yield block.x_block.adaLN_modulation
            yield block.context_block.adaLN_modulation
        yield self.mmdit.final_layer.adaLN_modulation

    def modulation(self, sigmas: Tensor, pooled: Tensor) -> Tensor:
        """All modulations at some sigmas, of one text or of one for each sigma; shape = (sigmas, width).

        sigmas : shape = (sigmas,), fp32
        pooled : shape = (pooled_dim,) or (sigmas, pooled_dim)
        """
        mmdit, dtype = self.mmdit, self.mmdit.context_embedder.weight.dtype
        embedded = mmdit.t_embedder(timestep_embedding(1000 * sigmas, TIMESTEP_DIM).to(dtype))
        c = F.silu(embedded + mmdit.y_embedder(pooled.view(-1, pooled.shape[-1]).to(dtype)))
        return torch.cat([modulation[1](c) for modulation in self.modulations], dim=1)

    def embed(self, context: Tensor) -> Tensor:
        """A text's sequence as the blocks take it; shape = (tokens, context_dim) -> (tokens, hidden)."""
        layer = self.mmdit.context_embedder
        return layer(context.to(layer.weight.dtype))

    def __call__(self, x: Tensor, modulation: Tensor, context: Tensor, choice: Choice) -> Tensor:
        """The velocity of noised latents, as MMDiT gives it.

        x : shape = (batch, 16, h/8, w/8), in the weights' dtype
        modulation : shape = (batch, width), contiguous
        context : shape = (batch, tokens, hidden), embedded, contiguous
        """
        mmdit = self.mmdit
        rows, columns = x.shape[-2] // self.config.patch, x.shape[-1] // self.config.patch
        tokens = self.patched(x, rows, columns)
        run = _Run(self, modulation, choice, len(x), tokens.shape[1], context.shape[1])
        tokens = run.blocks(tokens, context)
        return mmdit.unpatchify(mmdit.final_layer.linear(tokens).unflatten(0, (len(x), -1)), rows, columns)

    def patched(self, x: Tensor, rows: int, columns: int) -> Tensor:
        """Latents as tokens with their positions, by one matrix product; shape = (batch, rows * columns, hidden)."""
        conv, p = self.mmdit.x_embedder.proj, self.config.patch
        patches = (
            x.unflatten(2, (rows, p)).unflatten(4, (columns, p)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        )
        assert conv.bias is not None
        places = (self.mmdit.positions(rows, columns) + conv.bias).to(x.dtype)
        weight = conv.weight.flatten(1).t()
        return torch.baddbmm(places.expand(len(x), -1, -1), patches, weight.expand(len(x), -1, -1))

    def side(self, device: torch.device) -> torch.cuda.Stream:
        """The stream of the text's products."""
        self._side = self._side or torch.cuda.Stream(device)
        return self._side


class _Run:
    """One pass."""

    def __init__(self, fast: FastMMDiT, modulation: Tensor, choice: Choice, batch: int, image: int, text: int) -> None:
        self.fast, self.modulation, self.choice = fast, modulation, choice
        self.batch, self.image, self.text = batch, image, text

    def at(self, place: slice) -> Tensor:
        return self.modulation[:, place]

    def wanted(self, n: int) -> tuple[list[Modulated], list[Modulated], bool]:
        """How the streams go into block n, past the last into the final layer: image, text, if the image's is fp8."""
        if n == len(self.fast.blocks):
            shift, scale = self.fast.final_place
            return [Modulated(self.at(shift), self.at(scale))], [], False
        places, block = self.fast.places[n], self.fast.blocks[n]
        image = [Modulated(self.at(places.image[0]), self.at(places.image[1]))]
        if block.dual:
            image.append(Modulated(self.at(places.image[6]), self.at(places.image[7])))
        text = [Modulated(self.at(places.text[0]), self.at(places.text[1]))]
        return image, text, isinstance(block.x_block.attn.qkv, Fp8Linear)

    def blocks(self, x: Tensor, context: Tensor) -> Tensor:
        """All blocks; returns what the final layer's product takes, shape = (batch * tokens, hidden)."""
        image_wanted, text_wanted, fp8 = self.wanted(0)
        image = Stream(*add_and_norm(x, (), image_wanted, fp8))
        text = Stream(*add_and_norm(context, (), text_wanted))
        for n in range(len(self.fast.blocks)):
            image, text = self.block(n, image, text)
        (final,) = image.inputs
        assert isinstance(final, Tensor)
        return final

    def block(self, n: int, image: Stream, text: Stream) -> tuple[Stream, Stream]:
        """Both streams after block n."""
        block, places = self.fast.blocks[n], self.fast.places[n]
        text_block, (_, wanted, _) = block.context_block, self.wanted(n + 1)
        attended = self.attend(n, image.inputs[0], text.inputs[0])

        def text_stream() -> Stream:
            if block.last:  # nobody reads the text after it
                return Stream(text.x, ())
            branch = self.projected(text_block.attn.proj, attended[:, self.image :], places.text[2], apart=False)
            return self.finish(text_block, text.x, [branch], places.text, wanted, False)

        # Nothing that one stream made is freed before the streams have met again: no record_stream is needed. So what
        # came in keeps its names, here and in `blocks`.
        with self.beside() as side:
            if side:
                with torch.cuda.stream(side):
                    next_text = text_stream()
            next_image = self.image_stream(n, image, attended)
        if not side:
            next_text = text_stream()
        return next_image, next_text

    def image_stream(self, n: int, image: Stream, attended: Tensor) -> Stream:
        """The image after block n."""
        block, places = self.fast.blocks[n], self.fast.places[n]
        image_block, apart = block.x_block, self.choice.apart
        wanted, _, fp8 = self.wanted(n + 1)
        branches = [self.projected(image_block.attn.proj, attended[:, : self.image], places.image[2], apart)]
        if block.dual:
            # The second attention sees the same normed input as the first, not its result.
            branches.append(
                self.projected(image_block.attn2.proj, self.attend_alone(n, image.inputs[1]), places.image[8], apart)
            )
        return self.finish(image_block, image.x, branches, places.image, wanted, fp8)

    @contextmanager
    def beside(self) -> Iterator[torch.cuda.Stream | None]:
        """A stream for the text that begins here and is waited for at the end; None where the choice is another."""
        if not self.choice.beside or not self.modulation.is_cuda:
            yield None
            return
        side = self.fast.side(self.modulation.device)
        side.wait_stream(torch.cuda.current_stream())
        try:
            yield side
        finally:
            torch.cuda.current_stream().wait_stream(side)

    def attend(self, n: int, image: Tensor | Rows, text: Tensor | Rows) -> Tensor:
        """The joint attention of block n; shape = (batch, queries, hidden), the image's first."""
        block, fast = self.fast.blocks[n], self.fast
        image_attn, text_attn = block.x_block.attn, block.context_block.attn
        heads, tokens = image_attn.heads, self.image + self.text
        if self.choice.apart:
            joint = self.modulation.new_empty((self.batch, tokens, 3 * fast.config.hidden))
            qkv = joint.unflatten(-1, (3, heads, -1))
            for b in range(self.batch):
                product(image_attn.qkv, _part(image, b, self.batch), joint[b, : self.image])
                product(text_attn.qkv, _part(text, b, self.batch), joint[b, self.image :])
                norm_heads(qkv[b : b + 1], fast.norms[n], self.image)  # while the GPU's cache still has most of it
        else:
            parts = (self.product(image_attn.qkv, image), self.product(text_attn.qkv, text))
            shaped = [part.view(self.batch, -1, 3, heads, fast.config.hidden // heads) for part in parts]
            qkv = joined_heads(shaped[0], shaped[1], fast.norms[n])
        q, k, v = qkv.unbind(2)
        return attend(self.choice.attention, q[:, : self.image] if block.last else q, k, v)

    def attend_alone(self, n: int, image: Tensor | Rows) -> Tensor:
        """The second attention of block n, over the image's tokens alone; shape = (batch, tokens, hidden)."""
        attn = self.fast.blocks[n].x_block.attn2
        qkv = self.product(attn.qkv, image)
        shaped = qkv.view(self.batch, self.image, 3, attn.heads, self.fast.config.hidden // attn.heads)
        q, k, v = norm_heads(shaped, self.fast.norms2[n], self.image).unbind(2)
        return attend(self.choice.attention, q, k, v)

    def projected(self, layer: nn.Module, attended: Tensor, gate: slice, apart: bool) -> Branch:
        """What attention gives to a stream. attended : shape = (batch, tokens, hidden), a part of the joint tokens."""
        batch, tokens, hidden = attended.shape
        out, bias = self.modulation.new_empty((batch, tokens, hidden)), None
        if isinstance(layer, Fp8Linear):
            product(layer, quantized(attended), out.flatten(0, 1))
        elif batch == 1 or attended.is_contiguous():
            product(layer, attended.reshape(batch * tokens, hidden), out.flatten(0, 1))
        elif apart:
            for b in range(batch):
                product(layer, attended[b], out[b])
        else:  # one product for all, without the bias: with it the parts would have to be copied together
            weight, bias = layer.get_parameter("weight"), layer.get_parameter("bias")
            torch.bmm(attended, weight.t().expand(batch, -1, -1), out=out)
        return Branch(self.at(gate), out, bias)

    def product(self, layer: nn.Module, x: Tensor | Rows) -> Tensor:
        """shape = (rows, in) -> (rows, out)."""
        rows = len(x.values if isinstance(x, Rows) else x)
        return product(layer, x, self.modulation.new_empty((rows, len(layer.get_parameter("weight")))))

    def gelu_product(self, layer: nn.Linear, x: Tensor) -> Tensor:
        """The MLP's first product and GELU; shape = (rows, in) -> (rows, out)."""
        parts = x.chunk(self.batch) if self.choice.mlp_apart and len(x) == self.batch * self.image else (x,)
        out = x.new_empty((len(x), layer.out_features))
        for part, its in zip(parts, out.chunk(len(parts)), strict=True):
            gelu_product(layer, part, its)
        return out

    def finish(
        self,
        block: StreamBlock,
        x: Tensor,
        branches: Sequence[Branch],
        places: tuple[slice, ...],
        wanted: Sequence[Modulated],
        fp8: bool,
    ) -> Stream:
        """The residuals after attention and after the MLP; `wanted` and `fp8` are of what comes next."""
        inner = isinstance(block.mlp.fc1, Fp8Linear)
        x, (normed,) = add_and_norm(x, branches, [Modulated(self.at(places[3]), self.at(places[4]))], inner)
        hidden: Tensor | Rows
        if isinstance(normed, Rows):
            hidden = gelu_quantized(self.product(block.mlp.fc1, normed))
        else:
            hidden = self.gelu_product(block.mlp.fc1, normed)
        value = self.product(block.mlp.fc2, hidden).view_as(x)
        return Stream(*add_and_norm(x, [Branch(self.at(places[5]), value)], wanted, fp8))


def product(layer: nn.Module, x: Tensor | Rows, out: Tensor) -> Tensor:
    """A linear layer, written to `out`: shape = (rows, in) -> (rows, out)."""
    if isinstance(layer, Fp8Linear):
        assert isinstance(x, Rows)
        return layer.product(x, out)
    assert isinstance(layer, nn.Linear)
    assert isinstance(x, Tensor)
    return torch.addmm(layer.bias, x, layer.weight.t(), out=out)


def gelu_product(layer: nn.Linear, x: Tensor, out: Tensor) -> Tensor:
    """A linear layer and GELU (tanh), in one kernel on CUDA, written to `out`; shape = (rows, in) -> (rows, out)."""
    if x.is_cuda:
        return torch._addmm_activation(layer.bias, x, layer.weight.t(), use_gelu=True, out=out)
    return out.copy_(F.gelu(layer(x), approximate="tanh"))


def _part(x: Tensor | Rows, b: int, batch: int) -> Tensor | Rows:
    """The rows of picture b of a batch."""
    if isinstance(x, Rows):
        return Rows(x.values.chunk(batch)[b], x.scales.chunk(batch)[b])
    return x.chunk(batch)[b]


def _places(blocks: Sequence[JointBlock], final: Modulation) -> tuple[list[Places], tuple[slice, slice], int]:
    """Of each block, of the final layer, and how long the row is."""
    end = 0

    def next_places(modulation: Modulation) -> tuple[slice, ...]:
        nonlocal end
        width: int = modulation[1].out_features // modulation.chunks  # type: ignore[assignment, operator]
        begun, end = end, end + modulation.chunks * width
        return tuple(slice(start, start + width) for start in range(begun, end, width))

    places = [
        Places(next_places(block.x_block.adaLN_modulation), next_places(block.context_block.adaLN_modulation))
        for block in blocks
    ]
    shift, scale = next_places(final)
    return places, (shift, scale), end


def _norms(*streams: Attention) -> Tensor | None:
    """The weights of the norms of queries and keys; shape = (2, 2, head_dim). One stream stands for both."""
    if not isinstance(streams[0].ln_q, nn.RMSNorm):
        return None
    weights = [
        torch.stack([attn.ln_q.get_parameter("weight"), attn.ln_k.get_parameter("weight")])
        for attn in (*streams, streams[0])
    ]
    return torch.stack(weights[:2])


class Conditions:
    """What a text and a sigma are to the blocks, kept: the empty negative prompt is everyone's.

    limit : bytes of modulations to keep at most; those of one call are kept in any case
    """

    def __init__(self, fast: FastMMDiT, limit: int = 2**29) -> None:
        self.fast, self.limit = fast, limit
        self._modulations: OrderedDict[tuple[int, float], tuple[Text, Tensor]] = OrderedDict()
        self._contexts: OrderedDict[int, tuple[Text, Tensor]] = OrderedDict()

    def modulation(self, text: Text, sigma: float, sigmas: Sequence[float]) -> Tensor:
        """shape = (width,). `sigmas`: those of the whole run, of which the coming ones are computed too."""
        key = (id(text), sigma)
        if key not in self._modulations:
            first = sigmas.index(sigma) // TOGETHER * TOGETHER if sigma in sigmas else 0
            together = sigmas[first : first + TOGETHER] if sigma in sigmas else (sigma,)
            padded = [*together, *[together[-1]] * (TOGETHER - len(together))]
            device = self.fast.mmdit.pos_embed.device
            rows = self.fast.modulation(torch.tensor(padded, device=device), text.pooled)
            for one, row in zip(together, rows, strict=False):
                self._modulations[id(text), one] = (text, row.clone())  # not a part of what is larger
            self._shrink(len(together), rows.shape[1] * rows.element_size())
        self._modulations.move_to_end(key)
        return self._modulations[key][1]

    def context(self, text: Text) -> Tensor:
        """shape = (tokens, hidden)."""
        if id(text) not in self._contexts:
            self._contexts[id(text)] = (text, self.fast.embed(text.context))
            while len(self._contexts) > CONTEXTS:
                self._contexts.popitem(last=False)
        self._contexts.move_to_end(id(text))
        return self._contexts[id(text)][1]

    def _shrink(self, newest: int, each: int) -> None:
        """Lets go of the oldest."""
        while len(self._modulations) > max(newest, self.limit // each):
            self._modulations.popitem(last=False)
