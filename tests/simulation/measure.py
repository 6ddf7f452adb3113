"""What Redis' one core spends on each of the worker's and the gateway's requests: the real scripts on a real server.

Inside scripts by the server's own commandstats; beside them, reading and writing, by its processor time.
"""

from __future__ import annotations

import asyncio
import hashlib
import multiprocessing
import os
import selectors
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import redis

from tests.conftest import Valkey
from tests.processes import wait_until
from tests.tiny_bundle import save_tiny_bundle
from tests.worker.jobs import make_job
from worker.contract.events import CHANNEL, JobEvents
from worker.contract.job import Job, Picture, Progress, Result
from worker.contract.queue import LATE_AT_MOST, SUBMITTED, WORKER_SEEN_S, JobQueue
from worker.contract.settings import ContractSettings
from worker.contract.transitions import script
from worker.intake import Intake

MODELS = ["sd3.5-large", "sd3.5-large-turbo", "sd3.5-medium"]
HELD, CALLS = 4, 300
RESULT = Result(
    pictures=(Picture(key="j/e/0.png", seed=7, width=1024, height=1024, format="png", bytes=1_500_000),),
    timings={"text_encode": 0.05, "noise": 0.001, "denoise": 3.4, "vae_decode": 0.05},
    expires_at=2e9,
    fingerprint="0" * 64,
    gpu_seconds=3.5,
)
SCRIPTS = (
    "submit", "view", "claim", "commit", "progress", "renew", "reap", "load", "survey", "page", "cancel", "hand_back",
    "retire", "bury", "preview", "expire", "send", "sent", "forget",
)  # fmt: skip


class Bench:
    """A server with so many workers that hold three models, one of which is measured."""

    def __init__(self, url: str, workers: int) -> None:
        self.client = redis.Redis.from_url(url)
        self.client.flushall()
        self.settings = ContractSettings(redis_url=url, queue_bound=100_000)  # type: ignore[arg-type]
        self.crew = [Intake(redis.Redis.from_url(url), f"host-{n}-1-abcdef") for n in range(min(workers, 2))]
        names = [f"host-{n}-1-abcdef" for n in range(len(self.crew), workers)]
        others = Intake(self.client, "")
        for name in names:
            others._worker = name
            others.renew(MODELS, dict.fromkeys(MODELS, 12.5))
        self.loop = asyncio.new_event_loop()
        self.queue = JobQueue.connect(self.settings)

    def server_s(self) -> float:
        """Processor seconds of the thread that runs commands."""
        info = self.client.info("cpu")
        return float(info["used_cpu_user_main_thread"]) + float(info["used_cpu_sys_main_thread"])

    def server_us(self, do: Callable[[], object], calls: int = CALLS) -> float:
        """Microseconds of the server's processor for each call, with reading and writing."""
        do()
        before = self.server_s()
        for _ in range(calls):
            do()
        return 1e6 * (self.server_s() - before) / calls

    def cost(self, do: Callable[[], object], calls: int = CALLS) -> float:
        """Microseconds inside the script for each call."""
        do()
        self.client.config_resetstat()
        for _ in range(calls):
            do()
        return float(self.client.info("commandstats")["cmdstat_evalsha"]["usec_per_call"])

    def wait_for(self, work: Awaitable[object]) -> object:
        return self.loop.run_until_complete(work)  # type: ignore[arg-type]

    def submit(self, jobs: list[Job]) -> None:
        for job in jobs:
            self.wait_for(self.queue.submit(job))

    def close(self) -> None:
        self.wait_for(self.queue.close())
        for intake in self.crew:
            intake.close()
        self.client.close()


def jobs(count: int) -> list[Job]:
    """As many as asked, of all models and ten owners."""
    return [
        replace(make_job(model=MODELS[n % 3], steps=40, seed=n, deadline_s=36_000), owner=f"key-{n % 10}")
        for n in range(count)
    ]


def script_costs(url: str, workers: int) -> dict[str, float]:
    """Microseconds of the server by request, with so many workers alive."""
    bench = Bench(url, workers)
    intake = bench.crew[0]
    found = {"claim, nothing there": bench.cost(lambda: intake.claim(MODELS, 1))}
    asked = iter(jobs(CALLS + 1))
    found["submit"] = bench.cost(lambda: bench.wait_for(bench.queue.submit(next(asked))))
    claims = []
    found["claim, a job"] = bench.cost(lambda: claims.extend(intake.claim(MODELS, 1)))
    ids = iter([claim.job.id for claim in claims])
    found["view"] = bench.cost(lambda: bench.wait_for(bench.queue.view(next(ids))))
    ending = iter(claims[HELD:])
    found["commit"] = bench.cost(lambda: intake.commit(next(ending), "succeeded", RESULT), CALLS - HELD)
    steps = iter(range(10_000))

    def progress(count: int) -> object:
        n = next(steps)
        return intake.progress({claim: Progress(step=n, steps=10_000) for claim in claims[:count]})

    found["progress, a job's step"] = bench.cost(lambda: progress(1))
    found["progress, four jobs' steps"] = bench.cost(lambda: progress(HELD))
    speeds = dict.fromkeys(MODELS, 12.5)
    found["renew"] = bench.cost(lambda: intake.renew(MODELS, speeds))
    found["reap"] = bench.cost(intake.reap)
    found["load (a scrape)"] = bench.cost(lambda: bench.wait_for(bench.queue.survey()), 50)
    bench.close()
    return found


@contextmanager
def listening(port: int, channel: str, count: int) -> Iterator[None]:
    """So many connections that hear a channel, in a process of their own."""
    ready = multiprocessing.get_context("spawn").Event()
    process = multiprocessing.get_context("spawn").Process(target=_listen, args=(port, channel, count, ready))
    process.start()
    assert ready.wait(60), "the listeners did not start"
    try:
        yield
    finally:
        process.terminate()
        process.join()


def _listen(port: int, channel: str, count: int, ready: object) -> None:
    selector = selectors.DefaultSelector()
    for _ in range(count):
        one = socket.create_connection(("127.0.0.1", port))
        one.sendall(f"SUBSCRIBE {channel}\r\n".encode())
        one.recv(4096)
        selector.register(one, selectors.EVENT_READ)
    ready.set()  # type: ignore[attr-defined]
    while True:
        for key, _mask in selector.select():
            key.fileobj.recv(65536)  # type: ignore[union-attr]


def told_us(url: str, port: int, count: int = 500) -> float:
    """Microseconds of the server for each worker that is told of a submitted job."""
    bench = Bench(url, 1)
    alone = bench.server_us(lambda: bench.client.publish(SUBMITTED, "sd3.5-medium"), 200)
    with listening(port, SUBMITTED, count):
        many = bench.server_us(lambda: bench.client.publish(SUBMITTED, "sd3.5-medium"), 200)
    bench.close()
    return (many - alone) / count


def heard_us(url: str, count: int = 3000) -> float:
    """Microseconds of a gateway's processor for each event of a job that nobody follows there."""
    return asyncio.run(_heard_us(url, count))


async def _heard_us(url: str, count: int) -> float:
    heard, last = asyncio.Event(), "gen_last"
    async with redis.asyncio.Redis.from_url(url) as link:
        events = JobEvents(link)
        with events.watch(last) as heard:
            with redis.Redis.from_url(url) as client:
                while not client.pubsub_numsub(CHANNEL)[0][1]:
                    await asyncio.sleep(0.01)
                heard.clear()
                pipe = client.pipeline(transaction=False)
                for n in range(count):
                    pipe.publish(CHANNEL, f'gen_{n:031d} 1700000000000-0 progress {{"step":{n % 40},"steps":40}}')
                pipe.publish(CHANNEL, f"{last} 1700000000000-0 succeeded {{}}")
                pipe.execute()
            started = time.process_time()
            await heard.wait()
            spent = time.process_time() - started
        await events.close()
    return 1e6 * spent / count


def ceilings(url: str, seconds: float = 2.0, clients: int = 3) -> dict[str, float]:
    """Requests a second of a server that is kept busy by several clients, 50 requests a round trip."""
    bench = Bench(url, 1)
    bench.submit(jobs(HELD))
    claims = bench.crew[0].claim(MODELS, HELD)
    held = [claim.key for claim in claims]
    requests: dict[str, tuple[str, list[object]]] = {
        "claim, nothing there": ("claim", ["w", 2, 1, 0, 0, 3, *MODELS, "e"]),
        "renew, one worker": ("renew", ["host-0-1-abcdef", 3, *[x for m in MODELS for x in (m, 12.5)], *held]),
        "reap": ("reap", [LATE_AT_MOST]),
        "load": ("load", [WORKER_SEEN_S]),
    }
    found = {"ping, one a round trip": 1e6 / bench.server_us(bench.client.ping, 1000)}
    pings = bench.client.pipeline(transaction=False)
    for _ in range(50):
        pings.ping()
    found["ping, 50 a round trip"] = 50e6 / bench.server_us(
        lambda: pings.execute() and [pings.ping() for _ in range(50)], 100
    )
    for name, (what, args) in requests.items():
        before = bench.server_s()
        with multiprocessing.get_context("spawn").Pool(clients) as pool:
            calls = sum(pool.starmap(_hammer, [(url, what, args, seconds)] * clients))
        found[name] = calls / (bench.server_s() - before)
    bench.close()
    return found


def _hammer(url: str, name: str, args: list[object], seconds: float) -> int:
    with redis.Redis.from_url(url) as client:
        sha, calls, end = client.script_load(script(name)), 0, time.monotonic() + seconds
        while time.monotonic() < end:
            pipe = client.pipeline(transaction=False)
            for _ in range(50):
                pipe.evalsha(sha, 0, *args)  # type: ignore[arg-type]
            pipe.execute()
            calls += 50
    return calls


class Watching:
    """Counts what clients ask of a server, by the name of the script."""

    def __init__(self, url: str) -> None:
        self._names = {hashlib.sha1(script(name).encode()).hexdigest(): name for name in SCRIPTS}
        self._client = redis.Redis.from_url(url, socket_timeout=30)
        self.counts: Counter[str] = Counter()

    def listen(self, seconds: float) -> Counter[str]:
        """For so long."""
        found: Counter[str] = Counter()
        with self._client.monitor() as monitor:
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                said = monitor.next_command()  # a worker says something every second
                if said["client_type"] == "lua":
                    found["(inside scripts)"] += 1
                    continue
                words = said["command"].split()
                found[self._names.get(words[1], words[0]) if words[0] == "EVALSHA" else words[0]] += 1
        return found


def life(url: str, folder: Path, seconds: float = 6.0) -> dict[str, dict[str, float]]:
    """What one real worker process asks: a second when idle, a second when busy; and a job over its life."""
    with redis.Redis.from_url(url) as client:
        client.flushall()
    log = (folder / "worker.log").open("w")
    env = os.environ | {
        "DARKROOM_REDIS_URL": url,
        "DARKROOM_STORE_DIR": str(folder / "pictures"),
        "DARKROOM_MODELS": f"tiny={save_tiny_bundle(folder / 'tiny')}",
        "DARKROOM_DEVICE": "cpu",
        "OMP_NUM_THREADS": "1",
    }
    process = subprocess.Popen([sys.executable, "-W", "ignore", "-m", "worker"], env=env, stdout=log, stderr=log)
    bench = Bench(url, 0)
    watching = Watching(url)
    try:
        wait_until(lambda: bool(bench.client.exists("darkroom:cards")), 120)
        bench.submit([make_job(steps=4)])
        wait_until(lambda: not bench.client.hlen("darkroom:open"))
        idle = watching.listen(seconds)
        bench.submit([make_job(steps=1000, seed=n) for n in range(4)])
        busy = watching.listen(seconds)
        for key in map(bytes, bench.client.hkeys("darkroom:open")):  # type: ignore[arg-type]
            bench.wait_for(bench.queue.cancel(key.decode()))
        wait_until(lambda: not bench.client.hlen("darkroom:open"))
        short = [make_job(steps=8, seed=n) for n in range(20)]
        before = bench.client.info("commandstats")
        counted: list[Counter[str]] = []
        listener = threading.Thread(target=lambda: counted.append(watching.listen(8.0)))
        listener.start()
        time.sleep(0.2)
        bench.submit(short)
        wait_until(lambda: not bench.client.hlen("darkroom:open"))
        after = bench.client.info("commandstats")
        listener.join()
    finally:
        process.terminate()
        process.wait(30)
        log.close()
        bench.close()
    steady = {"renew", "reap", "progress", "HSET"}
    inner = sum(calls["calls"] - before.get(name, {"calls": 0})["calls"] for name, calls in after.items())
    a_job = {name: calls / len(short) for name, calls in counted[0].items() if name not in steady}
    return {
        "an idle worker, a second": {name: calls / seconds for name, calls in idle.items()},
        "a worker with four jobs, a second": {name: calls / seconds for name, calls in busy.items()},
        "a job": a_job | {"commandstats, all": inner / len(short)},
    }


def main() -> None:
    """Measures and prints; the constants in redis_load.py were written down from this."""
    with tempfile.TemporaryDirectory() as folder:
        server = Valkey(Path(folder))
        server.start()
        try:
            _print(server.url, server.port, Path(folder))
        finally:
            server.stop()


def _print(url: str, port: int, folder: Path) -> None:
    counts = (1, 100, 1000)
    columns = [script_costs(url, count) for count in counts]
    print("| microseconds inside the script | " + " | ".join(f"{n} workers" for n in counts) + " |")
    print("| --- " * (1 + len(counts)) + "|")
    for name in columns[0]:
        print(f"| {name} | " + " | ".join(f"{column[name]:.0f}" for column in columns) + " |", flush=True)
    print(f"\ntold of a submitted job: {told_us(url, port):.2f} us for each worker that listens")
    print(f"an event nobody follows: {heard_us(url):.0f} us of a gateway's processor")
    print("\na second of the server's core, pipelined by three clients:")
    for name, rate in ceilings(url).items():
        print(f"  {name}: {rate:,.0f}", flush=True)
    for what, asked in life(url, folder).items():
        told = ", ".join(f"{name} {count:.2f}" for name, count in sorted(asked.items(), key=lambda one: -one[1]))
        print(f"{what}: {told}")


if __name__ == "__main__":
    main()
