"""Real processes to hurt: a Valkey with an append-only file, supervised workers, a gateway. On loopback, our own."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import redis

from app.embedded import free_port
from tests.conftest import Valkey
from tests.processes import wait_until
from worker.contract.job import Job
from worker.contract.queue import JobQueue
from worker.contract.settings import ContractSettings

ROOT = Path(__file__).parents[2]
START_S = 90.0
DEADLINES = "darkroom:deadlines"


class Process:
    """One of our processes, with its log."""

    def __init__(self, command: Sequence[str], env: dict[str, str], log: Path) -> None:
        self.log = log
        with log.open("ab") as sink:
            self.popen = subprocess.Popen(command, cwd=ROOT, env=env, stdout=sink, stderr=sink)

    @property
    def pid(self) -> int:
        return self.popen.pid

    def send(self, signum: signal.Signals) -> None:
        self.popen.send_signal(signum)

    def end(self, timeout_s: float = 60.0) -> int:
        """SIGTERM; gives the exit status."""
        self.send(signal.SIGTERM)
        return self.popen.wait(timeout_s)

    def kill(self) -> None:
        self.popen.kill()
        self.popen.wait()

    def text(self) -> str:
        return self.log.read_text(errors="replace")


class Crew(Process):
    """A supervisor and its worker process."""

    def workers(self) -> dict[str, int]:
        """The process ids of its workers, by the name that Redis knows them by."""
        found = {}
        for pid in children(self.pid):
            if name := environment(pid).get("DARKROOM_WORKER_NAME"):
                found[name] = pid
        return found


class Site:
    """One Valkey, its crews and perhaps a gateway, in a folder of their own. Ends all that it started."""

    def __init__(
        self,
        folder: Path,
        models: str,  # as DARKROOM_MODELS
        *,
        crew: Sequence[str] = ("-m", "worker"),
        env: dict[str, str] | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.pictures, self._crew = folder, folder / "pictures", crew
        self.valkey = Valkey(folder, append_only=True)
        self.valkey.start()
        self.client = redis.Redis.from_url(self.valkey.url, socket_timeout=10)
        self.models = [entry.partition("=")[0] for entry in models.split(",")]
        self.crews: list[Crew] = []
        self._started = 0
        self.gateway: Process | None = None
        self.url = ""
        self._env = {
            **os.environ,
            "DARKROOM_REDIS_URL": self.valkey.url,
            "DARKROOM_STORE_DIR": str(self.pictures),
            "DARKROOM_MODELS": models,
            "DARKROOM_DEVICE": "cpu",
            "DARKROOM_METRICS_PORT": "0",
            "DARKROOM_QUEUE_BOUND": "20000",
            "OMP_NUM_THREADS": "1",  # several processes on few cores
            "PYTHONWARNINGS": "ignore",
            **(env or {}),
        }
        self.settings = ContractSettings.model_validate({"redis_url": self.valkey.url, "queue_bound": 20_000})

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in [*self.crews, *([self.gateway] if self.gateway else [])]:
            process.kill()  # its children end with it
        self.client.close()
        self.valkey.stop()

    def start_crew(self, **env: str) -> Crew:
        """Another supervisor with a worker."""
        self._started += 1
        log = self.folder / f"crew-{self._started}.log"
        self.crews.append(Crew([sys.executable, *self._crew], self._env | env, log))
        return self.crews[-1]

    def start_crews(self, count: int, **env: str) -> list[Crew]:
        """Some crews, once their workers serve."""
        crews = [self.start_crew(**env) for _ in range(count)]
        for crew in crews:
            self.wait_serving(crew)
        return crews

    def wait_serving(self, crew: Crew) -> str:
        """The name of the crew's worker, once it has a lease."""
        serving: list[str] = []

        def serves() -> bool:
            assert crew.popen.poll() is None, crew.text()
            serving[:] = [name for name in crew.workers() if self.client.zscore("darkroom:leases", name)]
            return bool(serving)

        wait_until(serves, START_S)
        return serving[0]

    def start_gateway(self) -> str:
        """A gateway, once it answers; gives its url."""
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "app.cli", "gateway"]
        self.gateway = Process(command, self._env | {"DARKROOM_PORT": str(port)}, self.folder / "gateway.log")
        wait_until(lambda: status_of(f"{self.url}/healthz") == 200, START_S)
        return self.url

    def submit(self, *jobs: Job) -> None:
        """Put jobs in their queues, in order."""

        async def submit(queue: JobQueue) -> None:
            for job in jobs:
                await queue.submit(job)

        self._ask(submit)

    def cancel(self, job: Job) -> None:
        """Ask for a job to be canceled."""
        self._ask(lambda queue: queue.cancel(job.id))

    def reap(self) -> None:
        """What a gateway does every two seconds."""
        self._ask(lambda queue: queue.reap())

    def status(self, job: Job) -> str:
        """RQ's word for where the job is."""
        return (self.client.hget(f"rq:job:{job.id}", "status") or b"").decode()

    def is_on_file(self) -> bool:
        """Whether all that Redis answered until now would outlive it: it writes its file up to two seconds late."""
        told = self.client.info("persistence")
        return told["aof_buffer_length"] == 0 and told["aof_pending_bio_fsync"] == 0

    def _ask(self, do: Callable[[JobQueue], Awaitable[Any]]) -> None:
        async def ask() -> None:
            queue = JobQueue.connect(self.settings)
            try:
                await do(queue)
            finally:
                await queue.close()

        asyncio.run(ask())

    def open_jobs(self) -> int:
        """Jobs that have not ended."""
        return int(self.client.zcard(DEADLINES))

    def held(self, worker: str) -> set[str]:
        """'id:execution' of what a worker holds."""
        return {pair.decode() for pair in self.client.smembers(f"darkroom:held:{worker}")}

    def drained(self, timeout_s: float) -> bool:
        """Whether every job ended in time."""
        return in_time(lambda: self.open_jobs() == 0, timeout_s)


def in_time(condition: Callable[[], bool], timeout_s: float, every_s: float = 0.05) -> bool:
    """Whether it happened in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(every_s)
    return True


def status_of(url: str) -> int:
    """The HTTP status there; 0 if nothing answers."""
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=5) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        error.close()
        return int(error.code)
    except OSError:
        return 0


def children(parent: int) -> list[int]:
    """Process ids of the children that run."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[1]) == parent and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def environment(pid: int) -> dict[str, str]:
    """The environment that a process was started with; empty if it is gone."""
    try:
        text = Path(f"/proc/{pid}/environ").read_bytes()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return {}
    pairs = (entry.partition(b"=") for entry in text.split(b"\0") if entry)
    return {name.decode(): value.decode(errors="replace") for name, _, value in pairs}
