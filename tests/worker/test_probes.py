"""What a worker answers over HTTP: its processes are stand-ins that load nothing."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, get_args

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.processes import wait_until
from worker.contract.errors import CannotStart
from worker.contract.settings import ContractSettings
from worker.probes import Probes, serving
from worker.status import STUCK_S, ProcessStatus, State
from worker.supervisor import STATUS, Slot, Supervisor

SUPERVISE = """
import sys
from pathlib import Path
from worker.contract.settings import ContractSettings
from worker.probes import serving
from worker.supervisor import Slot, Supervisor
command = (sys.executable, "-c", sys.argv[2])
supervisor = Supervisor(ContractSettings(), [Slot({}, Path(sys.argv[1]))], 3, command)
with serving(supervisor, "127.0.0.1", 0) as url:
    print(url, flush=True)
    sys.exit(supervisor.run())
"""
SERVE = """
import os, sys, time
from pathlib import Path
from tests.worker.jobs import make_job
from worker.metrics import WorkerMetrics, count_for_supervisor
from worker.status import ProcessStatus
count_for_supervisor()
metrics, job = WorkerMetrics(), make_job()
metrics.loaded("tiny", 2.0)
metrics.claimed(job, 0.3)
metrics.batch(job, "denoise", rows=os.getpid(), tokens=40, seconds=0.02)
ProcessStatus("ready", 1, time.monotonic()).write(Path(os.environ["DARKROOM_WORKER_STATUS"]))
time.sleep(999)
"""


class Site:
    """A supervisor of two processes that run only in its imagination."""

    def __init__(self, folder: Path) -> None:
        self.slots = [Slot({}, folder / "0"), Slot({}, folder / "1")]
        self.supervisor = Supervisor(ContractSettings(), self.slots, 3)
        self.probes = Probes(self.supervisor)
        for slot in self.slots:
            assert slot.folder
            slot.folder.mkdir()

    def say(self, n: int, state: Any, jobs: int = 0, age_s: float = 0.0) -> None:
        folder = self.slots[n].folder
        assert folder
        ProcessStatus(state, jobs, time.monotonic() - age_s).write(folder / STATUS)

    def ask(self, path: str) -> tuple[int, dict[str, Any]]:
        status, _, body = self.probes.answer(path)
        return status, json.loads(body)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def get(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def samples(url: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    families = text_string_to_metric_families(get(f"{url}/metrics")[1])
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def test_a_worker_is_alive_and_not_ready_while_models_load(site: Site) -> None:
    site.say(0, "ready", jobs=2)
    assert site.ask("/healthz") == (200, {"status": "ok", "stuck": []})
    status, told = site.ask("/readyz")
    assert (status, told["status"], told["processes"], told["jobs"]) == (503, "not_ready", 2, 2)
    assert told["awaited"] == ["process 1 is about to be started"]
    site.say(1, "connecting")
    assert site.ask("/readyz")[1]["awaited"] == ["process 1 has its models, and waits for Redis"]


@pytest.mark.parametrize("state", get_args(State))
def test_readiness_has_words_for_every_state_of_a_process(site: Site, state: str) -> None:
    for n in range(2):
        site.say(n, state)
    status, told = site.ask("/readyz")
    assert (status, len(told["awaited"])) == ((200, 0) if state == "ready" else (503, 2))


def test_a_worker_is_ready_once_all_of_its_processes_are_however_busy(site: Site) -> None:
    site.say(0, "ready", jobs=200)
    site.say(1, "ready", jobs=100)
    assert site.ask("/readyz") == (200, {"status": "ready", "awaited": [], "processes": 2, "jobs": 300})
    assert site.ask("/healthz")[0] == 200


def test_a_process_that_leaves_is_alive_and_not_ready(site: Site) -> None:
    site.say(0, "ready")
    site.say(1, "draining", age_s=2 * STUCK_S)
    assert site.ask("/readyz")[1]["awaited"] == ["process 1 is leaving"]
    assert site.ask("/healthz")[0] == 200


@pytest.mark.parametrize("state", ["ready", "connecting"])
def test_a_control_loop_that_stands_still_is_neither_alive_nor_ready(site: Site, state: str) -> None:
    site.say(0, "ready", age_s=STUCK_S - 10)
    site.say(1, state, age_s=STUCK_S + 15)
    status, told = site.ask("/healthz")
    assert (status, told["stuck"]) == (503, ["process 1 has not moved for 75 s"])
    assert site.ask("/readyz")[0] == 503


def test_a_supervisor_that_stands_still_is_not_alive(site: Site) -> None:
    site.supervisor.turns.last -= STUCK_S + 15
    assert site.ask("/healthz")[1]["stuck"] == ["the supervisor has not moved for 75 s"]


def test_an_unknown_path_is_told_the_known_ones(site: Site) -> None:
    status, told = site.ask("/nowhere")
    assert (status, told["allowed"]) == (404, ["/metrics", "/healthz", "/readyz"])


def test_a_port_that_is_taken_is_said_in_words(site: Site) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with (
            pytest.raises(CannotStart, match=rf"127\.0\.0\.1 port {port} \(Address already in use\).*METRICS_PORT"),
            serving(site.supervisor, "127.0.0.1", port),
        ):
            pass


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6 here")
def test_an_address_may_be_of_ipv6_and_head_has_no_body(site: Site) -> None:
    with serving(site.supervisor, "::1", 0) as url:
        assert get(f"{url}/healthz?now")[0] == 200
        with urllib.request.urlopen(urllib.request.Request(f"{url}/metrics", method="HEAD"), timeout=10) as answer:
            assert int(answer.headers["content-length"]) > 0
            assert answer.read() == b""


def supervise(folder: Path, child: str) -> subprocess.Popen[str]:
    """A real supervisor of one process; its first line is its url."""
    command = [sys.executable, "-c", SUPERVISE, str(folder), child]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def url_of(supervisor: subprocess.Popen[str]) -> str:
    assert supervisor.stdout is not None
    return supervisor.stdout.readline().strip()


@pytest.fixture(autouse=True)
def _redis(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DARKROOM_REDIS_URL", redis_url)


def test_what_a_killed_process_counted_is_still_told_and_its_restart_is(tmp_path: Path) -> None:
    with supervise(tmp_path / "0", SERVE) as supervisor:
        url = url_of(supervisor)
        assert get(f"{url}/healthz")[0] == 200  # from the first moment on
        wait_until(lambda: get(f"{url}/readyz")[0] == 200)
        kill_and_look(url)
        supervisor.kill()


def kill_and_look(url: str) -> None:
    rows = ("darkroom_batch_size_sum", (("model", "tiny"),))
    before = samples(url)
    pid = int(before[rows])
    assert before["darkroom_worker_restarts_total", (("reason", "killed"),)] == 0
    assert before["darkroom_worker_ready", ()] == before["darkroom_worker_processes", ()] == 1
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: samples(url)["darkroom_worker_restarts_total", (("reason", "killed"),)] == 1)
    wait_until(lambda: get(f"{url}/readyz")[0] == 200)
    after = samples(url)
    assert after[rows] > pid
    assert after["darkroom_request_queue_seconds_count", (("model", "tiny"),)] == 2
    assert after["darkroom_models_loaded", (("model", "tiny"),)] == 1
    assert after["darkroom_requests_running", ()] == 1


def test_a_process_that_stands_still_is_killed_and_counts_as_hung(tmp_path: Path) -> None:
    still = SERVE.replace("time.monotonic()", f"time.monotonic() - {STUCK_S + 1}")
    with supervise(tmp_path / "0", still) as supervisor:
        url = url_of(supervisor)
        wait_until(lambda: samples(url)["darkroom_worker_restarts_total", (("reason", "hung"),)] >= 1)
        supervisor.kill()


def test_a_worker_that_is_told_to_stop_answers_until_its_processes_are_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = SERVE.replace("time.sleep(999)", "import signal; signal.signal(15, print); print('up', flush=True)") + (
        "signal.pause(); open(os.environ['GATE']).read()"
    )
    os.mkfifo(tmp_path / "gate")
    monkeypatch.setenv("GATE", str(tmp_path / "gate"))
    with supervise(tmp_path / "0", slow) as supervisor:
        url = url_of(supervisor)
        assert supervisor.stdout is not None
        assert supervisor.stdout.readline() == "up\n"
        assert get(f"{url}/readyz")[0] == 200
        supervisor.terminate()
        wait_until(lambda: get(f"{url}/readyz")[0] == 503)
        assert "this worker is leaving" in get(f"{url}/readyz")[1]
        assert get(f"{url}/healthz")[0] == 200
        (tmp_path / "gate").open("w").close()  # now it ends
        assert supervisor.wait(30) == 0
