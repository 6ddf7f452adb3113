"""The container images, built from the Dockerfile and run together: `make test-deploy`."""

from __future__ import annotations

import os
import socket
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import yaml

from tests.conftest import Valkey
from tests.deploy.conftest import Figures
from tests.deploy.engine import ROOT, Engine
from tests.tiny_bundle import save_tiny_bundle

pytestmark = [pytest.mark.deploy, pytest.mark.timeout(1800)]

UID = "10001"
GATEWAY_MB = 250
ABSENT = """
import importlib.util as u, sys
names = 'torch transformers numpy pip setuptools ensurepip worker.engine model.mmdit'.split()
sys.exit(', '.join(n for n in names if u.find_spec(n.partition('.')[0]) and u.find_spec(n)) or None)
"""


class Container:
    """One container in the host's network, with the folder of pictures."""

    def __init__(self, engine: Engine, image: str, pictures: Path, redis_url: str, *options: str) -> None:
        self.engine = engine
        shared = ["-v", f"{pictures}:/var/lib/darkroom/pictures", "-e", f"DARKROOM_REDIS_URL={redis_url}"]
        mode = ["--read-only", "--tmpfs", "/tmp", "--network", "host"]
        self.id = engine("run", "-d", *mode, *shared, *options, image)

    def logs(self) -> str:
        return self.engine.logs(self.id)

    def is_running(self) -> bool:
        return bool(self.engine.inspect(self.id)["State"]["Running"])

    def stop(self) -> int:
        self.engine("stop", "-t", "30", self.id)
        return int(self.engine.inspect(self.id)["State"]["ExitCode"])


@pytest.fixture
def start(engine: Engine, tmp_path: Path, own_valkey: Valkey) -> Iterator[Callable[..., Container]]:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    pictures.chmod(0o777)
    started: list[Container] = []

    def start_container(image: str, *options: str) -> Container:
        started.append(Container(engine, image, pictures, own_valkey.url, *options))
        return started[-1]

    yield start_container
    engine.remove(*(container.id for container in started))


def tiny_model(folder: Path) -> list[str]:
    subprocess.run(["chmod", "-R", "a+rX", save_tiny_bundle(folder)], check=True)  # written for their owner alone
    return ["-v", f"{folder}:/models/tiny:ro", "-e", "DARKROOM_MODELS=tiny=/models/tiny"]


def make_key(engine: Engine, image: str, redis_url: str, command: list[str], *options: str) -> str:
    """What `darkroom keys add ...` prints: the key."""
    env = ["-e", f"DARKROOM_REDIS_URL={redis_url}"]
    return engine("run", "--rm", "--read-only", "--network", "host", *env, *options, image, *command)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_until(answers: Callable[[], bool], containers: list[Container], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline and all(container.is_running() for container in containers):
        if answers():
            return
        time.sleep(0.05)
    pytest.fail("\n".join(container.logs() for container in containers))


def is_alive(url: str) -> bool:
    try:
        return httpx.get(f"{url}/healthz", timeout=2).status_code == 200
    except httpx.TransportError:
        return False


def test_gateway_image_is_small_and_has_nothing_that_it_does_not_run(
    engine: Engine, gateway_image: str, figures: Figures
) -> None:
    size_mb = engine.inspect(gateway_image)["Size"] / 1e6
    figures.note("size of the gateway's image", f"{size_mb:.0f} MB")
    assert size_mb < GATEWAY_MB
    alone = ["run", "--rm", "--network", "none"]
    engine(*alone, "--entrypoint", "python", gateway_image, "-c", ABSENT)
    assert engine(*alone, gateway_image, "--version").startswith("darkroom ")


@pytest.mark.parametrize("image", ["gateway_image", "worker_image"])
def test_image_is_labelled_checked_for_health_and_not_of_root(
    image: str, engine: Engine, request: pytest.FixtureRequest
) -> None:
    name = request.getfixturevalue(image)
    facts = engine.inspect(name)
    config = facts["Config"]
    assert config["User"] == f"{UID}:{UID}"
    assert (facts.get("Healthcheck") or config["Healthcheck"])["Test"][0] == "CMD"  # podman says, docker says
    assert config["Labels"]["org.opencontainers.image.licenses"] == "Apache-2.0"
    alone = ["run", "--rm", "--network", "none"]
    assert engine(*alone, "--entrypoint", "id", name, "-u") == UID
    tools = "for tool in pip pip3 gcc cc make git curl; do ! command -v $tool || exit 1; done"
    engine(*alone, "--entrypoint", "sh", name, "-c", tools)


def test_gateway_starts_in_seconds_and_its_own_check_finds_it_healthy(
    engine: Engine, gateway_image: str, start: Callable[..., Container], figures: Figures
) -> None:
    port = free_port()
    started = time.monotonic()
    gateway = start(gateway_image, "-e", f"DARKROOM_PORT={port}")
    wait_until(lambda: is_alive(f"http://127.0.0.1:{port}"), [gateway], timeout_s=60)
    figures.note("from `run` until the gateway's /healthz answers 200", f"{time.monotonic() - started:.1f} s")
    assert engine.is_healthy(gateway.id)
    assert gateway.stop() == 0


def test_first_key_is_made_printed_and_kept_once(engine: Engine, gateway_image: str, own_valkey: Valkey) -> None:
    command = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]["first-key"]["command"]
    volume = f"darkroom-test-{uuid.uuid4().hex}"
    secrets = ["-v", f"{volume}:/var/lib/darkroom/secrets"]
    cat = ["--entrypoint", "cat", gateway_image, "/var/lib/darkroom/secrets/api-key"]
    try:
        key = make_key(engine, gateway_image, own_valkey.url, command, *secrets)
        assert key.startswith("dr_")
        assert make_key(engine, gateway_image, own_valkey.url, command, *secrets) == ""
        assert engine("run", "--rm", *secrets, *cat) == key
    finally:
        subprocess.run([engine.name, "volume", "rm", "-f", volume], capture_output=True, check=False)


def test_images_make_a_picture_together(
    engine: Engine,
    own_valkey: Valkey,
    gateway_image: str,
    worker_image: str,
    start: Callable[..., Container],
    tmp_path: Path,
) -> None:
    port, metrics_port = free_port(), free_port()
    gateway = start(gateway_image, "-e", f"DARKROOM_PORT={port}")
    worker = start(worker_image, "-e", f"DARKROOM_METRICS_PORT={metrics_port}", *tiny_model(tmp_path / "tiny"))
    url = f"http://127.0.0.1:{port}"
    wait_until(lambda: is_alive(f"http://127.0.0.1:{metrics_port}"), [worker], timeout_s=60)
    wait_until(lambda: is_alive(url) and bool(httpx.get(f"{url}/readyz").json()["workers"]), [gateway, worker], 180)
    assert engine.is_healthy(worker.id)
    assert httpx.get(f"{url}/v1/models").status_code == 401
    text = make_key(engine, gateway_image, own_valkey.url, ["keys", "add", "ci"])
    key = {"authorization": f"Bearer {text}"}
    body = {"model": "tiny", "prompt": "a red circle on a blue background", "seed": 7}
    done = httpx.post(f"{url}/v1/generations", json=body, headers=key | {"prefer": "wait=60"}, timeout=70).json()
    assert done["status"] == "succeeded", f"{done}\n{worker.logs()}"
    picture = httpx.get(done["images"][0]["url"])
    assert picture.headers["content-type"] == "image/png"
    assert picture.content.startswith(b"\x89PNG")
    if keep := os.environ.get("DARKROOM_KEEP_PICTURE"):
        Path(keep).write_bytes(picture.content)
    assert worker.stop() == 0
    assert gateway.stop() == 0
