"""Children end when told to, and when their parent dies in whatever way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import is_alive, wait_until
from worker.contract.child import Child

FOREVER = "import time\nprint('up', flush=True)\ntime.sleep(600)"
DEAF = "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + FOREVER
PARENT = f"""
import signal, sys
from worker.contract.child import Child
print(Child("orphan", [sys.executable, "-c", {FOREVER!r}]).pid, flush=True)
signal.pause()
"""


def test_child_ends_at_sigterm_within_its_grace(tmp_path: Path) -> None:
    child = Child("plain", [sys.executable, "-c", FOREVER], log=tmp_path / "log")
    assert child.exit_code is None
    assert child.stop(20)
    assert child.describe_exit() == "was ended by SIGTERM"


def test_child_that_ignores_sigterm_is_killed_after_its_grace(tmp_path: Path) -> None:
    child = Child("deaf", [sys.executable, "-c", DEAF], log=tmp_path / "log")
    wait_until(lambda: "up" in child.last_lines())
    assert not child.stop(0.05)
    assert child.describe_exit() == "was ended by SIGKILL"


def test_last_lines_are_the_end_of_the_log(tmp_path: Path) -> None:
    child = Child("talker", [sys.executable, "-c", "for n in range(9999): print(n)"], log=tmp_path / "new" / "log")
    wait_until(lambda: child.exit_code is not None)
    assert child.describe_exit() == "ended with exit code 0"
    assert child.last_lines(2) == "9997\n9998"


def test_child_reads_its_config_from_standard_input(tmp_path: Path) -> None:
    echo = "import sys; print(sys.stdin.read().upper())"
    child = Child("echo", [sys.executable, "-c", echo], log=tmp_path / "log", config="secret")
    wait_until(lambda: child.exit_code is not None)
    assert child.last_lines() == "SECRET"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells children that their parent died")
def test_child_does_not_outlive_a_parent_that_is_killed() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, cwd=Path(__file__).parents[3])
    with parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert is_alive(child)
        os.kill(parent.pid, signal.SIGKILL)
        parent.stdout.read()
    wait_until(lambda: not is_alive(child))
