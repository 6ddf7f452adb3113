"""The pod's deletion cost, told to an API server of our own."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.processes import wait_until
from worker.pod import ANNOTATION, Api, DeletionCost


class ApiServer:
    """Takes patches of pods as the cluster's does; `status` is what it answers."""

    def __init__(self) -> None:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_PATCH(self) -> None:
                outer.paths.append(self.path)
                outer.headers.append(dict(self.headers.items()))
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                outer.hold.wait(10)
                if outer.status == 200:
                    outer.costs.append(body["metadata"]["annotations"][ANNOTATION])
                outer.answered += 1
                self.send_response(outer.status)
                self.send_header("content-length", "2")
                self.end_headers()
                self.wfile.write(b"{}")

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.status, self.answered = 200, 0
        self.hold = threading.Event()
        self.hold.set()
        self.costs: list[str] = []
        self.paths: list[str] = []
        self.headers: list[dict[str, str]] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self.hold.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def server() -> Iterator[ApiServer]:
    running = ApiServer()
    yield running
    running.close()


@pytest.fixture
def account(tmp_path: Path) -> Path:
    (tmp_path / "token").write_text("first-token\n")
    return tmp_path


@pytest.fixture
def cost(server: ApiServer, account: Path) -> Iterator[DeletionCost]:
    keeper = DeletionCost(Api(server.url, account), "worker-7", "pictures", interval_s=0.05)
    yield keeper
    keeper.close()


def test_jobs_become_the_cost_of_our_own_pod(server: ApiServer, cost: DeletionCost) -> None:
    cost.publish(3)
    wait_until(lambda: server.costs[-1:] == ["3"], 10)
    assert set(server.paths) == {"/api/v1/namespaces/pictures/pods/worker-7"}
    assert server.headers[0]["authorization"] == "Bearer first-token"
    assert server.headers[0]["content-type"] == "application/merge-patch+json"


def test_cost_goes_back_to_zero_when_the_jobs_are_done(server: ApiServer, cost: DeletionCost) -> None:
    cost.publish(2)
    wait_until(lambda: server.costs[-1:] == ["2"], 10)
    cost.publish(0)
    wait_until(lambda: server.costs[-2:] == ["2", "0"], 10)


def test_first_number_replaces_what_an_earlier_container_left(server: ApiServer, cost: DeletionCost) -> None:
    wait_until(lambda: server.costs == ["0"], 10)


def test_number_that_stays_is_told_once(server: ApiServer, cost: DeletionCost) -> None:
    wait_until(lambda: server.costs == ["0"], 10)
    for _ in range(3):
        cost.publish(0)
    cost.publish(1)
    wait_until(lambda: server.answered == 2, 10)
    assert server.costs == ["0", "1"]


def test_changes_within_the_interval_are_told_once_as_the_last(server: ApiServer, account: Path) -> None:
    keeper = DeletionCost(Api(server.url, account), "worker-7", "pictures", interval_s=0.3)
    wait_until(lambda: server.costs == ["0"], 10)
    for jobs in (2, 3, 4, 5):
        keeper.publish(jobs)
    wait_until(lambda: len(server.costs) == 2, 10)
    assert server.costs == ["0", "5"]
    keeper.close()


def test_publish_does_not_wait_for_a_slow_api_server(server: ApiServer, cost: DeletionCost) -> None:
    wait_until(lambda: server.answered == 1, 10)
    server.hold.clear()
    cost.publish(1)
    wait_until(lambda: len(server.paths) == 2, 10)
    cost.publish(2)
    assert server.answered == 1  # it was still held when publish came back
    server.hold.set()
    wait_until(lambda: server.costs == ["0", "1", "2"], 10)


def test_refusal_is_harmless_and_tried_again_with_the_present_token(
    server: ApiServer, cost: DeletionCost, account: Path
) -> None:
    wait_until(lambda: server.answered == 1, 10)
    server.status = 403
    cost.publish(1)
    wait_until(lambda: server.answered > 1, 10)
    (account / "token").write_text("second-token")
    server.status = 200
    wait_until(lambda: server.costs == ["0", "1"], 10)
    assert server.headers[-1]["authorization"] == "Bearer second-token"


def test_missing_token_is_harmless(server: ApiServer, tmp_path: Path) -> None:
    keeper = DeletionCost(Api(server.url, tmp_path), "worker-7", "pictures", interval_s=0.05)
    keeper.publish(1)
    (tmp_path / "token").write_text("late-token")
    wait_until(lambda: server.costs[-1:] == ["1"], 10)
    keeper.close()


@pytest.mark.parametrize(
    ("host", "url"), [("10.0.0.1", "https://10.0.0.1:6443"), ("fd00::1", "https://[fd00::1]:6443")]
)
def test_api_server_is_where_the_cluster_says(host: str, url: str) -> None:
    api = Api.of_cluster({"KUBERNETES_SERVICE_HOST": host, "KUBERNETES_SERVICE_PORT_HTTPS": "6443"})
    assert api is not None
    assert api.url == url


def test_no_cost_is_kept_outside_a_cluster_or_without_a_name() -> None:
    assert DeletionCost.of_pod("worker-7", "pictures", {}) is None
    assert DeletionCost.of_pod("", "pictures", {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}) is None
