"""The supervisor sees worker processes die, gives their jobs back at once, and starts others."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import is_alive, wait_until
from tests.worker.jobs import make_job
from worker.status import CANNOT_START, HUNG
from worker.supervisor import reason, slots

SUPERVISE = """
import sys
from worker.contract.settings import ContractSettings
from worker.supervisor import Slot, Supervisor
command = (sys.executable, "-c", sys.argv[2])
sys.exit(Supervisor(ContractSettings(redis_url=sys.argv[1]), [Slot({})], 3, command).run())
"""
SUPERVISE_IN = SUPERVISE.replace("import sys\n", "import sys\nfrom pathlib import Path\n", 1).replace(
    "Slot({})", "Slot({}, Path(sys.argv[3]))"
)
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


TELL_JOBS = """
import sys
from pathlib import Path
from worker.contract.settings import ContractSettings
from worker.supervisor import Slot, Supervisor
code = "import os, time; from pathlib import Path; from worker.status import ProcessStatus;" \\
    "status = ProcessStatus('ready', int(os.environ['JOBS']), time.monotonic());" \\
    "status.write(Path(os.environ['DARKROOM_WORKER_STATUS'])); time.sleep(99)"
slots = [Slot({"JOBS": jobs}, Path(sys.argv[1]) / jobs) for jobs in ("2", "3")]
command = (sys.executable, "-c", code)
sys.exit(Supervisor(ContractSettings(), slots, 3, command, on_jobs=lambda jobs: print(jobs, flush=True)).run())
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


def test_a_process_that_cannot_start_again_is_tried_again_and_ends_no_others(redis_url, monkeypatch, tmp_path):
    log = tmp_path / "starts"
    child = (
        "import os, sys, time; from pathlib import Path; from worker.status import ProcessStatus;"
        f"file = open({str(log)!r}, 'a'); file.write('x'); file.flush(); again = file.tell();"
        "again > 2 and time.sleep(99); again > 1 and sys.exit(2);"
        "ProcessStatus('ready', 0, time.monotonic()).write(Path(os.environ['DARKROOM_WORKER_STATUS'])); time.sleep(1)"
    )
    monkeypatch.setenv("DARKROOM_REDIS_URL", redis_url)
    command = [sys.executable, "-c", SUPERVISE_IN, redis_url, child, str(tmp_path / "slot")]
    with subprocess.Popen(command) as supervisor:
        wait_until(lambda: log.exists() and log.read_text() == "xxx", 30)
        assert supervisor.poll() is None
        supervisor.terminate()
        assert supervisor.wait(30) == 0


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


def test_slots_give_every_gpu_a_process_with_a_folder_of_its_own(tmp_path):
    chosen = slots("all", "auto", tmp_path, lambda: 2)
    assert [slot.env for slot in chosen] == [{"DARKROOM_DEVICE": "cuda:0"}, {"DARKROOM_DEVICE": "cuda:1"}]
    assert [slot.folder for slot in chosen] == [tmp_path / "0", tmp_path / "1"]
    assert [slot.env["DARKROOM_DEVICE"] for slot in slots("2", "cuda", tmp_path, lambda: 3)] == ["cuda:2"]
    assert [slot.env for slot in slots("", "cpu", tmp_path, lambda: 0)] == [{}]


@pytest.mark.parametrize(
    ("gpus", "device", "found", "said"),
    [
        ("all", "auto", 0, "--gpus is 'all'; GPUs that PyTorch finds here: 0; leave it out for the CPU"),
        ("0,4", "auto", 2, "--gpus is '0,4'; GPUs that PyTorch finds here: 2; allowed: all, or of 0, 1"),
        ("0", "cpu", 1, "device is 'cpu'"),
    ],
)
def test_gpus_that_are_not_there_are_refused_in_words(gpus, device, found, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        slots(gpus, device, tmp_path, lambda: found)


def test_a_variable_that_nothing_reads_is_logged():
    with socket.create_server(("127.0.0.1", 0)) as taken:  # at which it ends
        env = {"DARKROOM_METRICS_PORT": str(taken.getsockname()[1]), "DARKROOM_AUHT": "on"}
        worker = subprocess.run(
            [sys.executable, "-m", "worker"],
            env=os.environ | env,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
        )
    assert worker.returncode == CANNOT_START
    assert worker.stderr.count("nothing reads DARKROOM_AUHT; did you mean DARKROOM_AUTH?") == 1


@pytest.mark.parametrize(("code", "why"), [(-9, "killed"), (0, "killed"), (1, "crashed"), (HUNG, "hung")])
def test_a_restart_has_one_of_three_reasons(code, why):
    assert reason(code) == why


def test_jobs_of_all_processes_are_added_up_and_told(redis_url, monkeypatch, tmp_path):
    monkeypatch.setenv("DARKROOM_REDIS_URL", redis_url)
    with subprocess.Popen([sys.executable, "-c", TELL_JOBS, str(tmp_path)], stdout=subprocess.PIPE, text=True) as told:
        assert told.stdout is not None
        assert "5\n" in iter(told.stdout.readline, "")  # not until both have said theirs
        told.terminate()
        assert told.wait(30) == 0


def test_the_supervisor_loads_no_torch():
    code = "import sys, worker.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 0
