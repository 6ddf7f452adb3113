"""How fast VAE and text encoders are, plain and fast, by hand on one GPU: python -m tests.gpu.try_vae [part ...]

Published sizes with random weights in bf16; under a minute. A part that fails says why, and the next one runs.
"""

from __future__ import annotations

import statistics
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model import fast_vae
from model.config import VAEConfig
from model.fast_text import FastTextEncoders
from model.fast_vae import FastDecoder
from model.graphs import CudaRecorder
from model.kernels import groupnorm
from model.text import T5_LENGTH, TextEncoders
from model.vae import VAE
from tests.gpu.nets import born, full_encoders, randomized, released
from tests.model import tiny
from tests.model.compare_groupnorm import TOLERANCES, wrong

DEVICE = torch.device("cuda")


def ms(call: Callable[[], object], rounds: int = 10) -> float:
    """Median milliseconds of a call."""
    for _ in range(3):
        call()
    times = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def say(*words: object) -> None:
    print(*words, flush=True)  # noqa: T201


def top(call: Callable[[], object], number: int = 15) -> None:
    """The kernels that take longest."""
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    rows = []
    for event in profiler.key_averages():
        micros = getattr(event, "self_device_time_total", 0) or getattr(event, "self_cuda_time_total", 0)
        if micros and str(getattr(event, "device_type", "")).endswith("CUDA"):
            rows.append((micros / 1000, event.count, event.key))
    rows.sort(reverse=True)
    say(f"    all kernels {sum(row[0] for row in rows):.2f} ms in {sum(row[1] for row in rows)} launches")
    for time_ms, count, name in rows[:number]:
        say(f"    {time_ms:8.3f} ms {count:4d} x {name[:110]}")


def part_kernels() -> None:
    """The kernels against their twins."""
    bad = wrong(DEVICE, list(TOLERANCES), lambda line: None)
    say("  kernels against twins:", "\n    ".join(["WRONG", *bad]) if bad else "all within rounding")


def part_passes() -> None:
    """Bandwidth of the fused passes at the finest level, 1024 x 1024 x 128."""
    x = torch.randn(1, 1024, 1024, 128, device=DEVICE, dtype=torch.bfloat16)
    h, out = torch.randn_like(x), torch.empty_like(x)
    small = torch.randn(1, 512, 512, 256, device=DEVICE, dtype=torch.bfloat16)
    corners = torch.randn(1, 513, 513, 512, device=DEVICE, dtype=torch.bfloat16)
    weight = torch.randn(128, device=DEVICE, dtype=torch.bfloat16)
    parts = groupnorm.statistics(x)
    affine = groupnorm.affine(parts, weight, weight, weight, 32, 1e-6)
    calls: dict[str, tuple[float, Callable[[], object]]] = {
        "statistics": (1, lambda: groupnorm.statistics(x)),
        "affine": (0, lambda: groupnorm.affine(parts, weight, weight, weight, 32, 1e-6)),
        "apply": (2, lambda: groupnorm.apply(x, affine, out=out)),
        "add": (3, lambda: groupnorm.add(x, h, weight, out=out)),
        "add_upsampled": (2 * 0.5 + 2, lambda: groupnorm.add_upsampled(small, small, None)),
        "woven": (2, lambda: groupnorm.woven(corners)),
        "copy": (2, lambda: out.copy_(x)),
    }
    for name, (passes, call) in calls.items():
        took = ms(call)
        say(f"  {name:14} {took:7.3f} ms {passes * x.nbytes / took / 1e6:7.0f} GB/s")


def part_attention() -> None:
    """The attention of the middle at 1024 x 1024."""
    q, k, v = torch.randn(1, 16384, 3 * 512, device=DEVICE, dtype=torch.bfloat16).chunk(3, dim=-1)
    before = fast_vae.MAX_QUERIES
    for queries in (256, 512, 1024, 2048, 4096):
        fast_vae.MAX_QUERIES = queries
        say(f"  attention, {queries} queries at a time: {ms(lambda: fast_vae.attention(q, k, v)):.3f} ms")
    fast_vae.MAX_QUERIES = before
    expected = F.scaled_dot_product_attention(q[:, None].float(), k[:, None].float(), v[:, None].float())[:, 0]
    theirs = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
    for name, found in (("ours", fast_vae.attention(q, k, v)), ("torch's", theirs)):
        say(f"  error of {name}: {float((found.float() - expected).norm() / expected.norm()):.2e}")
    say(f"  torch's: {ms(lambda: F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])):.3f} ms")


def compared(name: str, found: Tensor, expected: Tensor) -> None:
    off = (found.float() - expected.float()).abs()
    say(f"  {name}: mean {float(off.mean()):.4f}, largest {float(off.max()):.0f} levels of 255 off")


def picture_vae() -> VAE:
    """The published shape in fp32, with weights that make pictures of all levels."""
    with born(DEVICE, torch.float32):
        vae = VAE(VAEConfig()).requires_grad_(False).eval()
    torch.manual_seed(0)
    for name, tensor in vae.named_parameters():
        if tensor.ndim > 1:
            tensor.normal_(0, float(tensor[0].numel()) ** -0.5)
        else:
            tensor.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.1)
    return vae


def part_vae() -> None:
    """Plain and fast decoding at 1024 x 1024, then 2048 x 2048 whole and in strips."""
    vae = picture_vae()
    z = torch.randn(1, 16, 128, 128, device=DEVICE)
    with_tf32 = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    exact = vae.to_pixels(z)
    torch.backends.cudnn.allow_tf32 = with_tf32
    vae = vae.bfloat16()
    compared("plain bf16 against fp32", vae.to_pixels(z), exact)
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    say(f"  plain: {ms(lambda: vae.to_pixels(z)):.2f} ms, peak {peak(held):.2f} GB beside the weights")
    ways = [(FastDecoder(vae, fold=fold), fold, benchmark) for benchmark in (False, True) for fold in (False, True)]
    for fast, fold, benchmark in ways:
        released(DEVICE)
        torch.backends.cudnn.benchmark = benchmark
        start = time.perf_counter()
        first = fast.decode(z)
        torch.cuda.synchronize()
        say(f"  folded {fold}, cudnn.benchmark {benchmark}: first {time.perf_counter() - start:.2f} s")
        compared("fast against fp32", first, exact)
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        say(f"  fast, eager: {ms(lambda fast=fast: fast.decode(z)):.2f} ms, peak {peak(held):.2f} GB")
        recorded("fast", fast.decode, z, torch.randn_like(z))
        released(DEVICE)
    torch.backends.cudnn.benchmark = False
    top(lambda: fast.decode(z))
    large = torch.randn(1, 16, 256, 256, device=DEVICE)
    whole, strips = FastDecoder(vae, max_pixels=2048 * 2048), FastDecoder(vae)
    compared("2048 x 2048, strips against whole", strips.decode(large), whole.decode(large))
    for name, decoder in (("whole", whole), ("strips", strips)):
        released(DEVICE)
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        call = decoder.decode
        say(f"  2048 x 2048, {name}: {ms(lambda call=call: call(large), 3):.1f} ms, peak {peak(held):.2f} GB")


def recorded(name: str, function: Callable[[Tensor], Tensor], given: Tensor, other: Tensor) -> None:
    """The same as a graph."""
    graph: Any = CudaRecorder(DEVICE)(function, given)
    same = torch.equal(graph(other), function(other))
    say(f"  {name}, graph: {ms(lambda: graph(given)):.2f} ms; equals eager: {same}")


def peak(held: int) -> float:
    return (torch.cuda.max_memory_allocated() - held) / 1e9


def part_text() -> None:
    """CLIP-L, CLIP-G and T5-XXL: plain, fast and as a graph."""
    with born(DEVICE, torch.bfloat16), torch.no_grad():
        towers: Any = [randomized(net) for net in full_encoders()]
    tokenizers = (tiny.clip_tokenizer("<|endoftext|>"), tiny.clip_tokenizer("!"), tiny.t5_tokenizer())
    text = TextEncoders(*towers, tokenizers, 4096)
    fast = FastTextEncoders(text)
    fast.prepare(T5_LENGTH)
    for count in (1, 2, 8):
        ids = torch.tensor(text.read([f"a red cat {n}" for n in range(count)], T5_LENGTH)[0], device=DEVICE)

        def call(ids: Tensor = ids) -> Tensor:
            return fast.forward(ids, T5_LENGTH)

        found, expected = fast.unpacked(call(), T5_LENGTH), text.forward(ids, T5_LENGTH)
        for name, one, other in zip(("context", "pooled"), found, expected, strict=True):
            off = float((one.float() - other.float()).norm() / other.float().norm())
            say(f"  {count} prompts: {name} is {off:.2e} off the plain way's")
        say(f"  {count} prompts, plain: {ms(lambda ids=ids: text.forward(ids, T5_LENGTH)):.2f} ms")
        say(f"  {count} prompts, fast, eager: {ms(call):.2f} ms")
        recorded(f"{count} prompts, fast", call, ids, ids.flip(0))
        if count == 1:
            top(call)


def main() -> None:
    parts = {name.removeprefix("part_"): part for name, part in globals().items() if name.startswith("part_")}
    start = time.perf_counter()
    say(torch.cuda.get_device_name(), "torch", torch.__version__, "cudnn", torch.backends.cudnn.version())
    for name in sys.argv[1:] or parts:
        say(f"{name} (after {time.perf_counter() - start:.1f} s)")
        try:
            with torch.inference_mode():
                parts[name]()
        except Exception:
            say(traceback.format_exc())
        released(DEVICE)
    say(f"all after {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
