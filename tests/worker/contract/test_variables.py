"""A misspelt variable is noticed, and no other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer
from typer.core import TyperGroup

from app.cli import cli
from app.doctor import DoctorSettings
from app.stack import StackSettings
from app.webhooks import WebhookSettings
from worker.contract.variables import AROUND, OPTIONS, SETTINGS, unread
from worker.settings import WorkerSettings

ROOT = Path(__file__).parents[3]


def test_the_settings_known_are_those_that_are_read():
    kinds = (StackSettings, WebhookSettings, WorkerSettings, DoctorSettings)
    assert {name.upper() for kind in kinds for name in kind.model_fields} == SETTINGS


def test_the_options_known_are_those_that_are_read():
    def variables(command):
        if isinstance(command, TyperGroup):
            return {name for one in command.commands.values() for name in variables(one)}
        return {option.envvar for option in command.params if option.envvar}

    assert variables(typer.main.get_command(cli)) == {f"DARKROOM_{name}" for name in OPTIONS}


def test_what_our_deployments_set_is_known():
    files = [ROOT / "docker-compose.yml", ROOT / "Dockerfile", *(ROOT / "deploy").rglob("*.y*ml")]
    named = {name for file in files for name in re.findall(r"\bDARKROOM_[A-Z0-9_]*[A-Z0-9]\b", file.read_text())}
    assert {f"DARKROOM_{name}" for name in AROUND} & named
    assert unread(dict.fromkeys(named, "")) == []


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("DARKROOM_AUHT", ["nothing reads DARKROOM_AUHT; did you mean DARKROOM_AUTH?"]),
        ("darkroom_auht", ["nothing reads darkroom_auht; did you mean DARKROOM_AUTH?"]),
        ("DARKROOM_REDIS_ULR_FILE", ["nothing reads DARKROOM_REDIS_ULR_FILE; did you mean DARKROOM_REDIS_URL_FILE?"]),
        ("DARKROOM_XYZZY", ["nothing reads DARKROOM_XYZZY"]),
        ("DARKROOM_AUTH", []),
        ("DARKROOM_AUTH_FILE", []),
        ("AUHT", []),
    ],
)
def test_a_variable_that_nothing_reads_is_told_with_the_one_that_was_meant(name, told):
    assert unread({name: "on"}) == told
