"""The container images, built from the Dockerfile and run together: `make test-deploy`.

DARKROOM_ENGINE names the engine (docker or podman; the first one that answers otherwise). DARKROOM_BUILD_OPTIONS are
further options of its build command, for machines that reach packages in a way of their own.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
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
from tests.tiny_bundle import save_tiny_bundle

pytestmark = [pytest.mark.deploy, pytest.mark.timeout(1800)]

ROOT = Path(__file__).parents[2]
NO_TORCH = "import importlib.util as u, sys; sys.exit(any(u.find_spec(n) for n in ('torch', 'transformers', 'numpy')))"
UID = "10001"


def run(*argv: object, timeout_s: float = 120) -> str:
    done = subprocess.run([str(word) for word in argv], capture_output=True, text=True, timeout=timeout_s, check=False)
    assert done.returncode == 0, f"{argv}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout.strip()


@pytest.fixture(scope="session")
def engine() -> str:
    for name in filter(None, (os.environ.get("DARKROOM_ENGINE"), "docker", "podman")):
        if shutil.which(name) and subprocess.run([name, "info"], capture_output=True, check=False).returncode == 0:
            return name
    pytest.fail("neither docker nor podman answers on this machine")


@pytest.fixture(scope="session")
def build(engine: str) -> Callable[[str], str]:
    def build_image(target: str) -> str:
        image = f"darkroom-{target}"
        options = shlex.split(os.environ.get("DARKROOM_BUILD_OPTIONS", ""))
        run(engine, "build", "--target", target, "-t", image, *options, ROOT, timeout_s=1500)
        return image

    return build_image


@pytest.fixture(scope="session")
def gateway_image(build: Callable[[str], str]) -> str:
    return build("gateway")


@pytest.fixture(scope="session")
def worker_image(build: Callable[[str], str]) -> str:
    return build("worker-cpu")


class Container:
    """One container in the host's network, with the folder of pictures."""

    def __init__(self, engine: str, image: str, pictures: Path, redis_url: str, *options: str) -> None:
        self._engine = engine
        shared = ["-v", f"{pictures}:/var/lib/darkroom/pictures", "-e", f"DARKROOM_REDIS_URL={redis_url}"]
        self.id = run(
            engine,
            "run",
            "-d",
            "--read-only",
            "--tmpfs",
            "/tmp",
            "--network",
            "host",
            *shared,
            *options,
            image,
        )

    def inspect(self, path: str) -> str:
        return run(self._engine, "inspect", "--format", "{{" + path + "}}", self.id)

    def logs(self) -> str:
        done = subprocess.run([self._engine, "logs", self.id], capture_output=True, text=True, check=False)
        return done.stdout + done.stderr

    def stop(self) -> int:
        run(self._engine, "stop", "-t", "30", self.id)
        return int(self.inspect(".State.ExitCode"))

    def remove(self) -> None:
        subprocess.run([self._engine, "rm", "-f", self.id], capture_output=True, check=False)


@pytest.fixture
def start(engine: str, tmp_path: Path, own_valkey: Valkey) -> Iterator[Callable[..., Container]]:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    pictures.chmod(0o777)
    started: list[Container] = []

    def start_container(image: str, *options: str) -> Container:
        started.append(Container(engine, image, pictures, own_valkey.url, *options))
        return started[-1]

    yield start_container
    for container in started:
        container.remove()


def tiny_model(folder: Path) -> list[str]:
    run("chmod", "-R", "a+rX", save_tiny_bundle(folder))  # weights are written for their owner alone
    return ["-v", f"{folder}:/models/tiny:ro", "-e", "DARKROOM_MODELS=tiny=/models/tiny"]


def make_key(engine: str, image: str, redis_url: str, command: list[str], *options: str) -> str:
    """What `darkroom keys add ...` prints: the key."""
    env = ["-e", f"DARKROOM_REDIS_URL={redis_url}"]
    return run(engine, "run", "--rm", "--read-only", "--network", "host", *env, *options, image, *command)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_for_model(url: str, gateway: Container, worker: Container, timeout_s: float = 180) -> str:
    """The name of a model that a worker holds; asked without a key, as a probe does."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline and worker.inspect(".State.Running") == "true":
        try:
            for model in httpx.get(f"{url}/readyz", timeout=5).json()["workers"]:
                return str(model)
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    pytest.fail(f"no model was loaded:\n{worker.logs()}\n{gateway.logs()}")


def test_gateway_image_has_no_torch_and_no_root(engine: str, gateway_image: str) -> None:
    run(engine, "run", "--rm", "--network", "none", "--entrypoint", "python", gateway_image, "-c", NO_TORCH)
    assert run(engine, "run", "--rm", "--network", "none", "--entrypoint", "id", gateway_image, "-u") == UID
    assert run(engine, "run", "--rm", "--network", "none", gateway_image, "--version").startswith("darkroom ")


def test_gateway_image_is_checked_for_health(engine: str, gateway_image: str, start: Callable[..., Container]) -> None:
    port = free_port()
    gateway = start(gateway_image, "-e", f"DARKROOM_PORT={port}")
    wait_until_alive(f"http://127.0.0.1:{port}", gateway)
    check = json.loads(gateway.inspect("json .Config.Healthcheck.Test"))
    assert check[0] == "CMD"
    run(engine, "exec", gateway.id, *check[1:])
    assert gateway.stop() == 0


def test_first_key_is_made_printed_and_kept_once(engine: str, gateway_image: str, own_valkey: Valkey) -> None:
    command = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]["first-key"]["command"]
    volume = f"darkroom-test-{uuid.uuid4().hex}"
    secrets = ["-v", f"{volume}:/var/lib/darkroom/secrets"]
    cat = ["--entrypoint", "cat", gateway_image, "/var/lib/darkroom/secrets/api-key"]
    try:
        key = make_key(engine, gateway_image, own_valkey.url, command, *secrets)
        assert key.startswith("dr_")
        assert make_key(engine, gateway_image, own_valkey.url, command, *secrets) == ""
        assert run(engine, "run", "--rm", *secrets, *cat) == key
    finally:
        subprocess.run([engine, "volume", "rm", "-f", volume], capture_output=True, check=False)


def test_images_make_a_picture_together(
    engine: str,
    own_valkey: Valkey,
    gateway_image: str,
    worker_image: str,
    start: Callable[..., Container],
    tmp_path: Path,
) -> None:
    port = free_port()
    demo = (ROOT / "model" / "bundles" / "demo" / "model_index.json").exists()
    models = [] if demo else tiny_model(tmp_path / "tiny")
    gateway = start(gateway_image, "-e", f"DARKROOM_PORT={port}")
    worker = start(worker_image, "-e", f"DARKROOM_METRICS_PORT={free_port()}", *models)
    url = f"http://127.0.0.1:{port}"
    name = wait_for_model(url, gateway, worker)
    assert httpx.get(f"{url}/v1/models").status_code == 401
    text = make_key(engine, gateway_image, own_valkey.url, ["keys", "add", "ci"])
    key = {"authorization": f"Bearer {text}"}
    body = {"model": name, "prompt": "a red circle on a blue background", "seed": 7}
    done = httpx.post(f"{url}/v1/generations", json=body, headers=key | {"prefer": "wait=60"}, timeout=70).json()
    assert done["status"] == "succeeded", f"{done}\n{worker.logs()}"
    picture = httpx.get(done["images"][0]["url"])
    assert picture.headers["content-type"] == "image/png"
    assert picture.content.startswith(b"\x89PNG")
    if keep := os.environ.get("DARKROOM_KEEP_PICTURE"):
        Path(keep).write_bytes(picture.content)
    assert worker.stop() == 0
    assert gateway.stop() == 0


def wait_until_alive(url: str, gateway: Container, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            if httpx.get(f"{url}/healthz", timeout=2).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.2)
    pytest.fail(f"the gateway does not answer:\n{gateway.logs()}")
