"""`darkroom doctor --plan`: what of the models goes where on a GPU, by model/memory.py."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import typer

from app.doctor import Run
from app.terminal import say
from model.memory import CARDS, MODELS, SIDES, MemoryPlan, free_on_host, gigabytes

SERVED = "sd3.5-"
"""What the published models' names are served with."""


@dataclass(frozen=True)
class Card:
    """A GPU to plan for."""

    name: str
    gpu: int  # bytes
    host: int | None = None  # bytes that are free on its host; None: enough


def models_of(named: str, *, strict: bool) -> list[str]:
    """The published models of a list such as `large,medium`, or of DARKROOM_MODELS, which may hold others too.

    strict : ValueError for one that is not known; else these are left out, and none at all stands for all
    """
    found = []
    for entry in filter(None, (part.strip() for part in named.split(","))):
        name, _, variant = entry.partition("=")[0].partition(":")
        model = variant or name.removeprefix(SERVED)
        if model in MODELS:
            found.append(model)
        elif strict:
            raise ValueError(f"{entry!r} is no published model; known: {', '.join(MODELS)}")
    return found or list(MODELS)


def cards_of(gpu: float | None, run: Run) -> list[Card]:
    """The card of that many GB; else those of this machine, each kind once; else all that are sold."""
    if gpu is not None:
        return [Card(f"{gpu:g} GB", int(gpu * 1e9))]
    told = run(["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]) or ""
    cards = {}
    for line in told.splitlines():
        name, _, mebibytes = line.rpartition(", ")
        if mebibytes.strip().isdigit():
            cards[line] = Card(name, int(mebibytes) * 2**20, free_on_host())
    return list(cards.values()) or [Card(f"{size} GB", size * 10**9) for size in CARDS]


def tell(models: Sequence[str], cards: Sequence[Card], *, as_json: bool) -> bool:
    """Writes the plan of each card; of several, a line each. Whether something fits, where it is one card."""
    plans = [(card, MemoryPlan.of(models, card.gpu, card.host)) for card in cards]
    if as_json:
        typer.echo(json.dumps([_as_data(card, plan) for card, plan in plans], indent=2))
    elif len(plans) == 1:
        _tell_one(*plans[0])
    else:
        _tell_all(plans)
    return len(plans) > 1 or plans[0][1].chosen is not None


def _tell_one(card: Card, plan: MemoryPlan) -> None:
    say(f"{', '.join(plan.models)} on {card.name} ({gigabytes(plan.gpu)}), one guided picture at a time\n")
    chosen = plan.chosen
    if chosen is not None:
        parts = {**chosen.gpu, "together": chosen.total}
        width = max(map(len, parts))
        for part, size in parts.items():
            say(f"  {part:{width}}  {gigabytes(size):>9}")
        if chosen.host:
            say(f"  {'on the host':{width}}  {gigabytes(chosen.host):>9}")
        say("")
    say(plan.why)
    if chosen is not None:
        say(f"Set: {_settings(plan)}")
    side = chosen.side if chosen else SIDES[-1]
    tried = f"tried in this order, for {side}x{side}"
    say(f"\n   {tried:38} {'GPU':>9} {'host':>9}")
    for need in plan.needs:
        if need.side == side:
            mark = "->" if need == chosen else "  "
            fits = "" if plan.fits(need) else "  does not fit"
            host = gigabytes(need.host) if need.host else "-"
            say(f"{mark} {need.arrangement.title:38} {gigabytes(need.total):>9} {host:>9}{fits}")


def _tell_all(plans: Sequence[tuple[Card, MemoryPlan]]) -> None:
    say(f"{', '.join(plans[0][1].models)}, one guided picture at a time\n")
    say(f"  {'card':16} {'needs':>9}  {'host':>9}  {'pictures to':12} how")
    for card, plan in plans:
        if (need := plan.chosen) is None:
            say(f"  {card.name:16} {'-':>9}  {'-':>9}  {'-':12} {plan.why}")
            continue
        host = gigabytes(need.host) if need.host else "-"
        size = f"{need.side}x{need.side}"
        say(f"  {card.name:16} {gigabytes(need.total):>9}  {host:>9}  {size:12} {need.arrangement.title}")
        say(f"  {'':16} {'':9}  {'':9}  {'':12} {_settings(plan)}")


def _settings(plan: MemoryPlan) -> str:
    """What to set. DARKROOM_TEXT_ENCODERS may stay `auto`, which finds the same."""
    assert plan.chosen is not None
    return " ".join(f"{name}={value}" for name, value in plan.chosen.arrangement.settings.items())


def _as_data(card: Card, plan: MemoryPlan) -> dict[str, Any]:
    need = plan.chosen
    chosen = need and {
        "arrangement": need.arrangement.title,
        "settings": need.arrangement.settings,
        "side": need.side,
        "gpu": dict(need.gpu),
        "gpu_total": need.total,
        "host": need.host,
    }
    return {"card": card.name, "bytes": card.gpu, "models": list(plan.models), "why": plan.why, "chosen": chosen}
