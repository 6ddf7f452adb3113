"""The GPU benchmark, without a GPU: its FLOP, its goals, how rows are merged, and all of it on tiny nets."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from model.config import VARIANTS, MMDiTConfig, VAEConfig
from model.mmdit import MMDiT
from tests.benchmarks.gpu import flops
from tests.benchmarks.gpu.ceilings import Ceilings
from tests.benchmarks.gpu.rows import ROWS
from tests.benchmarks.gpu.table import COLUMNS, Finding, Goal, Table, merge
from tests.benchmarks.gpu.timing import Spread, by_the_clock, in_a_row, interleaved, kernels
from tests.model import tiny

CPU = torch.device("cpu")
ORDER = ["large-1024", "text", "start"]


def at(value: float) -> Spread:
    return Spread(value, value, value)


@pytest.mark.parametrize(
    ("variant", "side", "tera"),
    [
        ("large", 1024, 31.12),
        ("large", 512, 7.98),
        ("medium", 1024, 11.25),
        ("medium", 512, 2.44),
        ("medium", 1440, 29.2),
    ],
)
def test_a_forward_takes_what_the_papers_shapes_say(variant: str, side: int, tera: float) -> None:
    config, image = VARIANTS[variant].mmdit, (side // 16) ** 2
    found = flops.linear(config, image, 333) + flops.attention(config, image, 333)
    assert found == pytest.approx(tera * 1e12, rel=0.003)


@pytest.mark.parametrize("config", [tiny.MMDIT_X, MMDiTConfig(depth=3, hidden=128, heads=2)], ids=["dual", "plain"])
def test_a_forward_takes_what_torch_counts(config: MMDiTConfig) -> None:
    with torch.device("meta"):
        net = MMDiT(config).requires_grad_(False)
        given = torch.empty(1, 16, 16, 16), torch.empty(1), torch.empty(1, 40, config.context_dim)
        pooled = torch.empty(1, config.pooled_dim)
    with FlopCounterMode(display=False) as counter:
        net(*given, pooled)
    embedders = 2 * config.hidden * (256 + config.pooled_dim + 2 * config.hidden)  # of time and pooled text
    expected = flops.linear(config, 64, 40) + flops.attention(config, 64, 40) + embedders
    assert counter.get_total_flops() == expected


def test_a_decode_takes_what_the_published_decoder_does() -> None:
    assert flops.decode(VAEConfig(), 1024) == pytest.approx(10.47e12, rel=0.001)


def test_contestants_take_turns_after_their_warm_ups() -> None:
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    found = interleaved(calls, by_the_clock(CPU), budget_s=0.0)
    assert "".join(order) == "aaabbb" + "ab" * 5
    assert {name: spread.count for name, spread in found.items()} == {"a": 5, "b": 5}


def test_calls_in_a_row_are_told_as_one() -> None:
    times: list[int] = []
    assert in_a_row(CPU, 4)(lambda: times.append(1)) < 1.0
    assert len(times) == 4


def test_a_profile_names_what_takes_the_time() -> None:
    assert "aten::mm" in kernels(lambda: torch.ones(256, 256) @ torch.ones(256, 256), CPU)


def test_a_ceiling_of_a_forward_is_the_sum_of_its_products_and_attentions() -> None:
    ceilings = Ceilings(CPU, small=True)
    ceilings.gemm = 1e9
    ceilings.attention = lambda rows, heads, tokens, width: {"slow": 9.0, "fast": tokens / 1000}  # type: ignore[assignment]
    found = ceilings.forward_s(tiny.MMDIT_X, 2, 64, 36)
    assert found == pytest.approx(2 * flops.linear(tiny.MMDIT_X, 64, 36) / 1e9 + 4 * 0.1 + 2 * 0.064)


def test_goals_are_of_a_peer_or_of_the_figure_itself() -> None:
    goals = [Goal(0.5, "eager"), Goal(0.9, "compiled"), Goal(113)]
    found = {"ours": at(0.110), "eager": at(0.2), "compiled": at(0.13)}
    finding = Finding("large-1024", "a step", "ms", found, goals, 0.08)
    assert finding.missed == ["≤ 0.5 x eager"]
    cells = dict(zip(COLUMNS, [cell.strip() for cell in finding.line("now")[1:-1].split("|")], strict=True))
    assert (cells["ours"], cells["ours / eager"], cells["of the ceiling"]) == ("110.00 ms", "0.550", "73 %")
    assert cells["met"] == "no: ≤ 0.5 x eager"


@pytest.mark.parametrize("distance", [0.3, math.nan])
def test_a_row_whose_result_is_another_is_not_met(distance: float) -> None:
    finding = Finding(
        "text", "", "ms", {"ours": at(1.0), "eager": at(9.0)}, [Goal(0.3, "eager")], apart={"eager": distance}
    )
    assert finding.missed == ["the same result as eager"]


def test_a_figure_that_is_no_number_meets_no_goal() -> None:
    assert Finding("text", "", "ms", {"ours": at(math.nan)}, [Goal(1)]).missed


def table(run: str, **values: float) -> Table:
    lines = {name: Finding(name, "", "s", {"ours": at(value)}).line(run) for name, value in values.items()}
    return Table(lines, {run: f"a GPU: the {run} one"})


def test_rows_replace_those_of_their_name_and_all_else_stays(tmp_path: Path) -> None:
    path = tmp_path / "RESULTS.md"
    path.write_text("# What was measured\n\n## Before\n\n| a | b |\n")
    merge(path, table("first", **{"start-ready": 1.0, "text": 2.0}), ORDER)
    path.write_text(path.read_text() + "\n## After\n")
    merge(path, table("second", **{"text": 3.0, "large-1024": 4.0}), ORDER)
    text = path.read_text()
    assert text.startswith("# What was measured\n\n## Before\n\n| a | b |\n")
    assert text.endswith("\n## After\n")
    assert list(Table.of(text).lines) == ["large-1024", "text", "start-ready"]
    assert "3.00 s" in Table.of(text).lines["text"]
    assert Table.of(text).runs == {"first": "a GPU: the first one", "second": "a GPU: the second one"}


def test_a_run_without_rows_left_is_forgotten(tmp_path: Path) -> None:
    path = tmp_path / "RESULTS.md"
    for run in ("first", "second"):
        merge(path, table(run, text=1.0), ORDER)
    assert list(Table.of(path.read_text()).runs) == ["second"]


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-m", "tests.benchmarks.gpu", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        pytest.param(
            [],
            "full size needs a CUDA device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
        (["--small", "--rows", "huge"], "no such row: huge; there are ceilings, large-1024"),
    ],
)
@pytest.mark.slow
def test_what_cannot_be_measured_is_said(arguments: list[str], said: str) -> None:
    ran = bench(*arguments)
    assert ran.returncode == 2
    assert said in ran.stderr


@pytest.mark.slow
@pytest.mark.timeout(700)
def test_every_row_is_measured_on_tiny_nets_and_merged(tmp_path: Path) -> None:
    out, target = tmp_path / "part.md", tmp_path / "RESULTS.md"
    ran = bench("--small", "--out", str(out))
    assert ran.returncode == 0, ran.stdout + ran.stderr
    found = Table.of(out.read_text())
    assert all(any(name.startswith(row.name) for name in found.lines) for row in ROWS)
    for line in found.lines.values():
        cells = dict(zip(COLUMNS, [cell.strip() for cell in line[1:-1].split("|")], strict=True))
        figures = re.findall(r"[\d.]+", " ".join((cells["ours"], cells["ours / eager"], cells["ours / compiled"])))
        assert figures, line
        assert all(math.isfinite(float(figure)) for figure in figures)
        assert "nan" not in line
        assert "the same result" not in line
    merge(target, table("first", **{"text": 2.0, "other": 1.0}), ORDER)
    assert bench("--merge", str(out), "--out", str(target)).returncode == 0
    merged = Table.of(target.read_text())
    assert merged.lines.keys() == {*found.lines, "other"}
    assert merged.lines["text"] == found.lines["text"]
