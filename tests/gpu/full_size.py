"""Large and Medium at full size with random weights, by hand on one GPU: python -m tests.gpu.full_size

For each: a 1024 x 1024 picture end to end in bf16, and the error of one bf16 forward against the fp32 model (TF32 off)
for ours and for diffusers on the same weights, median over some draws. Medium is written and loaded again too.
Prints one JSON object; exits with 1 if ours is off by more than 1.1 times as much as diffusers, or a picture is broken.
`--tiny` tries the script itself, anywhere.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from model.checkpoint import load_components
from model.params import GenerationParams
from model.pipeline import Pipeline, run
from model.work import generate
from tests.gpu.errors import forward_errors
from tests.gpu.nets import Size, random_pipeline, released, sized, written

LIMIT = 1.1


def end_to_end(pipeline: Pipeline, size: Size) -> dict[str, Any]:
    """One guided picture."""
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
    return {
        "picture": list(pixels.shape), "mean": float(pixels.float().mean()), "std": float(pixels.float().std()),
        "ok": whole, "steps": size.steps, "seconds_first": seconds[0], "seconds": seconds[1],
    }  # fmt: skip


def written_and_loaded(pipeline: Pipeline, device: torch.device) -> dict[str, Any]:
    """The weights (without T5) as a diffusers folder, and back onto the device."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "bundle"
        start = time.perf_counter()
        size = written(pipeline, folder)
        exported = time.perf_counter()
        found = load_components(folder, device, torch.bfloat16)
        loaded = time.perf_counter()
    state = found.mmdit.state_dict()
    same = all(torch.equal(state[name], tensor) for name, tensor in pipeline.mmdit.state_dict().items())
    return {
        "gb": size / 1e9,
        "write_s": exported - start,
        "load_s": loaded - exported,
        "same": same,
        "variant": found.variant,
    }


def measured(size: Size, device: torch.device, count: int) -> dict[str, Any]:
    """All figures of one variant."""
    start = time.perf_counter()
    pipeline = random_pipeline(size, device)
    result: dict[str, Any] = {"parameters": sum(p.numel() for p in pipeline.mmdit.parameters())}
    result["end_to_end"] = end_to_end(pipeline, size)
    if size.name == "medium":
        result["loading"] = written_and_loaded(pipeline, device)
    result["forward_error"] = forward_errors(pipeline, size, count)
    result["seconds"] = time.perf_counter() - start
    if device.type == "cuda":
        result["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        torch.cuda.reset_peak_memory_stats()
    return result


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
    names = [options.only] if options.only else ["large", "medium"]
    chosen = [sized(name, options.tiny) for name in names]
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
