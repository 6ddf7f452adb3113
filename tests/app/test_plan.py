"""`darkroom doctor --plan`: for which models, for which card, and what it prints."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from app.cli import cli
from app.plan import Card, cards_of, models_of
from model.memory import CARDS

ALL = ["large", "large-turbo", "medium"]


def doctor(*arguments: str, models: str = "demo") -> tuple[int, str]:
    result = CliRunner().invoke(cli, ["doctor", *arguments], env={"DARKROOM_MODELS": models})
    return result.exit_code, result.stdout + result.stderr


def test_a_plan_for_a_card_names_bytes_and_settings() -> None:
    code, told = doctor("--plan", "--gpu", "24", "--models", "sd3.5-large")
    assert code == 0
    assert told.startswith("large on 24 GB (24.0 GB), one guided picture at a time\n")
    assert "MMDiT large               16.3 GB" in told
    assert "Set: DARKROOM_TEXT_ENCODERS=offload\n" in told
    assert "-> bf16, encoders offloaded                 20.5 GB   11.2 GB\n" in told


def test_what_fits_nowhere_is_said_with_the_bytes_and_exit_code_1() -> None:
    code, told = doctor("--plan", "--gpu", "12", "--models", "large,medium")
    assert code == 1
    assert "Nothing fits: even fp8, encoders offloaded, for pictures to 512x512, needs 19.6 GB of the GPU" in told


def test_a_plan_for_programs_is_json() -> None:
    code, told = doctor("--plan", "--gpu", "80", "--models", "large,medium", "--json")
    (plan,) = json.loads(told)
    assert (code, plan["card"], plan["models"]) == (0, "80 GB", ["large", "medium"])
    assert plan["chosen"]["settings"] == {"DARKROOM_TEXT_ENCODERS": "gpu"}
    assert sum(plan["chosen"]["gpu"].values()) == plan["chosen"]["gpu_total"] <= plan["bytes"]


def test_without_a_card_all_that_are_sold_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.doctor.run_command", lambda argv: None)
    code, told = doctor("--plan", models="mine:medium=/models/m,demo")
    assert code == 0
    assert told.startswith("medium, one guided picture at a time\n")
    assert [line.split()[0] for line in told.splitlines() if " GB " in line] == [str(size) for size in CARDS]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--gpu", "24"], "--gpu and --models are for --plan"),
        (["--models", "large"], "--gpu and --models are for --plan"),
        (["--plan", "--role", "worker"], "--plan goes with --gpu, --models and --json only"),
        (["--plan", "--models", "large,sdxl"], "--models: 'sdxl' is no published model; known: large, large-turbo"),
    ],
)
def test_options_that_do_not_go_together_are_refused(arguments: list[str], says: str) -> None:
    code, told = doctor(*arguments)
    assert code == 1
    assert says in told


@pytest.mark.parametrize(
    ("named", "models"),
    [
        ("sd3.5-large=/a,sd3.5-medium=/b", ["large", "medium"]),
        ("quick:large-turbo=/a,demo", ["large-turbo"]),
        ("demo,mine=/a", ALL),
        ("", ALL),
    ],
)
def test_models_are_those_of_the_setting_as_far_as_they_are_published(named: str, models: list[str]) -> None:
    assert models_of(named, strict=False) == models


def test_cards_of_this_machine_are_asked_of_the_driver_each_kind_once() -> None:
    told = "NVIDIA H100 80GB HBM3, 81559\nNVIDIA H100 80GB HBM3, 81559\nNVIDIA L4, 23034"
    found = cards_of(None, lambda argv: told)
    assert [(card.name, card.gpu) for card in found] == [
        ("NVIDIA H100 80GB HBM3", 81559 * 2**20), ("NVIDIA L4", 23034 * 2**20),
    ]  # fmt: skip
    assert cards_of(24, lambda argv: told) == [Card("24 GB", 24 * 10**9)]
    assert len(cards_of(None, lambda argv: "NVIDIA GB10, [N/A]")) == len(CARDS)
