"""The worker as a real process, on tiny random weights and a real Valkey."""

from __future__ import annotations

import asyncio
import io
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import redis
from PIL import Image

from tests.conftest import Valkey
from tests.processes import wait_until
from tests.worker.jobs import make_job
from worker.contract.errors import QueueUnavailable
from worker.contract.job import TERMINAL, Job, JobView
from worker.contract.queue import JobQueue
from worker.contract.settings import ContractSettings

pytestmark = pytest.mark.e2e

DEADLINE_S = 60


class Process:
    """A worker process, and the store that it writes to."""

    def __init__(self, redis_url: str, folder: Path, bundle: Path, metrics_port: int = 0, **env: str) -> None:
        self.metrics_port = metrics_port
        self.store = folder / "pictures"
        self.log = folder / "worker.log"
        self.env = os.environ | {
            "DARKROOM_REDIS_URL": redis_url,
            "DARKROOM_STORE_DIR": str(self.store),
            "DARKROOM_MODELS": f"tiny={bundle}",
            "DARKROOM_DEVICE": "cpu",
            "DARKROOM_METRICS_PORT": str(metrics_port),
            **env,
        }
        with self.log.open("w") as log:
            self.popen = subprocess.Popen([sys.executable, "-m", "worker"], env=self.env, stderr=log)

    def end(self) -> int:
        """Ask it to stop; gives the exit status."""
        self.popen.send_signal(signal.SIGTERM)
        return self.popen.wait(DEADLINE_S)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Valkey]:
    """A Valkey of this module's own, which a test may pause."""
    server = Valkey(tmp_path_factory.mktemp("valkey"))
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def worker(server: Valkey, tmp_path_factory: pytest.TempPathFactory, tiny_bundle: Path) -> Iterator[Process]:
    """One worker for all tests here but the last, which ends it."""
    process = Process(server.url, tmp_path_factory.mktemp("worker"), tiny_bundle, free_port())
    yield process
    process.popen.kill()
    process.popen.wait()


@pytest.fixture
async def queue(server: Valkey, worker: Process) -> AsyncIterator[JobQueue]:
    queue = JobQueue.connect(ContractSettings(redis_url=server.url))
    await until(queue.workers, lambda workers: workers == {"tiny": 1}, worker)
    yield queue
    await queue.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


async def until(ask: Callable[[], Awaitable[Any]], enough: Callable[[Any], bool], worker: Process) -> Any:
    """What `ask` answers, once it is enough."""
    end = time.monotonic() + DEADLINE_S
    while True:
        try:
            answer = await ask()
            if enough(answer):
                return answer
        except QueueUnavailable:
            pass
        assert worker.popen.poll() is None, worker.log.read_text()
        assert time.monotonic() < end, worker.log.read_text()
        await asyncio.sleep(0.02)


async def ended(queue: JobQueue, job: Job, worker: Process) -> JobView:
    return await until(lambda: queue.view(job.id), lambda view: view.status in TERMINAL, worker)


async def test_jobs_become_stored_pictures_of_the_size_asked_for(queue: JobQueue, worker: Process) -> None:
    jobs = [make_job(width=64 + 16 * n, steps=1 + n, num_images=1 + n % 2) for n in range(4)]
    for job in jobs:
        await queue.submit(job)
    for job in jobs:
        view = await ended(queue, job, worker)
        assert view.status == "succeeded"
        assert view.result is not None
        assert [picture.seed for picture in view.result.pictures] == job.seeds
        for picture in view.result.pictures:
            with Image.open(worker.store / picture.key) as image:
                assert image.size == (job.params.width, job.params.height)


async def test_lines_about_a_job_have_the_id_of_its_request(queue: JobQueue, worker: Process) -> None:
    job = make_job(request_id="r-1")
    await queue.submit(job)
    await ended(queue, job, worker)

    def lines() -> list[dict[str, Any]]:
        said = [json.loads(line) for line in worker.log.read_text().splitlines() if job.id in line]
        return [line for line in said if line.get("job") == job.id]

    wait_until(lambda: [line["event"] for line in lines()] == ["claimed", "ended"])
    assert [line["request_id"] for line in lines()] == ["r-1", "r-1"]


async def test_the_same_seed_gives_the_same_picture_alone_or_beside_its_siblings(
    queue: JobQueue, worker: Process
) -> None:
    alone, several = make_job(seed=8), make_job(seed=7, num_images=3)
    pixels = []
    for job, n in ((alone, 0), (several, 1)):
        await queue.submit(job)
        view = await ended(queue, job, worker)
        assert view.result is not None
        with Image.open(worker.store / view.result.pictures[n].key) as image:
            pixels.append(image.tobytes())
    worst = max(abs(a - b) for a, b in zip(*pixels, strict=True))
    assert worst <= 2  # levels of 255: another batch size rounds differently in the last bits


async def test_a_deterministic_job_gives_the_same_bytes_beside_others_and_every_result_its_fingerprint(
    queue: JobQueue, worker: Process
) -> None:
    jobs = [replace(make_job(seed=9), deterministic=True), *(make_job(seed=n) for n in range(3))]
    jobs.append(replace(make_job(seed=9), deterministic=True))
    for job in jobs:
        await queue.submit(job)
    results = [(await ended(queue, job, worker)).result for job in jobs]
    fingerprints = {result.fingerprint for result in results if result}
    assert len(fingerprints) == 1
    assert None not in fingerprints
    pixels = []
    for result in (results[0], results[-1]):
        assert result is not None
        with Image.open(worker.store / result.pictures[0].key) as image:
            pixels.append(image.tobytes())
    assert pixels[0] == pixels[1]


async def test_a_watched_job_shows_previews_and_one_that_nobody_watches_none(queue: JobQueue, worker: Process) -> None:
    watched, other = (make_job(steps=100, num_images=4, width=256, height=256) for _ in range(2))
    await queue.watch(watched.id)
    for job in (watched, other):
        await queue.submit(job)
    preview = await until(lambda: queue.preview(watched.id), lambda preview: preview is not None, worker)
    with Image.open(io.BytesIO(preview)) as image:
        assert image.format == "JPEG"
        assert max(image.size) <= 256
    assert await queue.preview(other.id) is None
    for job in (watched, other):
        await queue.cancel(job.id)
        await ended(queue, job, worker)


async def test_a_running_job_is_canceled_between_steps(queue: JobQueue, worker: Process) -> None:
    job = make_job(steps=100, num_images=4, width=256, height=256)
    await queue.submit(job)
    await until(lambda: queue.view(job.id), lambda view: view.status == "running", worker)
    await queue.cancel(job.id)
    assert (await ended(queue, job, worker)).status == "canceled"
    assert not list(worker.store.glob(f"{job.id}/**/*.png"))


async def test_a_job_that_cannot_be_done_fails_and_the_worker_lives_on(queue: JobQueue, worker: Process) -> None:
    bad, good = make_job(width=16 * 40, height=64), make_job()  # the tiny model's position table ends at 24 patches
    for job in (bad, good):
        await queue.submit(job)
    view = await ended(queue, bad, worker)
    assert view.status == "failed"
    assert view.result is not None
    assert view.result.failure is not None
    assert view.result.failure.code == "internal_error"
    assert (await ended(queue, good, worker)).status == "succeeded"


async def test_redis_may_be_silent_for_a_while(queue: JobQueue, worker: Process, server: Valkey) -> None:
    job = make_job(steps=30)
    await queue.submit(job)
    await until(lambda: queue.view(job.id), lambda view: view.status == "running", worker)
    server.pause()
    with pytest.raises(QueueUnavailable):
        await queue.view(job.id)
    server.resume()
    assert (await ended(queue, job, worker)).status == "succeeded"


async def test_a_redis_that_lost_everything_soon_knows_the_models_again(
    queue: JobQueue, worker: Process, server: Valkey
) -> None:
    with redis.Redis.from_url(server.url) as client:
        client.flushall()
    await until(queue.cards, lambda cards: "tiny" in cards, worker)


async def test_an_idle_worker_is_quiet(queue: JobQueue, worker: Process, server: Valkey) -> None:
    seconds = 4.5  # two heartbeats at least
    with redis.Redis.from_url(server.url) as client, client.monitor() as monitor:
        await asyncio.sleep(seconds)
        client.echo("enough")
        heard = list(itertools.takewhile(lambda said: "enough" not in said["command"], monitor.listen()))
    sent = [said["command"] for said in heard if said["client_type"] != "lua"]  # not what a script does in Redis
    assert 2 <= len(sent) < 5 * seconds


async def test_metrics_count_what_happened_and_name_no_job(queue: JobQueue, worker: Process) -> None:
    job = make_job()
    await queue.submit(job)
    await ended(queue, job, worker)
    _, text = get(worker.metrics_port, "/metrics")
    assert 'darkroom_models_loaded{model="tiny"} 1.0' in text
    assert 'darkroom_jobs_total{model="tiny",outcome="succeeded"}' in text
    assert 'stage="vae_decode"' in text
    assert "gen_" not in text


def get(port: int, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


async def test_worker_that_serves_is_ready_and_says_what_it_holds(queue: JobQueue, worker: Process) -> None:
    wait_until(lambda: get(worker.metrics_port, "/readyz")[0] == 200)
    jobs = [make_job(steps=100, num_images=4, width=256, height=256) for _ in range(2)]
    for job in jobs:
        await queue.submit(job)
    wait_until(lambda: '"jobs": 2' in get(worker.metrics_port, "/readyz")[1])
    for job in jobs:
        await queue.cancel(job.id)
        await ended(queue, job, worker)
    assert get(worker.metrics_port, "/healthz")[0] == 200


async def test_sigterm_finishes_what_runs_and_takes_no_more(queue: JobQueue, worker: Process) -> None:
    running = make_job(steps=40, num_images=4)
    await queue.submit(running)
    await until(lambda: queue.view(running.id), lambda view: view.status == "running", worker)
    assert worker.end() == 0
    assert (await queue.view(running.id)).status == "succeeded"
    waiting = make_job()
    await queue.submit(waiting)
    assert (await queue.view(waiting.id)).status == "queued"
    assert await queue.workers() == {}


def test_a_worker_that_cannot_load_its_model_says_why_in_words(
    redis_url: str, tmp_path: Path, tiny_bundle: Path
) -> None:
    process = Process(redis_url, tmp_path, tiny_bundle, DARKROOM_MODELS="tiny=/nowhere")
    assert process.popen.wait(DEADLINE_S) == 2
    log = process.log.read_text()
    assert "/nowhere" in log
    assert "Traceback" not in log


def test_a_port_that_is_taken_ends_the_worker_in_words(redis_url: str, tmp_path: Path, tiny_bundle: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        process = Process(redis_url, tmp_path, tiny_bundle, taken.getsockname()[1])
        assert process.popen.wait(DEADLINE_S) == 2
    log = process.log.read_text()
    assert "DARKROOM_METRICS_PORT" in log
    assert "Traceback" not in log


def test_a_worker_told_to_stop_while_it_loads_ends_at_once_and_well(
    redis_url: str, tmp_path: Path, tiny_bundle: Path
) -> None:
    models = ",".join(f"tiny{n}={tiny_bundle}" for n in range(20))
    port = free_port()
    process = Process(redis_url, tmp_path, tiny_bundle, port, DARKROOM_MODELS=models)
    wait_until(lambda: '"loading"' in process.log.read_text())
    assert get(port, "/healthz")[0] == 200
    status, told = get(port, "/readyz")
    assert (status, "process 0 loads its models" in told) == (503, True)
    assert process.end() == 0
    log = process.log.read_text()
    assert "told to stop before it was ready" in log
    assert "Traceback" not in log
