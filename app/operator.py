"""`darkroom queue`: what its operator sees of jobs and workers, and does to them, on Redis itself."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Annotated

import typer
from pydantic import RedisDsn
from rich.console import Console
from rich.table import Table

from app.embedded import running_url
from app.stack import StackSettings
from app.terminal import INTERRUPTED, fail, interruptible, read_settings, say
from worker.contract.errors import QueueUnavailable, UnknownModel
from worker.contract.operations import FleetStatus, ModelStatus, Operations, WorkerStatus
from worker.contract.settings import ContractSettings

POLL_S = 0.5
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}

queue_commands = typer.Typer(help="See what waits and runs, and steer it. Works on Redis itself, without a gateway.")

Models = Annotated[list[str] | None, typer.Argument(metavar="MODEL", help="Names of models.")]
Every = Annotated[bool, typer.Option("--all", help="Every model known by now, in place of names.")]


@queue_commands.command()
def status(as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False) -> None:
    """Show how many jobs wait, run and have ended, by model and priority; and each worker."""
    with _operating("status") as operations:
        render_status(operations.status(), as_json=as_json)


@queue_commands.command()
def pause(models: Models = None, every: Every = False) -> None:
    """Let no job of these models start any more. Those running go on, new ones wait."""
    with _operating("pause") as operations:
        names = _named(operations, models, every)
        operations.pause(names)
        say(f"paused: {', '.join(names)}")


@queue_commands.command()
def resume(models: Models = None, every: Every = False) -> None:
    """End what pause and drain began."""
    with _operating("resume") as operations:
        names = _named(operations, models, every)
        operations.resume(names)
        say(f"resumed: {', '.join(names)}")


@queue_commands.command()
def drain(
    models: Models = None,
    every: Every = False,
    wait: Annotated[bool, typer.Option("--wait", help="Return once nothing waits or runs any more.")] = False,
    timeout: Annotated[int | None, typer.Option(min=0, help="With --wait: give up after so many seconds.")] = None,
) -> None:
    """Refuse new jobs of these models, and do those that wait; until resume. Ends a pause."""
    if timeout is not None and not wait:
        fail("--timeout is for --wait")
    with _operating("drain") as operations:
        names = _named(operations, models, every)
        operations.drain(names)
        say(f"draining: {', '.join(names)}")
        if wait:
            try:
                with interruptible():
                    wait_until_empty(operations, names, timeout)
            except StillBusy as busy:
                fail(f"not empty after {timeout} s, and still draining: {busy}")
            except KeyboardInterrupt:
                typer.echo("not waiting any more; still draining", err=True)
                raise typer.Exit(INTERRUPTED) from None
            say("empty")


@queue_commands.command()
def retry(
    ids: Annotated[list[str] | None, typer.Argument(metavar="ID", help="Jobs; with --failed, models.")] = None,
    failed: Annotated[bool, typer.Option("--failed", help="All failed jobs: of these models, or of all.")] = False,
    since: Annotated[str | None, typer.Option(help="With --failed: those of the last 30m, 2h, 1d, ...")] = None,
) -> None:
    """Queue failed or canceled jobs again, under the same ids, each with as much time as it had at first."""
    if since is not None and not failed:
        fail("--since is for --failed")
    if not ids and not failed:
        fail("name jobs by their ids, or say --failed")
    since_s = None if since is None else _seconds("--since", since)
    queued, refused = 0, 0
    with _operating("retry") as operations:
        for job_id in operations.failed(ids or operations.models(), since_s) if failed else dict.fromkeys(ids or ()):
            retried = operations.retry(job_id)
            if retried.refused:
                refused += 1
                typer.echo(f"{job_id} stays as it is: {retried.refused}", err=True)
            else:
                queued += 1
                say(f"{job_id} is queued, {retried.position} before it")
    say(f"{queued} queued again" + (f", {refused} not" if refused else ""))
    raise typer.Exit(1 if refused else 0)


@queue_commands.command()
def purge(
    models: Models = None,
    failed: Annotated[bool, typer.Option("--failed", help="Forget failed jobs: of these models, or of all.")] = False,
    all_waiting: Annotated[bool, typer.Option("--all-waiting", help="Cancel waiting jobs of every model.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Cancel all waiting jobs of these models, or forget their failed ones. Running jobs go on."""
    if failed and all_waiting:
        fail("--failed and --all-waiting are two things; say one")
    if models and all_waiting:
        fail("name models, or say --all-waiting; not both")
    if not (models or failed or all_waiting):
        fail("name models, or say --all-waiting or --failed")
    what = "failed" if failed else "waiting"
    with _operating("purge") as operations:
        names = models or operations.models()
        jobs = operations.failed(names) if failed else operations.waiting(names)
        question = f"{'Forget' if failed else 'Cancel'} {len(jobs)} {what} job(s) of {', '.join(names)}?"
        if jobs and not yes and not _confirmed(question):
            fail("nothing was purged; --yes does not ask")
        purged = operations.purge("failed" if failed else "queued", jobs)
    say(f"{purged} {what} job(s) {'forgotten' if failed else 'canceled'}")


@queue_commands.command()
def forget(models: Annotated[list[str], typer.Argument(metavar="MODEL", help="Names of models.")]) -> None:
    """Forget models that nobody serves any more. Refused while a worker holds one, or jobs of it wait or run."""
    refused = False
    with _operating("forget") as operations:
        for model in dict.fromkeys(models):
            if why := operations.forget(model):
                refused = True
                typer.echo(f"{model} stays known: {why}", err=True)
            else:
                say(f"forgotten: {model}")
    raise typer.Exit(1 if refused else 0)


class StillBusy(Exception):
    """The time to wait is up, and jobs are left; the message says how many of which model."""


def find_redis(settings: StackSettings) -> ContractSettings:
    """The settings; where they do not say where Redis is, with that of the `darkroom up` that runs on this folder."""
    if settings.embedded and (url := running_url(settings.valkey_dir)):
        return settings.model_copy(update={"redis_url": RedisDsn(url)})
    return settings


def no_answer(error: QueueUnavailable, settings: ContractSettings, command: str) -> str:
    """What an operator is told when Redis is away: what was tried, where, and what came of it."""
    url = settings.redis_url  # without its password
    return (
        f"{command} did not succeed: Redis at {url.host}:{url.port} gave no answer ({error.__cause__}); "
        "DARKROOM_REDIS_URL or DARKROOM_DATA_DIR name another"
    )


def parse_duration(text: str) -> float:
    """Seconds of a number with s, m, h or d behind it, such as 90s, 30m, 2h or 1.5d; ValueError."""
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)([smhd])", text)
    if match is None:
        raise ValueError(f"{text!r} is no length of time; allowed: a number with s, m, h or d, such as 30m or 2h")
    return float(match[1]) * UNITS[match[2]]


def wait_until_empty(operations: Operations, models: Sequence[str], timeout_s: float | None) -> None:
    """Returns when no job of these models waits or runs; StillBusy."""
    end = None if timeout_s is None else time.monotonic() + timeout_s
    with Console(stderr=True, markup=False).status("draining") as spinner:
        while True:
            operations.reap()
            status = operations.status()
            busy = [model for model in status.models if model.model in models and model.waiting + model.running]
            if not busy:
                return
            left = "; ".join(_left(model, status.workers) for model in busy)
            if end is not None and time.monotonic() >= end:
                raise StillBusy(left)
            spinner.update(left)
            time.sleep(POLL_S)


def render_status(status: FleetStatus, *, as_json: bool) -> None:
    """Writes it, for people or for programs."""
    if as_json:
        typer.echo(json.dumps(asdict(status), indent=2))
        return
    if not status.models:
        typer.echo("no model is known yet: no worker has started against this Redis")
    width = None if Console().is_terminal else 160  # a file has none: nothing shall be folded
    console = Console(width=width, markup=False, highlight=False)
    tables = [_models_table(status.models), _workers_table(status.workers)]
    for n, table in enumerate(table for table in tables if table.row_count):
        console.print(*[""] * n, table, sep="\n")


def _left(model: ModelStatus, workers: Iterable[WorkerStatus]) -> str:
    nobody = "" if any(model.model in worker.models for worker in workers) else ", and no worker has the model"
    paused = ", and it is paused" if model.paused else ""
    return f"{model.model}: {model.waiting} waiting, {model.running} running{paused}{nobody}"


def _models_table(models: Iterable[ModelStatus]) -> Table:
    table = _table("model", "priority", "waiting", "oldest", "apart", "running", "succeeded", "failed", "canceled")
    for model in models:
        marks = [word for word, so in (("paused", model.paused), ("draining", model.draining)) if so]
        name = f"{model.model} ({', '.join(marks)})" if marks else model.model
        for n, queue in enumerate(model.queues):
            ended = (queue.succeeded, queue.failed, queue.canceled)
            counts = (queue.waiting, _age(queue.oldest_s), queue.suspects, queue.running, *ended)
            table.add_row("" if n else name, queue.priority, *map(str, counts))
    return table


def _workers_table(workers: Iterable[WorkerStatus]) -> Table:
    table = _table("worker", "models", "jobs", "lease ends in", "heard of")
    for worker in workers:
        heard = "never" if worker.heard_s is None else f"{_age(worker.heard_s)} ago"
        table.add_row(worker.worker, ", ".join(worker.models), str(worker.held), _lease(worker.lease_left_s), heard)
    return table


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        words = column in ("model", "priority", "worker", "models")
        table.add_column(column, justify="left" if words else "right", overflow="fold")
    return table


def _lease(left_s: float | None) -> str:
    if left_s is None:
        return "none"
    return f"{left_s:.1f} s" if left_s > 0 else f"lapsed {_age(-left_s)} ago"


def _age(seconds: float | None) -> str:
    """Seconds in the largest unit that they fill."""
    if seconds is None:
        return "-"
    unit = next(unit for unit in ("d", "h", "m", "s") if seconds >= UNITS[unit] or unit == "s")
    return f"{seconds / UNITS[unit]:.0f}{unit}" if unit == "s" else f"{seconds / UNITS[unit]:.1f}{unit}"


@contextmanager
def _operating(verb: str) -> Iterator[Operations]:
    settings = find_redis(read_settings(StackSettings))
    try:
        with Operations.connect(settings) as operations:
            yield operations
    except UnknownModel as error:
        fail(str(error))
    except QueueUnavailable as error:
        fail(no_answer(error, settings, f"queue {verb}"))


def _named(operations: Operations, models: list[str] | None, every: bool) -> list[str]:
    """The models that are meant: those named, or all that are known."""
    if bool(models) == every:
        fail("name models, or say --all" + ("; not both" if every else ""))
    names = models or operations.models()
    if not names:
        fail("no model is known yet: no worker has started against this Redis")
    return names


def _seconds(option: str, text: str) -> float:
    try:
        return parse_duration(text)
    except ValueError as error:
        fail(f"{option}: {error}")


def _confirmed(question: str) -> bool:
    try:
        return typer.confirm(question, err=True)
    except typer.Abort:  # nobody there to answer
        typer.echo(err=True)
        return False
