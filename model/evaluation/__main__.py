"""The command line: python -m model.evaluation."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import torch
from PIL import Image

from model.evaluation.checker import COMMITTED, Checker, load_checker
from model.evaluation.evaluation import Evaluation, Evaluator
from model.evaluation.plan import FULL, SAMPLE, Plan
from model.evaluation.rendering import Batches, Processes, Renderer
from model.evaluation.sheet import evaluation_sheet
from model.evaluation.subject import DTYPES, Subject, load_subject
from model.evaluation.table import Header, Record, recorded, table, to_json, versus
from model.fp8 import has_fp8
from model.training.loop import device_name
from model.training.scenes import DATA_VERSION
from model.weights import CheckpointError

DEMO = Path(__file__).parents[1] / "bundles" / "demo"
RECORD = "evaluation.json"
"""The full evaluation of a bundle's weights, beside them."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Evaluates each model; returns the exit status: 1 if a model or the checker cannot be read, 130 after Ctrl-C."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser().parse_args(given)
    command = shlex.join(["python", "-m", "model.evaluation", *given])
    try:
        _evaluate_all(options, command)
    except BrokenProcessPool:
        print("model.evaluation: a process that made pictures was ended; is there memory enough?", file=sys.stderr)
        return 1
    except (CheckpointError, OSError, ValueError) as error:
        print(f"model.evaluation: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("model.evaluation: stopped; nothing more is written", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m model.evaluation",
        description="Measure how far a model's pictures are what was asked for: a table, its JSON and a contact sheet.",
    )
    parser.add_argument("--model", default=str(DEMO), help="a bundle's folder, or several with commas between")
    parser.add_argument("--out", type=Path, default=Path("runs/evaluation"), help="folder for tables and sheets")
    parser.add_argument("--full", action="store_true", help="all 200 prompts at all sizes, also without a GPU")
    parser.add_argument("--prompts", type=_count, help="at most so many prompts of anything")
    parser.add_argument("--minutes", type=_minutes, help="begin no picture that would be ready later (sample: 11.5)")
    parser.add_argument("--device", type=_on, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="default: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--processes", type=_number, help="on a CPU, 0 for none but this one (one a core, at most 4)")
    parser.add_argument("--checker", type=Path, default=COMMITTED, help="another checker's safetensors file")
    return parser


def _number(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0 on")
    return int(text)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 on")
    return int(text)


def _minutes(text: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        minutes = math.nan
    if not 0 < minutes < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return minutes


def _on(text: str) -> torch.device:
    try:
        device = torch.device(text)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no device: cpu, cuda or cuda:1") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(f"{text!r}: CUDA devices that PyTorch finds here: {torch.cuda.device_count()}")
    return device


def _plan(options: argparse.Namespace) -> Plan:
    plan = FULL if options.full or options.device.type != "cpu" else SAMPLE
    if not has_fp8(options.device):
        plan = replace(plan, dtypes=tuple(name for name in plan.dtypes if name != "fp8"))
    if options.prompts:
        plan = plan.limited(options.prompts)
    return replace(plan, minutes=options.minutes) if options.minutes else plan


def _evaluate_all(options: argparse.Namespace, command: str) -> None:
    device: torch.device = options.device
    checker = load_checker(options.checker, device)
    options.out.mkdir(parents=True, exist_ok=True)
    found = [_evaluate(Path(path), checker, device, options, command) for path in options.model.split(",")]
    for other in found[1:]:
        text = versus(found[0], other)
        print(text, flush=True)
        _write(options.out / f"{found[0][0]}-and-{other[0]}.txt", text)


def _evaluate(
    path: Path, checker: Checker, device: torch.device, options: argparse.Namespace, command: str
) -> tuple[str, Evaluation]:
    """Evaluates one model, prints and writes what was found; returns its name and that."""
    dtype = options.dtype or ("bf16" if device.type == "cuda" else "fp32")
    if dtype == "fp8" and not has_fp8(device):
        raise ValueError(f"{device_name(device)} does not multiply fp8 matrices: --dtype bf16 or fp32")
    record = _record(path)
    subject = load_subject(path, device, dtype)
    plan = _plan(options)
    print(f"{subject.name}: {plan.prompts} prompts on {_device(device)} in {dtype}", flush=True)

    def renderers(name: str) -> Renderer:
        if device.type == "cpu" and options.processes != 0:
            torch.set_num_threads(1)  # the processes have the cores; reading a picture takes little
            return Processes(path, name, options.processes)
        same = subject if name == dtype else load_subject(path, device, name)
        return Batches(same.pipeline, name)

    evaluator = Evaluator(subject.card, subject.longest, renderers, checker, plan, lambda line: print(line, flush=True))
    same_weights = record is not None and record.revision == subject.revision
    found = evaluator.run(dtype, record.pairs if record and same_weights else ())
    header = _header(subject, checker, device, command, evaluator)
    text = table(header, found, record)
    print(f"\n{text}", flush=True)
    _write(options.out / f"{subject.name}.txt", text)
    _write(options.out / f"{subject.name}.json", json.dumps(to_json(header, found), indent=1) + "\n")
    _write(options.out / f"{subject.name}.png", evaluation_sheet(found.shown))
    print(f"written: {options.out / subject.name}.txt, .json and .png", flush=True)
    return subject.name, found


def _record(path: Path) -> Record | None:
    """The recorded evaluation of a bundle, if it has one."""
    file = path / RECORD
    if not file.is_file():
        return None
    try:
        return recorded(json.loads(file.read_text()))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _header(subject: Subject, checker: Checker, device: torch.device, command: str, done: Evaluator) -> Header:
    card = subject.card
    return Header(
        model=subject.name, revision=subject.revision, command=command, device=_device(device),
        torch=torch.__version__, date=datetime.now(UTC).date().isoformat(), data_version=DATA_VERSION,
        prompts=done.plan.prompts, steps=card.steps, guidance_scale=card.guidance_scale, width=card.width,
        height=card.height, minutes=round(done.budget.elapsed / 60, 2), stopped=done.budget.refused,
        checker=checker.about,
    )  # fmt: skip


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return device_name(device)
    return f"{os.cpu_count()} cores, {platform.machine()}"


def _write(path: Path, what: str | Image.Image) -> None:
    """A whole file or none."""
    part = path.with_name(f".{path.name}.part")
    try:
        if isinstance(what, str):
            part.write_text(what, "utf-8")
        else:
            what.save(part, "PNG", optimize=True)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
