"""The table of an evaluation, for people and as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from model.evaluation.evaluation import Diversity, Evaluation, Removal, Result
from model.evaluation.plan import BASE, UNGUIDED
from model.evaluation.prompts import OPEN_PROMPT, OpenRequest
from model.evaluation.scores import SCORES, Count
from model.training.scenes import drawn_alike

TARGETS = {"colour": 0.95, "shape": 0.90, "position": 0.85}
RATIO = 0.9  # of the default's share, at each other size and in the other precision
REMOVED, KEPT = 0.90, 0.85
NEAR = 0.05  # how far a second model may fall behind the first

LINE = "{:<15}{:<22}{:>9}  {:>7}  {:>13}   {:<26}{}"


@dataclass(frozen=True)
class Header:
    """What was evaluated, by what and when."""

    model: str
    revision: str
    command: str
    device: str
    torch: str
    date: str
    data_version: str
    prompts: int
    steps: int
    guidance_scale: float
    width: int
    height: int
    minutes: float
    stopped: bool  # whether the time was up before all was made
    checker: dict[str, Any]  # its accuracy and what it learnt


def to_json(header: Header, found: Evaluation) -> dict[str, Any]:
    """All figures, as `recorded` reads them."""
    return {
        **asdict(header),
        "results": [asdict(result) for result in found.results],
        "removal": asdict(found.removal) if found.removal else None,
        "diversity": asdict(found.diversity) if found.diversity else None,
    }


@dataclass(frozen=True)
class Record:
    """An earlier evaluation of the same weights."""

    revision: str
    shares: dict[tuple[str, str], float]  # by setting and score
    pairs: tuple[OpenRequest, ...]


def recorded(data: Mapping[str, Any]) -> Record:
    """What `to_json` gave. Errors: ValueError if this is something else."""
    try:
        counts = {(r["setting"], name): Count(**c) for r in data["results"] for name, c in r["counts"].items()}
        removal = data["removal"] or {"pairs": []}
        for name in ("removed", "kept"):
            if name in removal:
                counts["negative", name] = Count(**removal[name])
        pairs = tuple(OpenRequest(**pair) for pair in removal["pairs"])
        return Record(data["revision"], {at: one.share for at, one in counts.items() if one.asked}, pairs)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"it is no record of an evaluation: {error!r}") from error


def table(header: Header, found: Evaluation, record: Record | None = None) -> str:
    """The whole table as text."""
    lines = [*_heading(header), "", *_checker(header), ""]
    lines.append(LINE.format("setting", "score", "right", "share", "95 % interval", "target", "").rstrip())
    for result in found.results:
        lines += _result(result, record)
    lines += _removal(found.removal, record) if found.removal else []
    lines += _diversity(found.diversity) if found.diversity else []
    if header.stopped:
        lines += ["", "The time was up before all was made: what has fewer pictures has wider intervals."]
    if record is not None:
        lines += ["", *_comparison(header, found, record)]
    return "\n".join(lines) + "\n"


def _heading(header: Header) -> list[str]:
    return [
        f"{header.model} ({header.revision}): {header.prompts} held-out prompts, {header.steps} steps, "
        f"guidance {header.guidance_scale:g}, {header.width}x{header.height} by default",
        f"{header.device}, torch {header.torch}, {header.date}, {header.minutes:.1f} minutes: {header.command}",
    ]


def _checker(header: Header) -> list[str]:
    """How often the checker itself is right: hardly a score can be better than that."""
    accuracy = header.checker.get("accuracy", {})

    def said(prefix: str) -> str:
        named = [(name[len(prefix) :], share) for name, share in accuracy.items() if name.startswith(prefix)]
        return ", ".join(f"{name} {100 * share:.1f}" for name, share in named)

    lines = [f"checker, in % right: clean drawings: {said('clean_')}"]
    if said("reconstructed_"):
        lines.append(f"  reconstructed drawings: {said('reconstructed_')}")
    malformed = 100 * accuracy.get("malformed", float("nan"))
    lines.append(f"  shape by style: {said('shape_')}; spoiled shapes read as none {malformed:.1f}")
    learnt = header.checker.get("data_version", header.data_version)
    if not drawn_alike(learnt, header.data_version):
        lines.append(f"  it learnt on drawings of version {learnt}, now they are of version {header.data_version}")
    return lines


def _result(result: Result, record: Record | None) -> Iterator[str]:
    yield ""
    if not result.pictures:
        yield f"{result.setting:<15}not made: the time was up"
        return
    for score in SCORES:
        one = result.counts[score]
        target, verdict = _target(result, score, one)
        yield _line(result.setting, score, one, target, verdict, record)


def _target(result: Result, score: str, one: Count) -> tuple[str, str]:
    """What is asked for, and whether it was reached."""
    if not one.asked or score not in TARGETS or result.setting == UNGUIDED:
        return "", ""
    if result.setting == BASE or result.base is None:
        return f"at least {100 * TARGETS[score]:.0f} %", _verdict(one.share >= TARGETS[score])
    base = result.base[score].share
    if not base:
        return "", ""
    return f"ratio {one.share / base:.2f}, at least {RATIO}", _verdict(one.share >= RATIO * base)


def _line(setting: str, score: str, one: Count, target: str, verdict: str, record: Record | None) -> str:
    low, high = one.interval
    share = f"{100 * one.share:.1f} %" if one.asked else "-"
    interval = f"{100 * low:.1f} - {100 * high:.1f}" if one.asked else ""
    line = LINE.format(setting, score, f"{one.right}/{one.asked}", share, interval, target, verdict)
    was = record.shares.get((setting, score)) if record else None
    if was is not None and one.asked:
        line = f"{line:<104}  recorded {100 * was:.1f} %: {'inside' if low <= was <= high else 'OUTSIDE'}"
    return line.rstrip()


def _verdict(reached: bool) -> str:
    return "ok" if reached else "MISSED"


def _removal(removal: Removal, record: Record | None) -> Iterator[str]:
    yield ""
    pairs = f"{len(removal.pairs)} pictures that show red where the colour is open, among {removal.tried}"
    yield f'negative prompt "red": {pairs}'
    for score, one, least in (("removed", removal.removed, REMOVED), ("kept", removal.kept, KEPT)):
        verdict = _verdict(one.share >= least) if one.asked else ""
        yield _line("negative", score, one, f"at least {100 * least:.0f} %", verdict, record)


def _diversity(found: Diversity) -> Iterator[str]:
    yield ""
    yield f'eight seeds of "{OPEN_PROMPT}" differ: mean distance over pairs, and of as many drawings'
    yield f"  pixels {found.pixels:.3f} (drawings {found.drawn_pixels:.3f}), from 0 to 1"
    yield f"  places {found.places:.2f} (drawings {found.drawn_places:.2f}), in halves of a side"


def outside(found: Evaluation, record: Record) -> list[str]:
    """The figures whose interval does not contain the recorded one."""
    counts = {(result.setting, score): one for result in found.results for score, one in result.counts.items()}
    if found.removal:
        counts |= {("negative", "removed"): found.removal.removed, ("negative", "kept"): found.removal.kept}
    far = []
    for at, one in counts.items():
        low, high = one.interval
        if at in record.shares and not low <= record.shares[at] <= high:
            far.append(" ".join(at))
    return far


def _comparison(header: Header, found: Evaluation, record: Record) -> Iterator[str]:
    if record.revision != header.revision:
        yield f"The recorded evaluation is of other weights ({record.revision})."
    far = outside(found, record)
    inside = "contain the recorded figures: yes" if not far else f"contain the recorded figures: NO: {', '.join(far)}"
    yield f"the confidence intervals {inside}"


def versus(first: tuple[str, Evaluation], second: tuple[str, Evaluation]) -> str:
    """Two models beside each other, where both were asked the same: the second may be so many points worse."""
    (name, one), (other, two) = first, second
    lines = [f"{'setting':<15}{'score':<15}{name:>14}{other:>14}{'points':>9}"]
    others = {result.setting: result.counts for result in two.results}
    for result in one.results:
        for score, mine in result.counts.items():
            its = others.get(result.setting, {}).get(score, Count())
            if mine.asked and its.asked:
                gap = 100 * (its.share - mine.share)
                shares = f"{100 * mine.share:>12.1f} %{100 * its.share:>12.1f} %"
                lines.append(f"{result.setting:<15}{score:<15}{shares}{gap:>+9.1f}  {_verdict(gap >= -100 * NEAR)}")
    return "\n".join(lines) + "\n"
