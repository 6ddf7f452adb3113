"""docker-compose.yml, started for real: `make test-deploy`."""

from __future__ import annotations

import io
import json
import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from PIL import Image

from tests.deploy.compose import Compose
from tests.deploy.conftest import Figures
from tests.deploy.engine import ROOT, Engine, run

pytestmark = [pytest.mark.deploy, pytest.mark.timeout(1800)]

MAIN, S3, GPU = "docker-compose.yml", "deploy/compose.s3.yml", "deploy/compose.gpu.yml"
JOBS = 100
KEY = re.compile(r"dr_[0-9a-f]{12}_[A-Za-z0-9_-]{43}")
STARTED_S, LOADED_S, DONE_S = 90, 300, 900
OUTAGE_S = 10

PRODUCTION = re.findall(r"^```shell\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)[0]
"""The page's commands, run word for word: but for the first, which starts what the test has started."""

RUNBOOK = (ROOT / "deploy" / "RUNBOOK.md").read_text()
RUNBOOK_OF_COMPOSE = {
    "shell": "\n".join(re.findall(r"^(?:dr|rcli)\(\) \{ docker compose .*", RUNBOOK, re.MULTILINE)),
    "backup": "".join(re.findall(r"^rcli --rdb .*# compose$", RUNBOOK, re.MULTILINE)),
    # all but the last line, which starts everything again
    "restore": "\n".join(
        re.findall(r"^restore='.*'$|^docker compose (?:stop|exec) .*(?:worker|NOSAVE)$", RUNBOOK, re.MULTILINE)
    ),
}

StartStack = Callable[..., "Stack"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Stack:
    """A project that runs, and a client of it."""

    def __init__(self, compose: Compose, port: int) -> None:
        self.compose, self.url = compose, f"http://127.0.0.1:{port}"
        compose.wait_until(self.is_alive, "the gateway answers", STARTED_S)
        compose.wait_until(lambda: bool(self.printed_keys()), "the first key is printed", STARTED_S)
        (key,) = self.printed_keys()
        self.client = httpx.Client(
            base_url=self.url, headers={"authorization": f"Bearer {key}"}, timeout=30, trust_env=False
        )

    def printed_keys(self) -> list[str]:
        return KEY.findall(self.compose.logs("first-key"))

    def is_alive(self) -> bool:
        try:
            return httpx.get(f"{self.url}/healthz", timeout=2, trust_env=False).status_code == 200
        except httpx.TransportError:
            return False

    def has_model(self) -> bool:
        try:
            return bool(self.client.get("/readyz").json()["workers"])
        except (httpx.TransportError, ValueError, KeyError):
            return False

    def wait_for_model(self) -> None:
        self.compose.wait_until(self.has_model, "a worker has loaded the demo", LOADED_S)

    def submit(self, n: int) -> str:
        body = {"model": "demo", "prompt": f"{n} red circles", "seed": n, "steps": 1, "guidance_scale": 1}
        answer = self.client.post("/v1/generations", json=body, headers={"idempotency-key": f"job-{n}"})
        assert answer.status_code == 202, answer.text
        job_id: str = answer.json()["id"]
        return job_id

    def generations(self) -> list[dict[str, Any]]:
        """All of the key's, as its pages list them."""
        found: list[dict[str, Any]] = []
        cursor: str | None = None
        while True:
            page = self.client.get("/v1/generations", params={"limit": 100} | ({"cursor": cursor} if cursor else {}))
            page.raise_for_status()
            found += page.json()["generations"]
            cursor = page.json()["next"]
            if not cursor:
                return found

    def ended(self) -> int:
        try:
            return sum(job["status"] not in ("queued", "running") for job in self.generations())
        except httpx.HTTPError:  # Redis or the gateway is away
            return 0

    def wait_for(self, ended: int, timeout_s: float = DONE_S) -> None:
        self.compose.wait_until(lambda: self.ended() >= ended, f"{ended} jobs ended", timeout_s)

    def used(self) -> list[dict[str, Any]]:
        """What Redis counted for the key: a job is counted by its one commit."""
        told = self.compose.execute("gateway", "darkroom", "keys", "usage", "--json")
        rows: list[dict[str, Any]] = json.loads(told)
        return rows


@pytest.fixture
def start_stack(
    engine: Engine,
    compose_command: list[str],
    gateway_image: str,
    worker_image: str,
    stand_ins: dict[str, str],
    tmp_path: Path,
) -> Iterator[StartStack]:
    started: list[Compose] = []
    stacks: list[Stack] = []

    def start(*files: str) -> Stack:
        compose = Compose(engine, compose_command, tmp_path, MAIN, *files)
        started.append(compose)
        port = free_port()
        own = {"DARKROOM_VERSION": "test", "DARKROOM_PORT": str(port), "PROMETHEUS_PORT": str(free_port())}
        timers = engine.name != "podman" or Path("/run/systemd/system").exists()
        compose.use(own, stand_ins, timers=timers)
        compose.up("redis", *(["s3"] if S3 in files else []))
        compose.wait_until(lambda: compose.is_healthy("redis"), "Redis is healthy", STARTED_S)
        compose.up("gateway", "worker", "webhooks", "first-key")
        stacks.append(Stack(compose, port))
        return stacks[-1]

    yield start
    for stack in stacks:
        stack.client.close()
    for compose in started:
        compose.down()


def size_of(url: str) -> tuple[int, int]:
    picture = httpx.get(url, timeout=30, trust_env=False)
    picture.raise_for_status()
    with Image.open(io.BytesIO(picture.content)) as image:
        image.load()
        assert image.format == "PNG"
        return image.size


def test_compose_starts_all_services_without_root_writable_roots_or_visible_secrets(start_stack: StartStack) -> None:
    stack = start_stack()
    compose = stack.compose
    stack.wait_for_model()
    for service in ("redis", "gateway", "webhooks", "worker"):
        compose.wait_until(partial(compose.is_healthy, service), f"{service} is healthy", STARTED_S)
        facts = compose.engine.inspect(compose.container(service))
        assert facts["HostConfig"]["ReadonlyRootfs"], service
        assert facts["HostConfig"]["CapDrop"], service
        assert facts["HostConfig"]["Memory"] > 0, service
        assert compose.execute(service, "id", "-u") != "0"
        assert compose.execute(service, "sh", "-c", "touch /var/here 2>/dev/null || echo refused") == "refused"
    password = compose.execute("gateway", "cat", "/var/lib/darkroom/credentials/redis-password")
    assert len(password) == 48
    assert password not in json.dumps([compose.engine.inspect(compose.container(name)) for name in compose.started()])


def test_page_on_production_leads_from_a_clone_to_a_picture(start_stack: StartStack, tmp_path: Path) -> None:
    start, _, rest = PRODUCTION.partition("\n")
    assert start.startswith("docker compose up --build --wait ")
    stack = start_stack()
    stack.wait_for_model()
    script = rest.replace("http://127.0.0.1:8000", stack.url)
    env = stack.compose.shim(tmp_path / "bin")
    told = run("bash", "-euo", "pipefail", "-c", script, cwd=tmp_path, env=env, timeout_s=300)
    assert "demo" in told  # of which the doctor says that it draws
    (image,) = json.loads((tmp_path / "generation.json").read_text())["images"]
    assert size_of(image["url"]) == (512, 512)


def test_first_key_is_printed_once_however_often_compose_starts(start_stack: StartStack) -> None:
    stack = start_stack()
    compose = stack.compose
    compose.start("first-key")
    compose.wait_until(lambda: "there is a key already" in compose.logs("first-key"), "it says so", STARTED_S)
    assert len(stack.printed_keys()) == 1
    assert stack.client.get("/v1/models").status_code == 200


def test_hundred_jobs_survive_a_killed_worker_a_killed_redis_and_a_store_outage(
    start_stack: StartStack, figures: Figures
) -> None:
    stack = start_stack(S3)
    compose = stack.compose
    stack.wait_for_model()
    started = time.monotonic()
    submitted = [stack.submit(n) for n in range(JOBS)]
    stack.wait_for(8)
    compose.kill("worker")
    compose.start("worker")
    stack.wait_for(30)
    compose.kill("redis")
    compose.start("redis")
    stack.wait_for(55)
    compose.stop("s3")
    assert not compose.state("s3")["Running"]
    time.sleep(OUTAGE_S)  # the outage itself: nothing to wait for
    compose.start("s3")
    stack.wait_for(JOBS)
    seconds = time.monotonic() - started
    jobs = {job["id"]: job for job in stack.generations()}
    wrong = {name: job for name, job in jobs.items() if job["status"] != "succeeded"}
    assert not wrong, f"{wrong}\n{compose.tell()}"
    assert sorted(jobs) == sorted(submitted)
    assert {len(job["images"]) for job in jobs.values()} == {1}
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(size_of, (job["images"][0]["url"] for job in jobs.values()))) == {(512, 512)}
    used = stack.used()
    assert (sum(row["jobs"] for row in used), sum(row["pictures"] for row in used)) == (JOBS, JOBS)
    figures.note(
        f"{JOBS} jobs through compose, worker and Redis killed and S3 stopped for {OUTAGE_S} s meanwhile",
        f"{len(jobs)} results, one each, after {seconds:.0f} s",
    )


def test_backup_and_restore_of_the_runbook_bring_back_what_there_was(start_stack: StartStack, tmp_path: Path) -> None:
    stack = start_stack()
    compose = stack.compose
    shell = RUNBOOK_OF_COMPOSE["shell"]
    env = compose.shim(tmp_path / "bin")

    def do(script: str) -> str:
        return run("bash", "-uo", "pipefail", "-c", f"{shell}\n{script}", cwd=tmp_path, env=env, timeout_s=300)

    do(RUNBOOK_OF_COMPOSE["backup"])
    do("dr keys add later")
    # The last command ends the container in which it runs: what it exits with is chance
    do(f"{{ {RUNBOOK_OF_COMPOSE['restore']}\n}} || true")

    def is_back() -> bool:
        compose.start("redis")  # unless the engine has done so
        return compose.is_healthy("redis")

    compose.wait_until(is_back, "Redis is back", STARTED_S)
    compose.start("gateway")
    compose.wait_until(stack.is_alive, "the gateway answers", STARTED_S)
    assert [key["name"] for key in json.loads(do("dr keys list --json"))] == ["first"]


def test_prometheus_scrapes_gateway_worker_and_sender(start_stack: StartStack) -> None:
    compose = start_stack().compose
    compose.up("prometheus", profiles=["observability"])
    url = f"http://127.0.0.1:{compose.port('prometheus')}/api/v1/query"

    def scraped() -> set[str]:
        try:
            answer = httpx.get(url, params={"query": "up == 1"}, timeout=5, trust_env=False).json()
            return {series["metric"]["job"] for series in answer["data"]["result"]}
        except (httpx.TransportError, ValueError, KeyError):
            return set()

    expected = {"darkroom-gateway", "darkroom-worker", "darkroom-webhooks"}
    compose.wait_until(lambda: scraped() >= expected, "all three are scraped", STARTED_S)


@pytest.mark.parametrize("files", [(), (S3,), (GPU,), (GPU, S3)], ids=["cpu", "s3", "gpu", "gpu-s3"])
def test_compose_takes_its_files_for_good(files: tuple[str, ...], compose_command: list[str]) -> None:
    named = [word for file in (MAIN, *files) for word in ("-f", str(ROOT / file))]
    env = dict(os.environ) | {"DARKROOM_MODELS_DIR": "/srv/models", "DARKROOM_MODELS": "tiny=/models/tiny"}
    told = yaml.safe_load(run(*compose_command, *named, "--profile", "observability", "config", env=env))
    assert {"redis", "gateway", "webhooks", "worker", "prometheus", "grafana"} <= set(told["services"])
