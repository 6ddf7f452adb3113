"""Measures which way through the MMDiT is fastest on this GPU.

The command: python -m model.tuning

For each published size, precision and shape: the attention first, then which matrix products pictures go through apart,
then whether the text's products run beside the image's. Writes what won into the committed table.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from model.choices import TABLE, entry
from model.config import VARIANTS, MMDiTConfig
from model.fast_mmdit import Choice, FastMMDiT
from model.fp8 import has_fp8, use_fp8
from model.graphs import CudaRecorder
from model.kernels.attention import backends
from model.layers import position_table
from model.mmdit import MMDiT
from model.text import CLIP_LENGTH, T5_LENGTH

SHAPES = ((1, 512), (2, 512), (4, 512), (8, 512), (2, 768), (1, 1024), (2, 1024), (2, 1440))
"""Rows and side in pixels."""

ROUNDS = 6
STD = 0.02  # of random weights

N = TypeVar("N", bound=nn.Module)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and writes; 1 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m model.tuning", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", default="large,medium", help="published sizes, comma-separated")
    parser.add_argument("--precisions", default="bf16,fp8")
    parser.add_argument("--out", type=Path, default=TABLE, help="the table to write into")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("model.tuning: there is no CUDA device to measure", file=sys.stderr)
        return 1
    device = torch.device("cuda", torch.cuda.current_device())
    for name in options.models.split(","):
        for precision in options.precisions.split(","):
            if precision == "fp8" and not has_fp8(device):
                continue
            config = VARIANTS[name].mmdit
            lines = list(_measured(config, precision, device, name))
            _write(options.out, torch.cuda.get_device_name(device), f"{precision} {config.hidden}", lines)
            gc.collect()
            torch.cuda.empty_cache()
    return 0


@torch.inference_mode()
def _measured(config: MMDiTConfig, precision: str, device: torch.device, name: str) -> Iterator[dict[str, Any]]:
    mmdit = random_mmdit(config, device)
    if precision == "fp8":
        use_fp8(mmdit)
    fast = FastMMDiT(mmdit)
    for rows, side in SHAPES:
        if side // 16 > config.pos_embed_grid or (side == 1440 and not config.dual_blocks):
            continue
        x = torch.randn(rows, config.in_channels, side // 8, side // 8, device=device, dtype=torch.bfloat16)
        modulation = 0.5 * torch.randn(rows, fast.width, device=device, dtype=torch.bfloat16)
        text = torch.randn(rows, CLIP_LENGTH + T5_LENGTH, config.hidden, device=device, dtype=torch.bfloat16)
        time_of = partial(_milliseconds, fast, (x, modulation, text), CudaRecorder(device))
        best, ms = _best(time_of, device, rows)
        print(f"{name} {precision} {rows} x {side}x{side}: {best}", *(f"{k} {v:.2f}" for k, v in ms.items()), sep="  ")
        sys.stdout.flush()
        yield entry(rows, (side // 16) ** 2, best, ms)


def _best(time_of: Callable[[Choice], float], device: torch.device, rows: int) -> tuple[Choice, dict[str, float]]:
    """One question after the other: all combinations would take long, and the answers hardly depend on each other."""
    ms: dict[str, float] = {}

    def tried(choice: Choice) -> float:
        label = _label(choice)
        if label not in ms:
            try:
                ms[label] = round(time_of(choice), 3)
            except RuntimeError as problem:  # a backend that cannot do this shape
                print(f"  {label}: {str(problem)[:200]}", flush=True)
                ms[label] = math.inf
        return ms[label]

    known = backends(device)[1:] or backends(device)  # the default is one of the others
    best = min((Choice(attention=name) for name in known), key=tried)
    if rows > 1:
        best = min((best, replace(best, apart=True)), key=tried)
        best = min((best, replace(best, mlp_apart=True)), key=tried)
    return min((best, replace(best, beside=True)), key=tried), ms


def _label(choice: Choice) -> str:
    ways = [name for name in ("apart", "mlp_apart", "beside") if getattr(choice, name)]
    return " ".join([choice.attention, *ways])


def _milliseconds(fast: FastMMDiT, inputs: tuple[Tensor, ...], recorder: CudaRecorder, choice: Choice) -> float:
    """Of one replay of a graph, the median."""
    recording = recorder(partial(fast, choice=choice), *inputs)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    found = []
    began = time.monotonic()
    for n in range(ROUNDS + 2):
        start.record()
        recording(*inputs)
        end.record()
        end.synchronize()
        if n >= 2:
            found.append(start.elapsed_time(end))
        if time.monotonic() - began > 3 and len(found) >= 3:
            break
    return statistics.median(found)


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
    """Every weight random at sizes that keep activations sane; modulations too, for zeros would switch blocks off."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, tensor in net.named_parameters():
            tensor.normal_(0, STD)
            if name.endswith("weight") and tensor.ndim == 1:
                tensor.add_(1)
    if isinstance(net, MMDiT):
        net.pos_embed.copy_(position_table(net.config.hidden, net.config.pos_embed_grid))
    return net.requires_grad_(False).eval()


def random_mmdit(config: MMDiTConfig, device: torch.device) -> MMDiT:
    """A transformer in bf16 with random weights: its speed does not depend on them."""
    with born(device, torch.bfloat16):
        return randomized(MMDiT(config))


def _write(path: Path, gpu: str, key: str, lines: list[dict[str, object]]) -> None:
    table = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    table.setdefault(gpu, {})[key] = lines
    path.write_text(_text(table))


def _text(table: dict[str, dict[str, list[dict[str, object]]]]) -> str:
    """JSON with a line for each shape."""
    gpus = []
    for name, keys in table.items():
        lists = [f"  {json.dumps(key)}: [\n{_lines(lines)}\n  ]" for key, lines in keys.items()]
        gpus.append(f" {json.dumps(name)}: {{\n" + ",\n".join(lists) + "\n }")
    return "{\n" + ",\n".join(gpus) + "\n}\n"


def _lines(lines: list[dict[str, object]]) -> str:
    return ",\n".join(f"   {json.dumps(line)}" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
