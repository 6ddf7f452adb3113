"""What a scenario found, beside what it must find."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """One line of the table."""

    what: str
    found: str
    must: str = ""  # empty: for information
    ok: bool = True


def equal(what: str, found: object, must: object) -> Check:
    """It must be exactly so."""
    return Check(what, str(found), str(must), found == must)


def at_most(what: str, found: float, most: float, unit: str = "") -> Check:
    """It must not be more."""
    return Check(what, f"{found:.3g}{unit}", f"<= {most:g}{unit}", found <= most)


def at_least(what: str, found: float, least: float, unit: str = "") -> Check:
    """It must not be less."""
    return Check(what, f"{found:.3g}{unit}", f">= {least:g}{unit}", found >= least)


def told(what: str, found: object) -> Check:
    """For information."""
    return Check(what, str(found))


def table(results: Sequence[tuple[str, float, Sequence[Check]]]) -> str:
    """All scenarios (name, seconds, checks), as Markdown."""
    lines = ["| scenario | what | found | must be | |", "| --- | --- | --- | --- | --- |"]
    for name, seconds, checks in results:
        title = f"{name} ({seconds:.0f} s)"
        for check in checks:
            mark = ("ok" if check.ok else "**FAILED**") if check.must else ""
            lines.append(f"| {title} | {check.what} | {check.found} | {check.must} | {mark} |")
            title = ""
    return "\n".join(lines)
