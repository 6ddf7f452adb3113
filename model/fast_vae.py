"""The VAE's decoder for CUDA: channels last throughout, convolutions with only fused passes between them.

It does what model.vae.Decoder does. Elsewhere than on CUDA the fused passes are plain ones, so that it can be tested.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.kernels import groupnorm
from model.vae import VAE, AttnBlock, ResnetBlock, channels_last

MAX_PIXELS = 1536 * 1536
"""Of a picture that is decoded with whole activations by default."""

STRIP_VALUES = 2**25
"""Values of the input of a convolution that is done in strips."""

SCORES_BYTES = 2**28
"""Of the attention scores that exist at a time, in fp32."""

MAX_QUERIES = 1024
"""Whose scores exist at a time: enough for full speed, few enough that most scores of small pictures stay in cache."""

RGB_CHANNELS = 8
"""Output channels of the last convolution, padded: tensor cores take no three."""

Fill = Callable[[int, int, Tensor], object]
"""Writes lines [first, last) of a convolution's input to where they shall be."""


@dataclass
class _Stream:
    """What flows from block to block: x + h + bias, where h and bias may be None.

    It is changed in place, so that no caller's variable holds a large tensor longer than needed.
    """

    x: Tensor  # shape = (1 or batch, h, w, channels)
    h: Tensor | None = None
    bias: Tensor | None = None
    parts: Tensor | None = None  # the statistics of x, if they are known

    def settled(self) -> Tensor:
        """Adds h and with it the bias to x; without h the bias stays to be added. Returns the statistics of x."""
        if self.h is None:
            parts, self.parts = self.parts, None
            return groupnorm.statistics(self.x) if parts is None else parts
        self.x, parts = groupnorm.add(self.x, self.h, self.bias, out=self.h)
        self.h = self.bias = None
        return parts

    def value(self) -> Tensor:
        """x, when all is in it."""
        if self.h is not None:
            self.settled()
        if self.bias is not None:
            self.x, self.bias = self.x + self.bias.to(self.x.dtype), None
        return self.x


class FastDecoder:
    """Latents to 8-bit pictures.

    With U = width * height * channels of the finest level * bytes of a value (256 MiB at 1024 x 1024 in bf16), the peak
    of memory beside the weights and the convolutions' own workspace is 5 U: the first block of the finest level reads
    2 U, has 2 U normalised and writes U. Beyond `max_pixels` convolutions go strip by strip, with one line of the
    neighbours on each side, and only a strip is normalised: 3 U + 3 strips of STRIP_VALUES. Statistics are of the whole
    picture either way, so there are no seams: the results differ by rounding alone.

    vae : its decoder's weights are laid out with the channels last; they are shared, but for 2 MB, and 19 MB if folded
    fold : the convolutions after an upsampling take the small picture, with weights that are sums, rounded once more
    max_pixels : of a picture that is done whole
    strip_values : see STRIP_VALUES
    """

    def __init__(
        self, vae: VAE, *, fold: bool = True, max_pixels: int = MAX_PIXELS, strip_values: int = STRIP_VALUES
    ) -> None:
        self.vae, self.max_pixels, self.strip_values = vae, max_pixels, strip_values
        channels_last(vae.decoder)
        attention = vae.decoder.mid.attn_1
        with torch.no_grad():
            parts = (attention.q, attention.k, attention.v)
            self._qkv = torch.cat([conv.weight.flatten(1) for conv in parts])
            self._qkv_bias = torch.cat([_bias(conv) for conv in parts]).to(self._qkv.dtype)
            last, padding = vae.decoder.conv_out, RGB_CHANNELS - vae.decoder.conv_out.out_channels
            self._rgb = F.pad(last.weight, (0, 0, 0, 0, 0, 0, 0, padding)).contiguous(memory_format=torch.channels_last)
            self._rgb_bias = _bias(last)
            self._biases = dict(self._left_out())
            upsamplings = [conv for _, conv in self._levels() if conv] if fold else []
            self._folded = {conv: folded(conv.weight) for conv in upsamplings}

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """The MMDiT's latents as 8-bit RGB: shape = (batch, 16, h/8, w/8) -> (batch, h, w, 3), uint8.

        Launches the same kernels whatever the values are, so that a CUDA graph can hold it.
        """
        dtype = self.vae.decoder.conv_in.weight.dtype
        z = self.vae.from_model(latents).to(dtype).permute(0, 2, 3, 1).contiguous()
        if self._whole(z):
            return self._decoded(z)
        return torch.cat([self._decoded(one) for one in z.split(1)])

    @torch.no_grad()
    def prepare(self) -> None:
        """Compile what pictures of any size need, so that no request waits for a compiler."""
        weight = self.vae.decoder.conv_in.weight
        few = weight.new_zeros(1, self.vae.config.latent_channels, 8, 8)
        self.decode(few)
        FastDecoder(self.vae, max_pixels=1, strip_values=self.strip_values).decode(few)  # in strips
        for positions in (4096, 4100):  # multiples of sixteen, and others
            groupnorm.softmax(torch.zeros(1, 1, positions, device=weight.device), 1.0, weight.dtype)

    def _whole(self, z: Tensor) -> bool:
        scale = 2 ** (len(self.vae.config.channels) - 1)
        return z.shape[1] * z.shape[2] * scale * scale <= self.max_pixels

    def _decoded(self, z: Tensor) -> Tensor:
        """Raw latents, shape = (batch, h/8, w/8, 16); a batch of one where they are not done whole."""
        net, values = self.vae.decoder, None if self._whole(z) else self.strip_values
        stream = _Stream(_conv(z, net.conv_in.weight), bias=net.conv_in.bias)
        self._residual(stream, net.mid.block_1, values)
        self._attend(stream, net.mid.attn_1)
        self._residual(stream, net.mid.block_2, values)
        for blocks, upsampling in self._levels():
            for block in blocks:
                self._residual(stream, block, values)
            if upsampling:
                self._upsample(stream, upsampling, values)
        factor_term = _affine(stream.settled(), stream.bias, net.norm_out)
        return groupnorm.rgb(_normed_conv(stream.x, factor_term, self._rgb, values, spent=True), self._rgb_bias)

    def _residual(self, stream: _Stream, block: ResnetBlock, values: int | None) -> None:
        factor_term = _affine(stream.settled(), stream.bias, block.norm1)
        h = _normed_conv(stream.x, factor_term, block.conv1.weight, values)
        factor_term = _affine(groupnorm.statistics(h), block.conv1.bias, block.norm2)
        h = _normed_conv(h, factor_term, block.conv2.weight, values, spent=True)
        if hasattr(block, "nin_shortcut"):
            h.view(-1, h.shape[-1]).addmm_(stream.x.flatten(0, 2), block.nin_shortcut.weight.flatten(1).t())
            stream.x = h
        else:
            stream.h = h
        stream.bias = self._biases[block]

    def _attend(self, stream: _Stream, block: AttnBlock) -> None:
        factor_term = _affine(stream.settled(), stream.bias, block.norm)
        normed = groupnorm.apply(stream.x, factor_term, silu=False)
        q, k, v = F.linear(normed.flatten(1, 2), self._qkv, self._qkv_bias).chunk(3, dim=-1)
        stream.h = F.linear(attention(q, k, v), block.proj_out.weight.flatten(1)).view_as(normed)
        stream.bias = self._biases[block]

    def _upsample(self, stream: _Stream, conv: nn.Conv2d, values: int | None) -> None:
        """Doubles both sides: nearest neighbour, then the convolution, whose bias is left out."""
        if values is None and conv in self._folded:
            stream.x, stream.parts = groupnorm.woven(_conv(stream.value(), self._folded[conv]))
        else:
            _double(stream, conv.weight, values)
        stream.bias = conv.bias

    def _levels(self) -> Iterator[tuple[Sequence[ResnetBlock], nn.Conv2d | None]]:
        """The residual blocks of each resolution, from coarse to fine, and the convolution on the way to the next."""
        for level in reversed(self.vae.decoder.up):
            net: Any = level
            yield net.block, net.upsample.conv if hasattr(net, "upsample") else None

    def _left_out(self) -> Iterator[tuple[nn.Module, Tensor]]:
        """What is still to be added after each block, in fp32: the biases of its own convolutions and of its input."""
        net = self.vae.decoder
        stages: list[tuple[Sequence[ResnetBlock | AttnBlock], nn.Conv2d | None]]
        stages = [((net.mid.block_1, net.mid.attn_1, net.mid.block_2), None), *self._levels()]
        before: Tensor | None = _bias(net.conv_in)
        for blocks, upsampling in stages:
            for block in blocks:
                bias = _bias(block.proj_out if isinstance(block, AttnBlock) else block.conv2)
                shortcut: nn.Conv2d | None = getattr(block, "nin_shortcut", None)
                if shortcut:
                    bias = bias + _bias(shortcut)
                    if before is not None:
                        bias = bias + shortcut.weight.flatten(1).float() @ before
                    before = bias  # it goes on: there is no addition that would take it along
                else:
                    bias, before = bias if before is None else bias + before, None
                yield block, bias
            if upsampling:
                before = _bias(upsampling)


def attention(q: Tensor, k: Tensor, v: Tensor, scores_bytes: int = SCORES_BYTES) -> Tensor:
    """Softmax attention of one head of any width, so many queries at a time that their scores are within a bound.

    PyTorch's fast backends end at heads of 256. In 16 bit the scores stay in fp32 up to their softmax.

    q, k, v : shape = (batch, positions, channels), rows may lie apart; and the result, contiguous
    """
    batch, positions, channels = q.shape
    queries = max(1, min(MAX_QUERIES, scores_bytes // (4 * batch * positions)))
    out = q.new_empty(q.shape)
    for first in range(0, positions, queries):
        scores = _scores(q[:, first : first + queries], k)
        out[:, first : first + queries] = torch.bmm(groupnorm.softmax(scores, channels**-0.5, v.dtype), v)
    return out


def _scores(q: Tensor, k: Tensor) -> Tensor:
    if q.is_cuda and q.dtype != torch.float32:
        return torch.bmm(q, k.mT, out_dtype=torch.float32)
    return torch.bmm(q, k.mT)


def _bias(conv: nn.Conv2d) -> Tensor:
    assert conv.bias is not None
    return conv.bias.float()


def _affine(parts: Tensor, bias: Tensor | None, norm: nn.GroupNorm) -> Tensor:
    return groupnorm.affine(parts, bias, norm.weight, norm.bias, norm.num_groups, norm.eps)


def _conv(x: Tensor, weight: Tensor, padding: tuple[int, int] = (1, 1)) -> Tensor:
    """A 3x3 convolution without bias: shape = (batch, h, w, channels), in and out."""
    return F.conv2d(x.permute(0, 3, 1, 2), weight, padding=padding).permute(0, 2, 3, 1).contiguous()


def _normed_conv(x: Tensor, factor_term: Tensor, weight: Tensor, values: int | None, spent: bool = False) -> Tensor:
    """The convolution, without its bias, of SiLU(x * factor + term).

    values : of the input of a strip; None: all at once
    spent : x is not needed any more: it is overwritten
    """
    lines = _lines(x.shape[1], x.shape[2] * x.shape[3], values)
    if lines == x.shape[1]:
        return _conv(groupnorm.apply(x, factor_term, out=x if spent else None), weight)
    out = x if spent and len(weight) == x.shape[3] else x.new_empty((*x.shape[:3], len(weight)))

    def fill(first: int, last: int, to: Tensor) -> None:
        groupnorm.apply(x[:, first:last], factor_term, out=to)

    return _in_strips(fill, x.shape[3], weight, lines, out)


def _double(stream: _Stream, weight: Tensor, values: int | None) -> None:
    """Nearest neighbour, then the convolution without its bias, neither folded into the other."""
    height, width, channels = 2 * stream.x.shape[1], 2 * stream.x.shape[2], stream.x.shape[3]
    lines = _lines(height, width * channels, values)
    if lines == height:
        stream.x, stream.h = groupnorm.add_upsampled(stream.x, stream.h, stream.bias), None
        stream.x = _conv(stream.x, weight)
        return
    small = stream.value()

    def fill(first: int, last: int, to: Tensor) -> None:
        top = first // 2
        large = groupnorm.add_upsampled(small[:, top : (last + 1) // 2], None, None)
        to.copy_(large[:, first - 2 * top : last - 2 * top])

    stream.x = _in_strips(fill, channels, weight, lines, small.new_empty((1, height, width, len(weight))))


def folded(weight: Tensor) -> Tensor:
    """A 3x3 convolution of a picture that was doubled, as a 2x2 convolution of the small one: 4/9 of the work.

    Three pixels in a row are two of the small picture, one of them twice, so weights add up; which ones depends on
    whether the middle one has an even place. groupnorm.woven puts the four kinds together.

    weight : shape = (out, in, 3, 3)
    returns : shape = (4 * out, in, 2, 2); for even and odd rows, then for even and odd columns
    """
    taps = weight.new_tensor([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], dtype=torch.float32)
    both = torch.einsum("akr,blc,oirc->aboikl", taps, taps, weight.float())
    return both.flatten(0, 2).to(weight.dtype).contiguous(memory_format=torch.channels_last)


def _lines(height: int, line: int, values: int | None) -> int:
    """How many lines of so many values are done at once."""
    return height if values is None else max(1, min(height, values // line))


def _in_strips(fill: Fill, channels: int, weight: Tensor, lines: int, out: Tensor) -> Tensor:
    """A 3x3 convolution without bias, strip by strip.

    fill : writes lines of the input; it may read them from `out`, which is written only when nobody needs them
    channels : of the input
    out : shape = (1, h, w, output channels)
    """
    height, width = out.shape[1:3]

    def strip(first: int) -> Tensor:
        """The input of so many lines and of one neighbour each side; beyond the edges there are zeros."""
        last = min(first + lines, height)
        above, below = int(first > 0), int(last < height)
        made = out.new_empty((1, last - first + 2, width, channels))
        if not above:
            made[:, 0].zero_()
        if not below:
            made[:, -1].zero_()
        fill(first - above, last + below, made[:, 1 - above : last - first + 1 + below])
        return made

    coming = strip(0)
    for first in range(0, height, lines):
        now = coming
        if first + lines < height:
            coming = strip(first + lines)  # before its upper neighbour is overwritten
        out[:, first : first + lines] = _conv(now, weight, padding=(0, 1))
    return out
