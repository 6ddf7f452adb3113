"""Ours beside diffusers on one GPU, with full-size random weights: python -m tests.benchmarks.gpu

Rows go, as they are done, into the marked section of the file that --out names; those of other runs stay there.
`--merge` puts the rows of a file that a run elsewhere left into that section instead.
"""

from __future__ import annotations

import argparse
import importlib.util
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.benchmarks.gpu.rows import Bench, Row

RESULTS = Path(__file__).parent.parent / "RESULTS.md"
NEEDED = ("torch", "transformers", "diffusers", "safetensors", "tokenizers")


def missing(packages: Sequence[str]) -> str:
    """What to say of packages that are not installed; nothing if all are."""
    lacking = [name for name in packages if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(lacking)}; where nothing can be fetched, carry their wheels" if lacking else ""


def setting(device: Any, small: bool) -> str:
    """Where and with what a run is."""
    import torch

    cuda = device.type == "cuda"
    where = torch.cuda.get_device_name(device) if cuda else f"CPU, {torch.get_num_threads()} threads"
    cudnn = f", CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}" if cuda else ""
    others = ", ".join(f"{name} {_version(name)}" for name in ("triton", "transformers", "diffusers", "fa3-fwd"))
    weights = "tiny random weights" if small else "full-size random weights"
    commit = _said("git", "rev-parse", "--short", "HEAD") or "unknown"
    python = f"Python {platform.python_version()}, torch {torch.__version__}{cudnn}, {others}"
    return f"{where}, {python}, {weights}, bf16, commit {commit}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def clocks() -> str:
    """What nvidia-smi says of clock, power and temperature; nothing without it."""
    return _said("nvidia-smi", "--query-gpu=clocks.sm,power.draw,temperature.gpu", "--format=csv,noheader")


def _said(*command: str) -> str:
    """What a command prints; nothing if it cannot."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def measure(rows: Sequence[Row], bench: Bench, moment: str, about: str, out: Path | None) -> int:
    """Row after row, each printed and written down when it is done; gives how many could not be measured."""
    import torch

    from tests.benchmarks.gpu.rows import ROWS
    from tests.benchmarks.gpu.table import HEAD, Table, merge
    from tests.gpu.nets import released

    done, failed = Table(runs={moment: about}), 0
    for row in rows:
        started = time.monotonic()
        try:
            for finding in row.measure(bench, row.name):
                done.lines[finding.name] = finding.line(moment)
                print(done.lines[finding.name], flush=True)
                if out:
                    merge(out, done, [known.name for known in ROWS])
        except Exception:
            failed += 1
            print(f"{row.name} could not be measured:\n{traceback.format_exc()}", flush=True)
        released(bench.device)
        torch._dynamo.reset()
        print(f"  {row.name}: {time.monotonic() - started:.0f} s; {clocks()}", flush=True)
    print("\n".join(["", *HEAD, *done.lines.values()]))
    return failed


def options() -> argparse.ArgumentParser:
    """Of the command line."""
    parser = argparse.ArgumentParser(prog="make bench-gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", default="", help="names, comma-separated; default: all")
    parser.add_argument("--out", type=Path, help="file with the section; default: tests/benchmarks/RESULTS.md")
    parser.add_argument("--merge", type=Path, help="only put this file's rows into --out")
    parser.add_argument(
        "--small", action="store_true", help="tiny nets, anywhere: tries the rows; writes only to --out"
    )
    parser.add_argument("--seconds", type=float, default=25.0, help="of a row's rounds, beside building and compiling")
    parser.add_argument("--profile", action="store_true", help="also print where the time of ours goes")
    return parser


def main() -> int:
    """Measure, print, write; 1 if a row could not be measured."""
    parser = options()
    chosen = parser.parse_args()
    if said := missing(NEEDED):
        parser.error(said)
    import torch

    from tests.benchmarks.gpu.rows import ROWS, Bench
    from tests.benchmarks.gpu.table import Table, merge

    out = chosen.out or (None if chosen.small else RESULTS)
    if chosen.merge:
        merge(out or RESULTS, Table.of(chosen.merge.read_text("utf-8")), [row.name for row in ROWS])
        return 0
    if not (chosen.small or torch.cuda.is_available()):
        parser.error("full size needs a CUDA device with 80 GB; --small tries the rows anywhere")
    known = {row.name: row for row in ROWS}
    names = chosen.rows.split(",") if chosen.rows else list(known)
    if unknown := [name for name in names if name not in known]:
        parser.error(f"no such row: {', '.join(unknown)}; there are {', '.join(known)}")
    rows = [known[name] for name in names]
    if not chosen.small and (said := missing([package for row in rows for package in row.needs])):
        parser.error(said)
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    about, moment = setting(device, chosen.small), f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S}"
    print(f"{about}\n{clocks()}", flush=True)
    failed = measure(rows, Bench(device, chosen.small, chosen.seconds, chosen.profile), moment, about, out)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
