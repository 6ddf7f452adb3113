"""What the command line's options choose: the source of pictures, the network, the plan."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from model.config import MMDiTConfig
from model.training.demo import MMDITS
from model.training.distillation import TURBO_TOKENS, Distillation, turbo_plan
from model.training.flow import FlowTraining
from model.training.pictures import Folder, Function
from model.training.plan import STEP_TOKENS, Plan, demo_plan, plan_of, within
from model.training.sources import Drawings, Source

FURTHER_PEAK = 4e-4
"""Learning rate of weights that are trained already: below that of new ones, so that what they know is kept."""


def source_of(pictures: Path | None, function: str | None, smallest: int = 64) -> Source:
    """The drawings, or a user's own pictures of at least `smallest` pixels a side. Errors: SourceError."""
    if pictures:
        return Folder(pictures, smallest)
    return Function(function) if function else Drawings()


def flow_training(options: argparse.Namespace, given: Mapping[str, Any]) -> FlowTraining:
    """The settings of a flow training. Errors: ValueError, SourceError."""
    vae = options.vae or options.start
    if vae is None:
        raise ValueError("say where the autoencoder is: --vae with its folder, or --bundle with one")
    plan = _plan(options)
    source = source_of(options.pictures, options.function, min(s.frame.shorter for p in plan for s in p.sizes))
    if isinstance(source, Folder) and not options.sizes:
        plan = within(plan, source.shorter[len(source.shorter) // 2])
    chosen: dict[str, Any] = {"peak": FURTHER_PEAK} if options.start else {}
    for name in ("reuse", "dropout"):
        if getattr(options, name) is not None:
            chosen[name] = getattr(options, name)
    if options.memory is not None:
        chosen["memory"] = int(options.memory * 1e9)
    return FlowTraining(
        vae=vae,
        start=options.start,
        source=source,
        plan=plan,
        config=_config(options),
        optimizer=options.optimizer,
        prompts=_prompts(options, source),
        **(chosen | dict(given)),
    )


def distillation(options: argparse.Namespace, given: Mapping[str, Any]) -> Distillation:
    """The settings of a distillation. Errors: ValueError, SourceError."""
    tokens = options.tokens or TURBO_TOKENS
    plan = plan_of(_sizes(options.sizes), tokens) if options.sizes else turbo_plan(tokens)
    names = ("teacher", "rank", "steps", "guidance", "shift", "terminal", "substeps", "own", "measured")
    chosen = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    return Distillation(
        plan=plan,
        source=source_of(options.pictures, options.function, min(s.frame.shorter for p in plan for s in p.sizes)),
        samples=not options.no_samples,
        **(chosen | dict(given)),
    )


def _plan(options: argparse.Namespace) -> Plan:
    tokens = options.tokens or STEP_TOKENS
    return plan_of(_sizes(options.sizes), tokens) if options.sizes else demo_plan(tokens)


def _sizes(text: str) -> list[tuple[int, int]]:
    """Widths and heights."""
    sizes = [re.fullmatch(r"(\d+)x(\d+)", size.strip()) for size in text.split(",")]
    if not all(sizes):
        raise ValueError(f"sizes are {text!r}, expected such as 512x512,768x512")
    return [(int(found[1]), int(found[2])) for found in sizes if found]


def _config(options: argparse.Namespace) -> MMDiTConfig:
    config = MMDITS[options.net]
    changes = {
        name: getattr(options, name) for name in ("depth", "hidden", "heads") if getattr(options, name) is not None
    }
    dual = len(config.dual_blocks) if options.dual is None else options.dual
    return replace(config, **changes, dual_blocks=tuple(range(dual)))


def _prompts(options: argparse.Namespace, source: Source) -> tuple[str, ...] | None:
    """Those that were given; for a user's own pictures some of their captions; None: those of the drawings."""
    if options.no_samples:
        return ()
    if options.prompt:
        return tuple(options.prompt)
    if isinstance(source, Drawings):
        return None
    return tuple(text for text, _ in zip(dict.fromkeys(source.captions()), range(12), strict=False))
