"""Large and Medium at full size with random weights, by hand on one GPU: python -m tests.gpu.full_size

For each: a 1024 x 1024 picture end to end in bf16, and the error of one bf16 forward against the fp32 model (TF32 off)
for ours and for diffusers on the same weights, median over some draws. Medium is written and loaded again too.
Prints one JSON object; exits with 1 if ours is off by more than 1.1 times as much as diffusers, or a picture is broken.
`--tiny` tries the script itself, anywhere.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from model.checkpoint import export_diffusers, load_components
from model.config import VARIANTS, MMDiTConfig, VAEConfig
from model.keys import mmdit_rules
from model.layers import position_table
from model.mmdit import MMDiT
from model.params import GenerationParams
from model.pipeline import Pipeline, generate, run
from model.text import TextEncoders
from model.vae import VAE
from tests.model import tiny

LIMIT = 1.1
STD = 0.02  # of every weight, the modulations' too: zeros would switch blocks off

N = TypeVar("N", bound=nn.Module)


@dataclass(frozen=True)
class Size:
    """What is built."""

    name: str
    mmdit: MMDiTConfig
    vae: VAEConfig
    side: int  # pixels
    t5_length: int
    steps: int
    guidance_scale: float
    encoders: Callable[[], tuple[CLIPTextModelWithProjection, CLIPTextModelWithProjection, T5EncoderModel]]


def full_encoders() -> tuple[CLIPTextModelWithProjection, CLIPTextModelWithProjection, T5EncoderModel]:
    """CLIP-L, CLIP-G and T5-XXL v1.1 as published."""
    clip_l = CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768,
        vocab_size=49408, hidden_act="quick_gelu", eos_token_id=2,
    )  # fmt: skip
    clip_g = CLIPTextConfig(
        hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, projection_dim=1280,
        vocab_size=49408, hidden_act="gelu", eos_token_id=2,
    )  # fmt: skip
    t5 = T5Config(
        vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu"
    )
    return CLIPTextModelWithProjection(clip_l), CLIPTextModelWithProjection(clip_g), T5EncoderModel(t5)


def tiny_encoders() -> tuple[CLIPTextModelWithProjection, CLIPTextModelWithProjection, T5EncoderModel]:
    """Those of the tests."""
    clip = tiny.clip_tokenizer("!")
    towers = (tiny.clip(clip, width, "gelu") for width in (tiny.CLIP_L_WIDTH, tiny.CLIP_G_WIDTH))
    return (*towers, tiny.t5(tiny.t5_tokenizer()))  # type: ignore[return-value]


def sizes(small: bool) -> list[Size]:
    """What to measure."""
    if small:
        plain = MMDiTConfig(depth=3, hidden=128, heads=2, context_dim=256, pooled_dim=192, pos_embed_grid=24)
        nets = {"large": plain, "medium": tiny.MMDIT_X}
        return [Size(name, net, tiny.TINY_VAE, 64, 77, 4, 4.5, tiny_encoders) for name, net in nets.items()]
    specs = [VARIANTS[name] for name in ("large", "medium")]
    return [Size(s.name, s.mmdit, VAEConfig(), 1024, 256, s.steps, s.guidance_scale, full_encoders) for s in specs]


@contextmanager
def born(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Modules built here are initialised on the device, in the dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)


def randomized(net: N) -> N:
    """Every weight random at sizes that keep activations sane."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, tensor in net.named_parameters():
            tensor.normal_(0, STD)
            if name.endswith("weight") and tensor.ndim == 1:
                tensor.add_(1)
    if isinstance(net, MMDiT):
        net.pos_embed.copy_(position_table(net.config.hidden, net.config.pos_embed_grid))
    return net.requires_grad_(False).eval()


def theirs_with_weights_of(net: MMDiT) -> SD3Transformer2DModel:
    """diffusers' net with our tensors: shared, but for the swapped halves."""
    with torch.device("meta"):
        theirs = tiny.transformer(net.config)
    state = net.state_dict()
    scattered: dict[str, Tensor] = {}
    for rule in mmdit_rules(net.config):
        scattered |= rule.scatter(state[rule.name])
    theirs.load_state_dict(scattered, strict=True, assign=True)
    return theirs.requires_grad_(False)


Inputs = dict[str, Tensor]


def draws(size: Size, count: int) -> list[Inputs]:
    """Inputs on the CPU, exact in bf16 but for the timestep, which is fp32 on both sides."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).bfloat16()

    config, side = size.mmdit, size.side // 8
    return [
        {
            "x": normal(1, 16, side, side),
            "timestep": torch.rand(1, generator=generator) * 1000,
            "context": normal(1, 77 + size.t5_length, config.context_dim),
            "pooled": normal(1, config.pooled_dim),
        }
        for _ in range(count)
    ]


def ours(net: MMDiT, given: Inputs) -> Tensor:
    """Our forward."""
    return net(**given)


def theirs(net: SD3Transformer2DModel, given: Inputs) -> Tensor:
    """diffusers' forward."""
    return net(
        hidden_states=given["x"],
        timestep=given["timestep"],
        encoder_hidden_states=given["context"],
        pooled_projections=given["pooled"],
        return_dict=False,
    )[0]


@torch.inference_mode()
def outputs(
    forward: Callable[[Any, Inputs], Tensor], net: nn.Module, given: list[Inputs], dtype: torch.dtype
) -> list[Tensor]:
    """The velocity of each draw, fp32 on the CPU."""
    device = next(net.parameters()).device

    def on_device(name: str, tensor: Tensor) -> Tensor:
        return tensor.to(device) if name == "timestep" else tensor.to(device, dtype)

    return [forward(net, {n: on_device(n, t) for n, t in one.items()}).float().cpu() for one in given]


def errors(found: list[Tensor], expected: list[Tensor]) -> list[float]:
    """Relative L2 distances."""
    return [float((f - e).norm() / e.norm()) for f, e in zip(found, expected, strict=True)]


def forward_errors(net: MMDiT, size: Size, count: int) -> dict[str, Any]:
    """bf16 errors of both; turns `net` to fp32 on the way."""
    given = draws(size, count)
    bf16 = torch.bfloat16
    found = outputs(ours, net, given, bf16)
    other = theirs_with_weights_of(net)
    found_by_theirs = outputs(theirs, other, given, bf16)
    del other
    net.float()
    with sdpa_kernel(SDPBackend.MATH):
        expected = outputs(ours, net, given, torch.float32)
        parity = errors(outputs(theirs, theirs_with_weights_of(net), given[:1], torch.float32), expected[:1])[0]
    mine, diffusers = errors(found, expected), errors(found_by_theirs, expected)
    return {
        "ours": statistics.median(mine),
        "diffusers": statistics.median(diffusers),
        "ratio": statistics.median(mine) / statistics.median(diffusers),
        "ours_each": mine,
        "diffusers_each": diffusers,
        "fp32_ours_to_diffusers": parity,
    }


def end_to_end(net: MMDiT, size: Size, device: torch.device) -> tuple[dict[str, Any], Pipeline]:
    """One guided picture with random encoders and VAE."""
    with born(device, torch.bfloat16):
        vae = randomized(VAE(size.vae))
        encoders = [encoder.requires_grad_(False).eval() for encoder in size.encoders()]
    tokenizers = (tiny.clip_tokenizer("<|endoftext|>"), tiny.clip_tokenizer("!"), tiny.t5_tokenizer())
    pipeline = Pipeline(net, vae, TextEncoders(*encoders, tokenizers, size.mmdit.context_dim), t5_length=size.t5_length)
    params = GenerationParams(
        prompt="a red cat",
        width=size.side,
        height=size.side,
        steps=size.steps,
        guidance_scale=size.guidance_scale,
        seed=7,
    )
    seconds = []
    for _ in range(2):  # the first one warms up
        start = time.perf_counter()
        pixels = run(generate(params), pipeline).pixels
        seconds.append(time.perf_counter() - start)
    whole = tuple(pixels.shape) == (size.side, size.side, 3) and float(pixels.float().std()) > 1
    result = {
        "picture": list(pixels.shape), "mean": float(pixels.float().mean()), "std": float(pixels.float().std()),
        "ok": whole, "steps": size.steps, "seconds_first": seconds[0], "seconds": seconds[1],
    }  # fmt: skip
    return result, pipeline


def written_and_loaded(pipeline: Pipeline, device: torch.device) -> dict[str, Any]:
    """The weights (without T5) as a diffusers folder, and back onto the device."""
    text = pipeline.text
    tokenizers = (text.clip_l_tokenizer.tokenizer, text.clip_g_tokenizer.tokenizer, None)
    without_t5 = TextEncoders(text.clip_l, text.clip_g, None, tokenizers, text.context_dim)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "bundle"
        start = time.perf_counter()
        export_diffusers(folder, pipeline.mmdit, pipeline.vae, without_t5)
        written = time.perf_counter()
        found = load_components(folder, device, torch.bfloat16)
        loaded = time.perf_counter()
        size = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
    state = found.mmdit.state_dict()
    same = all(torch.equal(state[name], tensor) for name, tensor in pipeline.mmdit.state_dict().items())
    return {
        "gb": size / 1e9,
        "write_s": written - start,
        "load_s": loaded - written,
        "same": same,
        "variant": found.variant,
    }


def measured(size: Size, device: torch.device, count: int) -> dict[str, Any]:
    """All figures of one variant."""
    start = time.perf_counter()
    with born(device, torch.bfloat16):
        net = randomized(MMDiT(size.mmdit))
    result: dict[str, Any] = {"parameters": sum(p.numel() for p in net.parameters())}
    result["end_to_end"], pipeline = end_to_end(net, size, device)
    if size.name == "medium":
        result["loading"] = written_and_loaded(pipeline, device)
    del pipeline
    released(device)
    result["forward_error"] = forward_errors(net, size, count)
    result["seconds"] = time.perf_counter() - start
    if device.type == "cuda":
        result["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        torch.cuda.reset_peak_memory_stats()
    return result


def released(device: torch.device) -> None:
    """Give back what nothing holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def passed(result: dict[str, Any]) -> bool:
    """Whether one variant is as good as it must be."""
    return (
        result["end_to_end"]["ok"]
        and result["forward_error"]["ratio"] <= LIMIT
        and result.get("loading", {"same": True})["same"]
    )


def main() -> int:
    """Measure, print, judge."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="tiny nets, on the CPU if there is no GPU")
    parser.add_argument("--only", choices=["large", "medium"], help="one variant only")
    parser.add_argument("--draws", type=int, default=8)
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    options = parser.parse_args()
    if not options.tiny and not torch.cuda.is_available():
        parser.error("full size needs a GPU with 80 GB")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    report: dict[str, Any] = {"device": name, "torch": torch.__version__, "cuda": torch.version.cuda}
    chosen = [size for size in sizes(options.tiny) if options.only in (None, size.name)]
    for size in chosen:
        report[size.name] = measured(size, device, options.draws)
        released(device)
        print(json.dumps({size.name: report[size.name]}), flush=True)  # noqa: T201
    report["cpu_peak_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    report["passed"] = all(passed(report[size.name]) for size in chosen)
    text = json.dumps(report, indent=2)
    print(text)  # noqa: T201
    if options.out:
        options.out.write_text(text + "\n")
    return 0 if report["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
