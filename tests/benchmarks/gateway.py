"""What one gateway process does on one core: requests a second, and event streams that wait.

python -m tests.benchmarks.gateway [--seconds 5] [--streams 1000]

The gateway has the first core; this client and a Valkey that writes every job to disk share the second. Loopback only.
The floor is the same app, middleware and validation, with a route that answers a constant and asks nobody.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import redis

from app.embedded import EmbeddedValkey, free_port
from tests.app.fake_worker import LARGE
from worker.contract.job import Progress, Result
from worker.intake import Claim, Intake

SERVER = "tests.benchmarks.constant"
ASKED = json.dumps({"model": LARGE.name, "prompt": "a lighthouse at dusk, oil on canvas"}).encode()
PAGE_KIB = resource.getpagesize() / 1024
AT_ONCE = (1, 32)


@dataclass(frozen=True)
class Measured:
    """Answers to one kind of request."""

    seconds: float
    latencies: list[float]  # seconds

    def row(self, name: str, at_once: int) -> str:
        """A row of the table."""
        cuts = statistics.quantiles(self.latencies, n=100, method="inclusive")
        rate = len(self.latencies) / self.seconds
        return f"| {name} | {at_once} | {rate:,.0f} | {cuts[49] * 1e3:.2f} ms | {cuts[98] * 1e3:.2f} ms |"


class Connection:
    """A kept-alive HTTP connection that costs little: the client shares its core with Valkey."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self.writer = reader, writer

    @classmethod
    async def open(cls, port: int) -> Connection:
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    async def ask(self, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
        """The status and body of an answer."""
        self.writer.write(request(method, path, body))
        head = await self._reader.readuntil(b"\r\n\r\n")
        length = next(line[15:] for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
        return int(head[9:12]), await self._reader.readexactly(int(length))

    async def until(self, text: bytes) -> None:
        """Returns once the text was read."""
        await self._reader.readuntil(text)


def request(method: str, path: str, body: bytes = b"") -> bytes:
    declared = f"content-type: application/json\r\ncontent-length: {len(body)}\r\n" if body else ""
    return f"{method} {path} HTTP/1.1\r\nhost: 127.0.0.1\r\n{declared}\r\n".encode() + body


@contextmanager
def gateway(redis_url: str, folder: Path) -> Iterator[tuple[int, int]]:
    """A gateway process on the first core: its port and pid."""
    port = free_port()
    environment = os.environ | {
        "DARKROOM_REDIS_URL": redis_url,
        "DARKROOM_STORE_DIR": str(folder / "pictures"),
        "DARKROOM_PORT": str(port),
        "DARKROOM_QUEUE_BOUND": "1000000",
    }
    command = ["taskset", "-c", "0", sys.executable, "-m", SERVER]
    with (folder / "gateway.log").open("wb") as log:
        child = subprocess.Popen(command, env=environment, stderr=log)
    try:
        yield port, child.pid
    finally:
        child.terminate()
        child.wait()


async def answering(port: int) -> None:
    deadline = time.monotonic() + 30
    while True:
        try:
            status, _ = await (await Connection.open(port)).ask("GET", "/readyz")
            if status == 200:
                return
        except (OSError, asyncio.IncompleteReadError):
            pass
        assert time.monotonic() < deadline, "the gateway does not answer"
        await asyncio.sleep(0.05)


async def measure(port: int, seconds: float, at_once: int, method: str, path: str, body: bytes) -> Measured:
    """Asks again and again on so many connections."""
    latencies: list[float] = []
    connections = [await Connection.open(port) for _ in range(at_once)]
    started = time.perf_counter()

    async def ask(connection: Connection) -> None:
        while (now := time.perf_counter()) < started + seconds:
            status, answer = await connection.ask(method, path, body)
            assert status < 300, answer
            latencies.append(time.perf_counter() - now)

    await asyncio.gather(*map(ask, connections))
    took = time.perf_counter() - started
    for connection in connections:
        connection.writer.close()
    return Measured(took, latencies)


async def requests(port: int, seconds: float) -> None:
    """The table of requests."""
    one = await Connection.open(port)
    _, answer = await one.ask("POST", "/v1/generations", ASKED)
    status_path = f"/v1/generations/{json.loads(answer)['id']}"
    kinds = (
        ("status, constant (floor)", "GET", "/constant", b""),
        ("status", "GET", status_path, b""),
        ("submit, constant (floor)", "POST", "/constant", ASKED),
        ("submit", "POST", "/v1/generations", ASKED),
    )
    print("| request | at once | a second | p50 | p99 |\n| --- | --- | --- | --- | --- |")
    for name, method, path, body in kinds:
        await measure(port, 1, 8, method, path, body)
        for at_once in AT_ONCE:
            print((await measure(port, seconds, at_once, method, path, body)).row(name, at_once), flush=True)


async def streams(port: int, pid: int, intake: Intake, count: int, seconds: float) -> None:
    """The table of event streams: one job each, all running."""
    claims: dict[str, Claim] = {}
    one = await Connection.open(port)
    for _ in range(count):
        await one.ask("POST", "/v1/generations", ASKED)
    while len(claims) < count:
        claims |= {claim.job.id: claim for claim in intake.claim([LARGE.name], 64)}
        await asyncio.sleep(0)
    before = _memory_kib(pid)
    opened = time.perf_counter()
    followers = [await _follow(port, job_id) for job_id in claims]
    opened = time.perf_counter() - opened
    after = _memory_kib(pid)
    cpu, since = _cpu_s(pid), time.perf_counter()
    await asyncio.sleep(seconds)
    load = (_cpu_s(pid) - cpu) / (time.perf_counter() - since)
    told = time.perf_counter()
    for chunk in _chunks(list(claims.values()), 100):
        intake.progress({claim: Progress(step=1, steps=claim.job.steps) for claim in chunk})
    await asyncio.gather(*(follower.until(b"event: progress") for follower in followers))
    told = time.perf_counter() - told
    for follower in followers:
        follower.writer.close()
    status, answer = await (await Connection.open(port)).ask("GET", "/healthz")
    assert status == 200, answer
    print("\n| event streams | opened in | memory each | core while idle | an event to each of them |")
    print("| --- | --- | --- | --- | --- |")
    print(
        f"| {count:,} | {opened:.2f} s | {(after - before) / count:.1f} KiB | {load:.1%} | {told:.2f} s |", flush=True
    )


async def _keep(intake: Intake) -> None:
    """Renews the lease of what was claimed, as a worker does."""
    while True:
        intake.renew([LARGE.name])
        await asyncio.sleep(1)


async def _follow(port: int, job_id: str) -> Connection:
    follower = await Connection.open(port)
    follower.writer.write(request("GET", f"/v1/generations/{job_id}/events"))
    await follower.until(b"event: running")
    return follower


def _chunks(claims: list[Claim], size: int) -> Iterator[list[Claim]]:
    for at in range(0, len(claims), size):
        yield claims[at : at + size]


def _memory_kib(pid: int) -> float:
    """Resident memory of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE_KIB


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def run(url: str, folder: Path, seconds: float, count: int) -> None:
    intake = Intake(redis.Redis.from_url(url), "bench")
    intake.publish([LARGE])
    with gateway(url, folder) as (port, pid):
        await answering(port)
        await requests(port, seconds)
    keeping = asyncio.create_task(_keep(intake))
    while waiting := intake.claim([LARGE.name], 64):  # what the submits left
        for claim in waiting:
            intake.commit(claim, "canceled", Result())
        await asyncio.sleep(0)
    with gateway(url, folder) as (port, pid):  # a fresh one, whose memory nothing else has grown
        await answering(port)
        await streams(port, pid, intake, count, seconds)
    keeping.cancel()
    intake.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    parser.add_argument("--streams", type=int, default=1000, help="open at once")
    options = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    os.sched_setaffinity(0, {1})
    print(f"Python {platform.python_version()}, {platform.machine()}, one core for the gateway\n")
    with tempfile.TemporaryDirectory() as folder:
        valkey = EmbeddedValkey(Path(folder) / "valkey", log=Path(folder) / "valkey.log")
        valkey.start()
        try:
            asyncio.run(run(valkey.url, Path(folder), options.seconds, options.streams))
        finally:
            valkey.stop()


if __name__ == "__main__":
    main()
