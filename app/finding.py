"""One thing that `darkroom doctor` looked at, and how it is told."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Literal

import typer

from app.terminal import say

State = Literal["ok", "warning", "wrong"]

MARKS = {"ok": ("ok", "green"), "warning": ("note", "yellow"), "wrong": ("wrong", "red")}


@dataclass(frozen=True)
class Finding:
    """One thing looked at."""

    what: str
    state: State
    found: str
    mend: str = ""


def tell(findings: Iterable[Finding], *, as_json: bool) -> bool:
    """Writes the findings, for people each as soon as it is made, or for programs; whether none is wrong."""
    told = []
    for finding in findings:
        told.append(finding)
        if not as_json:
            _tell(finding)
    well = all(finding.state != "wrong" for finding in told)
    if as_json:
        typer.echo(json.dumps({"well": well, "findings": [asdict(finding) for finding in told]}, indent=2))
    return well


def _tell(finding: Finding) -> None:
    mark, colour = MARKS[finding.state]
    say(f"{typer.style(f'{mark:6}', fg=colour)} {finding.what}: {finding.found}")
    if finding.mend:
        say(f"       {finding.mend}")
