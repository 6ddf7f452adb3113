"""All that flow matching trains, as one module: new, of a bundle, or of an earlier run."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoTokenizer

from model.bundle import TOKENIZERS
from model.card import card_at
from model.checkpoint import load_components
from model.config import MMDiTConfig
from model.mmdit import MMDiT
from model.text import T5_LENGTH as FULL_T5_LENGTH
from model.training.demo import DEMO_MMDIT, T5_LENGTH, Reader, TextTower, new_mmdit, new_tower
from model.training.loop import load_shards, read_record
from model.training.scenes import DATA_VERSION, drawn_alike
from model.training.tokenizers import Tokenizers


class FlowNet(nn.Module):
    """The MMDiT and the text encoders."""

    def __init__(self, mmdit: MMDiT, tower: TextTower, t5_length: int = T5_LENGTH) -> None:
        super().__init__()
        self.mmdit, self.tower, self.t5_length = mmdit, tower, t5_length

    @property
    def count(self) -> int:
        """Parameters."""
        return sum(p.numel() for p in self.parameters())

    def reader(self) -> Reader:
        """Captions to the ids that the net takes."""
        return Reader(self.tower.encoders(), self.t5_length)

    def forward(self, latents: Tensor, noise: Tensor, sigma: Tensor, tokens: tuple[Tensor, ...]) -> Tensor:
        """The flow matching loss, a scalar. Latents and noise: shape = (batch, 16, h/8, w/8); sigma: (batch,)."""
        return self.loss(latents, noise, sigma, *self.tower(*tokens))

    def loss(self, latents: Tensor, noise: Tensor, sigma: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
        """The same from encoded text."""
        share = sigma[:, None, None, None]
        velocity = self.mmdit((1 - share) * latents + share * noise, 1000 * sigma, context, pooled)
        return F.mse_loss(velocity.float(), noise - latents)


def new_net(config: MMDiTConfig = DEMO_MMDIT, tokenizers: Tokenizers | None = None) -> FlowNet:
    """Random weights; without tokenizers with those of the drawings."""
    return FlowNet(new_mmdit(config), new_tower(tokenizers))


def bundle_net(folder: Path) -> FlowNet:
    """That of a bundle in the diffusers layout, to be trained further. Errors: CheckpointError, ValueError."""
    parts = load_components(folder, "cpu", torch.float32)
    if parts.text.t5 is None:
        raise ValueError(f"{folder} has no T5 encoder; training needs all three")
    net = FlowNet(parts.mmdit, TextTower.of(parts.text), card_at(folder).get("t5_length", FULL_T5_LENGTH))
    net.train().requires_grad_(True)
    net.tower.clip_l.text_projection.requires_grad_(False)
    return net


def run_net(folder: Path) -> FlowNet:
    """That of a run's folder, with random or its bundle's weights. Errors: ValueError for one of other drawings."""
    record = read_record(folder)
    if record.get("start"):
        return bundle_net(Path(record["start"]))
    config = MMDiTConfig(**{**record["config"], "dual_blocks": tuple(record["config"]["dual_blocks"])})
    tokenizers = saved_tokenizers(folder)
    if tokenizers is None and not drawn_alike(record["data_version"], DATA_VERSION):
        version = record["data_version"]
        raise ValueError(f"{folder} was trained on drawings of version {version}, this code draws {DATA_VERSION}")
    return new_net(config, tokenizers)


def load_net(folder: Path) -> FlowNet:
    """The averaged net of a run's folder."""
    net = run_net(folder)
    load_average(net, folder)
    return net


def load_average(net: FlowNet, folder: Path) -> None:
    """The averaged weights of a run, in place."""
    state = load_shards(folder, "flow")
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(state[name])


def save_tokenizers(net: FlowNet, folder: Path) -> None:
    """Beside the weights of a run whose captions are not the drawings'."""
    for name, tokenizer in zip(TOKENIZERS, net.tower.tokenizers, strict=True):
        tokenizer.save_pretrained(folder / name)


def saved_tokenizers(folder: Path) -> Tokenizers | None:
    """Those of a run, if it has any of its own."""
    if not (folder / TOKENIZERS[0]).is_dir():
        return None
    clip_l, clip_g, t5 = (
        AutoTokenizer.from_pretrained(folder / name, local_files_only=True, trust_remote_code=False)
        for name in TOKENIZERS
    )
    return clip_l, clip_g, t5
