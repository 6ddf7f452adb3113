"""Findings as lines of one Markdown table in a marked section of a file: rows by name, and the runs they are of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.benchmarks.gpu.timing import Spread

BEGIN, END = "<!-- bench-gpu -->", "<!-- end of bench-gpu -->"
TITLE = "## Ours and diffusers on one GPU"
COLUMNS = (
    "row", "measured", "ours", "eager", "compiled", "ours / eager", "ours / compiled", "of the ceiling", "goal", "met",
    "notes", "run",
)  # fmt: skip
HEAD = (f"| {' | '.join(COLUMNS)} |", "| --- " * len(COLUMNS) + "|")
ABOUT = """\
`make bench-gpu`. *Eager* and *compiled* (each transformer block, and the VAE's decoder) are diffusers on the same
random weights. Medians, in brackets p10 to p90 and how many; contestants take turns in one process. A ratio below 1 is
in our favour. *Of the ceiling*: the time that the FLOP would take at the rates of a large matrix product and of the
fastest attention of the same shape, over our time. *Apart*: relative L2 distance of our result to theirs."""

UNITS = {"ms": 1e3, "s": 1.0, "GiB": 2.0**-30, "TFLOP/s": 1e-12, "": 1.0}
"""What a figure in seconds, bytes or FLOP a second is multiplied by to be shown."""

MOST_APART = 0.2
"""Beyond it two different things were measured: bf16 alone makes a few hundredths."""


@dataclass(frozen=True)
class Goal:
    """At most so much: of a contestant's figure, or in the row's unit."""

    limit: float
    of: str = ""

    def text(self, unit: str) -> str:
        """As shown."""
        return f"≤ {self.limit:g} x {self.of}" if self.of else f"≤ {self.limit:g} {unit}"


@dataclass(frozen=True)
class Finding:
    """One row: what was measured of whom, and what it should be."""

    name: str
    measured: str
    unit: str
    found: Mapping[str, Spread]  # `ours`, and others
    goals: Sequence[Goal] = ()
    floor: float | None = None  # at the ceilings, in what `found` is in
    notes: Sequence[str] = ()
    apart: Mapping[str, float] = field(default_factory=dict)  # relative distance of our result to a peer's

    def ratio(self, peer: str) -> float:
        """Ours in a contestant's."""
        return self.found["ours"].median / self.found[peer].median

    def misses(self, goal: Goal) -> bool:
        """Whether it is not met; a figure that is no number meets none."""
        value = self.ratio(goal.of) if goal.of else self.found["ours"].median * UNITS[self.unit]
        return not value <= goal.limit

    @property
    def missed(self) -> list[str]:
        """The goals that are not met."""
        others = [f"the same result as {peer}" for peer, far in self.apart.items() if not far <= MOST_APART]
        return [*(goal.text(self.unit) for goal in self.goals if self.misses(goal)), *others]

    def line(self, run: str) -> str:
        """A line of the table."""
        shown = {peer: self._figure(peer) if peer in self.found else "" for peer in ("ours", "eager", "compiled")}
        ratios = [f"{self.ratio(p):.3f}" if p in self.found else "" for p in ("eager", "compiled")]
        ceiling = f"{100 * self.floor / self.found['ours'].median:.0f} %" if self.floor else ""
        others = [f"{p} {self._figure(p)}, ours is {self.ratio(p):.3f} of it" for p in self.found if p not in shown]
        goals = ", ".join(goal.text(self.unit) for goal in self.goals)
        met = f"no: {', '.join(self.missed)}" if self.missed else "yes" if self.goals else ""
        notes = "; ".join([*others, *self.notes, *(f"apart from {p} {far:.1e}" for p, far in self.apart.items())])
        cells = (self.name, self.measured, *shown.values(), *ratios, ceiling, goals or "printed", met, notes, run)
        return f"| {' | '.join(cells)} |"

    def _figure(self, peer: str) -> str:
        one, factor = self.found[peer], UNITS[self.unit]
        if self.unit == "TFLOP/s":
            return f"{one.median * factor:.3g} {self.unit}"
        digits = 5 if not self.unit else 2 if self.unit in ("ms", "s") else 1
        spread = f" ({one.low * factor:.{digits}f} to {one.high * factor:.{digits}f}, {one.count})"
        return f"{one.median * factor:.{digits}f} {self.unit}".strip() + (spread if one.count > 1 else "")


@dataclass
class Table:
    """Lines by the name of their row, and by its moment where and with what each run was."""

    lines: dict[str, str] = field(default_factory=dict)
    runs: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, text: str) -> Table:
        """The marked section of a text; none is an empty table."""
        section = text.partition(BEGIN)[2].partition(END)[0].splitlines()
        rows = [line for line in section if line.startswith("| ") and line not in HEAD]
        runs = [line[2:].partition(": ") for line in section if line.startswith("- ")]
        return cls({_cells(line)[0]: line for line in rows}, {moment: about for moment, _, about in runs})

    def text(self, order: Sequence[str]) -> str:
        """The section: rows in the order of the names that theirs begin with, and the runs that they are of."""

        def place(name: str) -> int:
            return next((i for i, known in enumerate(order) if name.startswith(known)), len(order))

        lines = [self.lines[name] for name in sorted(self.lines, key=place)]
        of = {_cells(line)[-1] for line in lines}
        runs = [f"- {moment}: {about}" for moment, about in sorted(self.runs.items()) if moment in of]
        return "\n".join([BEGIN, "", ABOUT, "", *HEAD, *lines, "", *runs, "", END])


def merge(path: Path, new: Table, order: Sequence[str]) -> None:
    """Put rows into a file's section, each in place of the one of its name; all else stays."""
    text = path.read_text("utf-8") if path.exists() else ""
    kept = Table.of(text)
    section = Table(kept.lines | new.lines, kept.runs | new.runs).text(order)
    if BEGIN in text:
        before, _, rest = text.partition(BEGIN)
        text = before + section + rest.partition(END)[2]
    else:
        text = "\n".join([*([text.rstrip(), ""] if text else []), TITLE, "", section, ""])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8")


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split(" | ")]
