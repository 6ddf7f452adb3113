"""The README: its settings are what the code reads (`python -m tests.test_readme` writes them anew), its code works."""

from __future__ import annotations

import re
import shlex
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings
from typer.core import TyperGroup

from app.cli import cli
from app.settings import GatewaySettings
from app.stack import StackSettings
from app.webhook_signature import signature_headers, signing_secret
from app.webhooks import WebhookSettings
from model.training.__main__ import parser
from worker.contract.settings import ContractSettings
from worker.settings import WorkerSettings

README = Path(__file__).parent.parent / "README.md"
TABLE = re.compile(r"(?<=<!-- settings -->\n).*?(?=<!-- /settings -->)", re.DOTALL)

READERS: tuple[tuple[str, type[BaseSettings], type[BaseSettings] | None], ...] = (
    ("all", ContractSettings, None),
    ("gateway", GatewaySettings, ContractSettings),
    ("worker", WorkerSettings, ContractSettings),
    ("`up`", StackSettings, GatewaySettings),
    ("webhooks", WebhookSettings, GatewaySettings),
)
COMPUTED = {
    "models": "those in `model/bundles/`",
    "precision": "`bf16`",
    "worker_name": "host name, process id, chance",
}


def settings_table() -> str:
    rows = [
        f"| `DARKROOM_{name.upper()}` | {reader} | {default(name, field)} | {field.description} |"
        for reader, settings, base in READERS
        for name, field in settings.model_fields.items()
        if base is None or name not in base.model_fields
    ]
    return "\n".join(["| variable | read by | default | |", "| --- | --- | --- | --- |", *rows, ""])


def default(name: str, field: FieldInfo) -> str:
    if name in COMPUTED:
        return COMPUTED[name]
    return "" if field.default in (None, "") else f"`{field.default}`"


def test_the_table_of_settings_is_what_the_code_reads() -> None:
    match = TABLE.search(README.read_text())
    assert match is not None
    assert match.group() == settings_table()


def test_every_setting_says_what_it_does() -> None:
    for _, settings, _ in READERS:
        for name, field in settings.model_fields.items():
            assert field.description, f"{settings.__name__}.{name}"


def commands_of(program: str) -> list[str]:
    """The README's calls of a program, without what stands before and behind them."""
    return re.findall(rf"^(?:\w+=\S+ |\.venv/bin/)*{program} (.*?)(?:\s+#.*)?$", README.read_text(), re.MULTILINE)


@pytest.mark.parametrize("line", commands_of("darkroom"))
def test_a_command_of_the_readme_is_understood(line: str) -> None:
    command, arguments = typer.main.get_command(cli), shlex.split(line)
    while isinstance(command, TyperGroup):
        command = command.commands[arguments.pop(0)]
    command.make_context("darkroom", arguments)  # raises what a user would be told


def test_a_shell_is_told_where_commands_are_before_the_first_one() -> None:
    text = README.read_text()
    first = re.search(r"^(darkroom|python) ", text, re.MULTILINE)
    assert first is not None
    assert 'export PATH="$PWD/.venv/bin:$PATH"' in text[: first.start()]


@pytest.mark.parametrize("line", commands_of("python -m model.training"))
def test_a_training_of_the_readme_is_understood(line: str) -> None:
    assert parser().parse_args(shlex.split(line)).command in line


IsOurs = Callable[[str, dict[str, str], bytes], bool]
SECRET = signing_secret(b"the server's", "key_1")
BODY = '{"type": "generation.completed", "data": {"prompt": "ein Käse"}}'.encode()


@pytest.fixture
def is_ours() -> IsOurs:
    """What the README tells receivers of webhooks to check a message with."""
    (example,) = re.findall(r"^```python\n([^`]*^def is_ours.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)
    names: dict[str, IsOurs] = {}
    exec(example, names)
    return names["is_ours"]


def signed(age_s: int = 0) -> dict[str, str]:
    return signature_headers(SECRET, "gen_1:completed:1", int(time.time()) - age_s, BODY)


def test_the_readmes_check_of_webhooks_knows_what_we_sign(is_ours: IsOurs) -> None:
    assert is_ours(SECRET, signed(), BODY)


def test_the_readmes_check_of_webhooks_knows_one_of_several_signatures(is_ours: IsOurs) -> None:
    headers = signed()
    assert is_ours(SECRET, headers | {"webhook-signature": f"v1,AAAA {headers['webhook-signature']}"}, BODY)


@pytest.mark.parametrize(
    ("headers", "secret", "body"),
    [
        ({}, SECRET, BODY.replace(b"completed", b"canceled")),
        ({"webhook-id": "gen_2:completed:1"}, SECRET, BODY),
        ({"webhook-signature": "v1,AAAA"}, SECRET, BODY),
        ({}, signing_secret(b"the server's", "key_2"), BODY),
        (signed(age_s=3600), SECRET, BODY),
        (signed(age_s=-3600), SECRET, BODY),
        ({"webhook-timestamp": str(int(time.time()) - 60)}, SECRET, BODY),
    ],
    ids=["body", "id", "signature", "secret", "old", "early", "time"],
)
def test_the_readmes_check_of_webhooks_refuses_what_we_did_not_sign(
    is_ours: IsOurs, headers: dict[str, str], secret: str, body: bytes
) -> None:
    assert not is_ours(secret, signed() | headers, body)


if __name__ == "__main__":
    README.write_text(TABLE.sub(lambda _: settings_table(), README.read_text()))
