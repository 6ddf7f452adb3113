"""How every `darkroom` command reads its settings, speaks, fails and is interrupted."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar

import typer
from pydantic import ValidationError
from pydantic_settings import BaseSettings

from worker.contract.settings import complaints

INTERRUPTED = 130
"""The exit status after Ctrl-C."""

Settings = TypeVar("Settings", bound=BaseSettings)


@contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM and a closed terminal end us as Ctrl-C does: in order."""

    def interrupt(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    previous = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number, handler in previous.items():
        if handler != signal.SIG_IGN:  # nohup
            signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def read_settings(kind: type[Settings], **options: Any) -> Settings:
    """The settings of environment and options, or one line for each that is wrong."""
    try:
        return kind(**{name: value for name, value in options.items() if value is not None})
    except ValidationError as error:
        fail(complaints(error))


def say(line: str) -> None:
    """Says it at once, whatever it goes through."""
    typer.echo(line)
    sys.stdout.flush()


def fail(message: str) -> NoReturn:
    """Ends the command with one sentence and exit status 1."""
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(1)
