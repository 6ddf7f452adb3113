"""The supervisor sees worker processes die, gives their jobs back at once, and starts others."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import is_alive, wait_until
from tests.worker.jobs import make_job
from worker.supervisor import slots

SUPERVISE = """
import sys
from worker.contract.settings import ContractSettings
from worker.supervisor import Slot, Supervisor
command = (sys.executable, "-c", sys.argv[2])
sys.exit(Supervisor(ContractSettings(redis_url=sys.argv[1]), [Slot({})], 3, command).run())
"""
CLAIM_AND_DIE = """
import os, signal
from worker.contract.settings import ContractSettings
from worker.intake import Intake
intake = Intake.connect(ContractSettings(), os.environ["DARKROOM_WORKER_NAME"])
while not intake.claim(["tiny"], 8): pass
os.kill(os.getpid(), signal.SIGKILL)
"""
COUNT_SIGNALS = """
import signal, sys
told = []
signal.signal(signal.SIGTERM, lambda *_: (told.append(1), print("told", flush=True)))
print("up", flush=True)
while len(told) < 2: signal.pause()
"""


def start(redis_url: str, child: str, monkeypatch: pytest.MonkeyPatch) -> subprocess.Popen[str]:
    monkeypatch.setenv("DARKROOM_REDIS_URL", redis_url)
    return subprocess.Popen([sys.executable, "-c", SUPERVISE, redis_url, child], stdout=subprocess.PIPE, text=True)


async def test_a_job_that_kills_its_worker_each_time_fails_and_the_supervisor_lives(queue, redis_url, monkeypatch):
    job = make_job()
    await queue.submit(job)
    with start(redis_url, CLAIM_AND_DIE, monkeypatch) as supervisor:
        view = await queue.wait(job.id, 60)
        assert view.status == "failed"
        assert view.result.failure.code == "worker_lost"
        assert supervisor.poll() is None
        supervisor.terminate()
        assert supervisor.wait(30) == 0


def test_a_process_that_cannot_start_is_not_tried_again(redis_url, monkeypatch):
    with start(redis_url, "import sys; sys.exit(2)", monkeypatch) as supervisor:
        assert supervisor.wait(60) == 2


def test_a_process_that_ends_well_by_itself_is_started_again(redis_url, monkeypatch, tmp_path):
    log = tmp_path / "starts"
    note = f"file = open({str(log)!r}, 'a'); file.write('x'); file.flush()"
    child = f"import time; {note}; time.sleep(99 * (file.tell() > 1))"
    with start(redis_url, child, monkeypatch) as supervisor:
        wait_until(lambda: log.exists() and log.read_text() == "xx")
        supervisor.terminate()
        assert supervisor.wait(30) == 0


def test_every_signal_to_stop_is_passed_on(redis_url, monkeypatch):
    with start(redis_url, COUNT_SIGNALS, monkeypatch) as supervisor:
        assert supervisor.stdout is not None
        for heard in ("up", "told"):
            assert supervisor.stdout.readline() == heard + "\n"
            supervisor.send_signal(signal.SIGTERM)
        assert supervisor.wait(30) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells children that their parent died")
def test_processes_do_not_outlive_a_supervisor_that_is_killed(redis_url, monkeypatch):
    child = "import os, time; print(os.getpid(), flush=True); time.sleep(999)"
    with start(redis_url, child, monkeypatch) as supervisor:
        assert supervisor.stdout is not None
        pid = int(supervisor.stdout.readline())
        supervisor.kill()
    wait_until(lambda: not is_alive(pid))


def test_slots_give_every_gpu_a_process_with_its_own_metrics_port():
    environments = [slot.env for slot in slots("all", "auto", 9464, lambda: 2)]
    assert environments == [
        {"DARKROOM_DEVICE": "cuda:0", "DARKROOM_METRICS_PORT": "9464"},
        {"DARKROOM_DEVICE": "cuda:1", "DARKROOM_METRICS_PORT": "9465"},
    ]
    assert [slot.env["DARKROOM_DEVICE"] for slot in slots("2", "cuda", 0, lambda: 3)] == ["cuda:2"]
    assert [slot.env for slot in slots("", "cpu", 9464, lambda: 0)] == [{}]


@pytest.mark.parametrize(
    ("gpus", "device", "said"),
    [("all", "auto", "this machine shows 0"), ("0,4", "auto", "this machine shows 0"), ("0", "cpu", "device is 'cpu'")],
)
def test_gpus_that_are_not_there_are_refused_in_words(gpus, device, said):
    with pytest.raises(ValueError, match=said):
        slots(gpus, device, 0, lambda: 1 if device == "cpu" else 0)


def test_the_supervisor_loads_no_torch():
    code = "import sys, worker.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 0
