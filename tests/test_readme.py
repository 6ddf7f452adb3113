"""The README's table of settings is what the code says; `python -m tests.test_readme` writes it anew."""

from __future__ import annotations

import re
from pathlib import Path

from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings

from app.settings import GatewaySettings
from app.stack import StackSettings
from app.webhooks import WebhookSettings
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
COMPUTED = {"models": "those in `model/bundles/`", "worker_name": "host name, process id, chance"}


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


if __name__ == "__main__":
    README.write_text(TABLE.sub(lambda _: settings_table(), README.read_text()))
