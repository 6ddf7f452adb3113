"""No worker until there is work, and none once it is done: what KEDA does by the gateways' metrics, done by hand."""

from __future__ import annotations

import math
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.conftest import Valkey
from tests.e2e.conftest import ROOT, darkroom_env
from tests.processes import wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(400)]

SECONDS_PER_WORKER = 60.0
COOLDOWN_S = 1.0
POLL_S = 0.25


class Cluster:
    """A gateway, and workers as many as were asked for; all on one Valkey and one folder."""

    def __init__(self, folder: Path, redis_url: str, bundle: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20)
        self._folder = folder
        self._env = darkroom_env() | {
            "DARKROOM_REDIS_URL": redis_url,
            "DARKROOM_STORE_DIR": str(folder / "pictures"),
            "DARKROOM_MODELS": f"tiny={bundle}",
            "DARKROOM_DEVICE": "cpu",
            "OMP_NUM_THREADS": "1",
            "DARKROOM_PORT": str(port),
        }
        self.workers: list[subprocess.Popen[bytes]] = []
        self._gateway = self._start("gateway")

    def announce(self) -> None:
        """What the chart's Job does."""
        assert self._start("worker", "--announce").wait(60) == 0, self.log()

    def scale(self, count: int) -> None:
        """Start workers, or tell the last ones to end and see them do so."""
        while len(self.workers) < count:
            self.workers.append(self._start("worker"))
        while len(self.workers) > count:
            leaving = self.workers.pop()
            leaving.send_signal(signal.SIGTERM)
            assert leaving.wait(60) == 0, self.log()

    def log(self) -> str:
        return (self._folder / "cluster.log").read_text()[-6000:]

    def is_up(self) -> bool:
        try:
            return self.http.get("/readyz").status_code == 200
        except httpx.TransportError:
            assert self._gateway.poll() is None, self.log()
            return False

    def metric(self, name: str) -> dict[str, float]:
        """The samples of a gauge by model, as Prometheus would scrape them."""
        families = text_string_to_metric_families(self.http.get("/metrics").text)
        samples = [sample for family in families for sample in family.samples if sample.name == name]
        return {sample.labels["model"]: sample.value for sample in samples}

    def knows_the_model(self) -> bool:
        return "tiny" in self.http.get("/v1/models").text

    def ask(self) -> httpx.Response:
        body = {"model": "tiny", "prompt": "a red cat", "steps": 2}
        return self.http.post("/v1/generations", json=body)

    def status(self, job: httpx.Response) -> str:
        return str(self.http.get(f"/v1/generations/{job.json()['id']}").json()["status"])

    def close(self) -> None:
        self.http.close()
        for process in (self._gateway, *self.workers):
            if process.poll() is None:
                process.kill()
            process.wait()

    def _start(self, *arguments: str) -> subprocess.Popen[bytes]:
        argv = [sys.executable, "-m", "app.cli", *arguments]
        with (self._folder / "cluster.log").open("ab") as log:
            return subprocess.Popen(argv, cwd=ROOT, env=self._env, stdout=log, stderr=subprocess.STDOUT)


class Autoscaler:
    """Seconds of work that one worker needs, divided; up at once, to zero after a calm. As the chart's ScaledObject."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._active_at = -math.inf

    def turn(self) -> None:
        seconds, workers = (
            self._cluster.metric("darkroom_queue_seconds"),
            self._cluster.metric("darkroom_model_workers"),
        )
        work = sum(needed * max(1.0, workers[model]) for model, needed in seconds.items())
        wanted = math.ceil(work / SECONDS_PER_WORKER)
        if wanted:
            self._active_at = time.monotonic()
        elif time.monotonic() - self._active_at < COOLDOWN_S:
            return
        self._cluster.scale(min(wanted, 1))

    def until(self, condition: Callable[[], bool], timeout_s: float = 150) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, self._cluster.log()
            self.turn()
            time.sleep(POLL_S)


@pytest.fixture
def cluster(tmp_path: Path, own_valkey: Valkey, tiny_bundle: Path) -> Iterator[Cluster]:
    started = Cluster(tmp_path, own_valkey.url, tiny_bundle)
    yield started
    started.close()


def do_a_job_from_zero(cluster: Cluster, autoscaler: Autoscaler) -> None:
    job = cluster.ask()
    assert job.status_code == 202, job.text
    assert cluster.metric("darkroom_model_workers") == {"tiny": 0}
    assert cluster.metric("darkroom_queue_seconds")["tiny"] > 0

    autoscaler.until(lambda: cluster.status(job) == "succeeded")
    autoscaler.until(lambda: cluster.metric("darkroom_queue_seconds") == {"tiny": 0})
    autoscaler.until(lambda: not cluster.workers)
    assert cluster.metric("darkroom_model_workers") == {"tiny": 0}
    picture = cluster.http.get(f"/v1/generations/{job.json()['id']}/images/0")
    assert picture.headers["content-type"] == "image/png"


def test_workers_come_with_the_work_and_go_after_it_again_and_again(cluster: Cluster) -> None:
    wait_until(cluster.is_up)
    autoscaler = Autoscaler(cluster)
    autoscaler.turn()
    assert cluster.workers == []
    assert cluster.ask().status_code == 404  # nobody ever said that there is such a model
    cluster.announce()
    wait_until(cluster.knows_the_model, 10)
    assert cluster.metric("darkroom_queue_seconds") == {"tiny": 0}

    for _ in range(2):
        do_a_job_from_zero(cluster, autoscaler)
