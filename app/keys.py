"""`darkroom keys`: makes, lists, limits and revokes API keys, and tells what each has used; on Redis itself."""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from app.operator import find_redis, no_answer
from app.stack import StackSettings
from app.terminal import fail, read_settings, say
from worker.contract.errors import InvalidField, QueueUnavailable
from worker.contract.keys import SCOPES, UNLIMITED, USUAL_SCOPES, ApiKey, Keyring, new_key, parse_key
from worker.contract.queue import JobQueue
from worker.contract.settings import ContractSettings
from worker.contract.usage import USAGE_DAYS, Usage

POLL_S = 0.5
MAX_ACTIVE = re.compile(r"[1-9][0-9]{0,5}")
WIDTH = 160  # of what is no terminal: nothing shall be folded
DEFAULT = "default"  # of the server, DARKROOM_KEY_RATE and DARKROOM_KEY_MAX_ACTIVE
NUMBERS = ("jobs", "pictures", "megapixel_steps", "gpu_seconds")

key_commands = typer.Typer(help="Make and revoke API keys, and see what they used. Works on Redis itself.")

Which = Annotated[str, typer.Argument(metavar="ID|NAME", help="The key, as list shows it.")]
Name = Annotated[str, typer.Argument(metavar="NAME", help="What the key is called: who or what has it.")]
Json = Annotated[bool, typer.Option("--json", help="For programs.")]


@key_commands.command()
def add(
    name: Name,
    scope: Annotated[
        list[str] | None,
        typer.Option(help=f"What it may do: {', '.join(SCOPES)}; may be repeated.  [default: generate, read]"),
    ] = None,
    rate: Annotated[
        str | None, typer.Option(help="Requests, such as 120/minute, or none.  [default: DARKROOM_KEY_RATE]")
    ] = None,
    max_active: Annotated[
        str | None,
        typer.Option(help="Jobs that may wait and run at once, or none.  [default: DARKROOM_KEY_MAX_ACTIVE]"),
    ] = None,
    if_none: Annotated[bool, typer.Option("--if-none", help="Make it only where there is no key yet.")] = False,
    write: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write it there as well, for the eyes of this user alone.")
    ] = None,
    wait_s: Annotated[
        float, typer.Option("--wait", metavar="SECONDS", min=0, help="How long to wait for a Redis that is away.")
    ] = 0.0,
) -> None:
    """Make a key and print it: this once, for only its hash is kept."""
    with _keyring("add") as (keyring, _):
        try:
            key, text = new_key(name, scopes=tuple(scope or USUAL_SCOPES), **_limits(rate, max_active))
            live = {key.id for key in _known(keyring, wait_s) if key.revoked_at is None}
            if if_none and live:
                typer.echo("there is a key already; none was made", err=True)
                return
            with _written(write, text, live):
                if not keyring.add(key, only_first=if_none):
                    fail("another key was made just now, and this one was not")
        except InvalidField as error:
            fail(str(error))
    where = f", is in {write} too" if write else ""
    typer.echo(f"key {key.id} of {key.name} ({', '.join(key.scopes)}){where}, and is shown only here:", err=True)
    say(text)


@key_commands.command(name="list")
def list_keys(as_json: Json = False) -> None:
    """Show all keys, also revoked ones; never their secrets, which nobody has but their owners."""
    with _keyring("list") as (keyring, _):
        keys, used = keyring.known(), keyring.used()
    if as_json:
        typer.echo(json.dumps([_public(key) | {"used_at": used.get(key.id)} for key in keys], indent=2))
        return
    if not keys:
        typer.echo("there is no key yet; darkroom keys add NAME makes one")
        return
    table = _table("id", "name", "may", "rate", "jobs at once", "made", "last used", "")
    for key in keys:
        state = f"revoked {_day(key.revoked_at)}" if key.revoked_at else ""
        table.add_row(
            key.id, key.name, ", ".join(key.scopes), *_shown(key), _day(key.created_at), _used(key, used), state
        )
    _print(table)


@key_commands.command()
def limit(
    which: Which,
    rate: Annotated[
        str | None, typer.Option(help="Requests, such as 120/minute; none; or default: DARKROOM_KEY_RATE.")
    ] = None,
    max_active: Annotated[
        str | None, typer.Option(help="Jobs that may wait and run at once; none; or default: DARKROOM_KEY_MAX_ACTIVE.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Change the limits of a key that is in use; what is not said stays. Jobs that are there already go on."""
    if rate is None and max_active is None:
        fail("nothing to change; say --rate, --max-active or both")
    with _keyring("limit") as (keyring, _):
        try:
            key = keyring.limit(which, **_limits(rate, max_active))
        except InvalidField as error:
            fail(str(error))
    if key is None:
        fail(_no_key(which))
    if as_json:
        typer.echo(json.dumps(_public(key), indent=2))
        return
    rate, max_active = _shown(key)
    say(f"{key.id} of {key.name}: rate {rate}, jobs at once {max_active}; every gateway knows within a second")


@key_commands.command()
def revoke(which: Which) -> None:
    """Refuse a key from now on, for good. Jobs that were asked for with it go on."""
    with _keyring("revoke") as (keyring, _):
        key = keyring.revoke(which)
    if key is None:
        fail(_no_key(which))
    say(f"revoked: {key.id} of {key.name}; every gateway refuses it within a second")


@key_commands.command()
def usage(
    days: Annotated[int, typer.Option(min=1, max=USAGE_DAYS, help="The last so many days, today among them.")] = 30,
    as_json: Json = False,
) -> None:
    """Show what was made with each key, by day and model (days in UTC)."""
    with _keyring("usage") as (keyring, settings):
        rows = [asdict(row) for row in asyncio.run(_usage(settings, days))]
        names = {key.id: key.name for key in keyring.known()}
    for row in rows:
        row["name"] = names.get(row["owner"], "")
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    if not rows:
        typer.echo(f"nothing was made in the last {days} days")
        return
    table = _table("day", "key", "model", *NUMBERS)
    for row in rows:
        who = row["name"] or row["owner"] or "(keys off)"
        table.add_row(row["day"], who, row["model"], *(_number(row[column]) for column in NUMBERS))
    _print(table)


async def _usage(settings: ContractSettings, days: int) -> list[Usage]:
    queue = JobQueue.connect(settings)
    try:
        return await queue.usage(days)
    finally:
        await queue.close()


@contextmanager
def _keyring(verb: str) -> Iterator[tuple[Keyring, ContractSettings]]:
    settings = find_redis(read_settings(StackSettings))
    try:
        with Keyring.connect(settings) as keyring:
            yield keyring, settings
    except QueueUnavailable as error:
        fail(no_answer(error, settings, f"keys {verb}"))


def _known(keyring: Keyring, wait_s: float) -> Sequence[ApiKey]:
    """The keys, once Redis answers; QueueUnavailable, if it does not in time."""
    end = time.monotonic() + wait_s
    while True:
        try:
            return keyring.known()
        except QueueUnavailable:
            if time.monotonic() >= end:
                raise
            time.sleep(POLL_S)


@contextmanager
def _written(path: Path | None, text: str, live: set[str]) -> Iterator[None]:
    """Has the key in its file before Redis has it: a crash between leaves a key that opens nothing, and no lost one."""
    if path is None:
        yield
        return
    _require_replaceable(path, live)
    try:
        _write_secret(path, text)
    except OSError as error:
        fail(f"--write: {path} cannot be written: {error.strerror}")
    try:
        yield
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _require_replaceable(path: Path, live: set[str]) -> None:
    """A file may be replaced whose key opens nothing any more, and no other."""
    try:
        held = parse_key(path.read_text("utf-8", "replace").strip())
    except FileNotFoundError:
        return
    except OSError as error:
        fail(f"--write: {path} cannot be read: {error.strerror}")
    if held is None or held[0] in live:
        what = "something other than a key" if held is None else "a key that is in use"
        fail(f"--write: {path} holds {what}; name another file, or remove it first")


def _write_secret(path: Path, text: str) -> None:
    fresh = path.with_name(f"{path.name}.new")
    fresh.unlink(missing_ok=True)
    with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(f"{text}\n")
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)


def _limits(rate: str | None, max_active: str | None) -> dict[str, Any]:
    """Those limits that were said, as a key has them. InvalidField."""
    limits: dict[str, Any] = {}
    if rate is not None:
        limits["rate"] = None if rate == DEFAULT else rate
    if max_active is not None:
        if max_active not in (DEFAULT, UNLIMITED) and not MAX_ACTIVE.fullmatch(max_active):
            raise InvalidField("max-active", max_active, "1 to 999999; none; default")
        limits["max_active"] = None if max_active == DEFAULT else 0 if max_active == UNLIMITED else int(max_active)
    return limits


def _shown(key: ApiKey) -> tuple[str, str]:
    """Its rate and its jobs at once, in the words in which they are set."""
    return key.rate or DEFAULT, DEFAULT if key.max_active is None else str(key.max_active or UNLIMITED)


def _no_key(which: str) -> str:
    return f"no key that is in use has the id or name {which!r}; darkroom keys list shows all"


def _public(key: ApiKey) -> dict[str, Any]:
    return {name: value for name, value in asdict(key).items() if name != "digest"}


def _used(key: ApiKey, used: dict[str, float]) -> str:
    return _day(used[key.id]) if key.id in used else "never"


def _day(unix_s: float) -> str:
    return f"{datetime.fromtimestamp(unix_s, UTC):%Y-%m-%d %H:%M}"


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.1f}"


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column.replace("_", " "), justify="right" if column in NUMBERS else "left", overflow="fold")
    return table


def _print(table: Table) -> None:
    Console(width=None if sys.stdout.isatty() else WIDTH, markup=False, highlight=False).print(table)
