"""What processes tell their supervisor, and the folder in which they do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from worker.status import STOOD_STILL_S, ProcessStatus, Turns, shared_folder

HOLD = """
import sys, time
from pathlib import Path
from worker.status import shared_folder
with shared_folder(Path(sys.argv[1])) as folder:
    print(folder, flush=True)
    time.sleep(999)
"""


def test_a_status_is_read_as_it_was_written(tmp_path: Path) -> None:
    file = tmp_path / "status.json"
    assert ProcessStatus.read(file) is None
    for status in (ProcessStatus("connecting", 0, 1.5), ProcessStatus("ready", 3, 2.5)):
        status.write(file)
        assert ProcessStatus.read(file) == status
    assert list(tmp_path.iterdir()) == [file]


def test_a_shared_folder_is_gone_afterwards(tmp_path: Path) -> None:
    with shared_folder(tmp_path) as folder:
        (folder / "0").mkdir()
        assert folder.parent == tmp_path
    assert list(tmp_path.iterdir()) == []


def test_the_folder_of_a_killed_supervisor_is_deleted_by_the_next_and_no_other(tmp_path: Path) -> None:
    holders = [
        subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    folders = []
    for holder in holders:
        assert holder.stdout is not None
        folders.append(Path(holder.stdout.readline().strip()))
    killed, alive = holders
    killed.kill()
    killed.wait()
    assert folders[0].exists()
    with shared_folder(tmp_path) as folder:
        assert set(tmp_path.iterdir()) == {folder, folders[1]}
    alive.kill()
    alive.wait()
    for holder in holders:
        assert holder.stdout is not None
        holder.stdout.close()


def test_a_folder_that_cannot_be_made_says_where(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nowhere"), shared_folder(tmp_path / "nowhere"):
        pass


def test_a_loop_knows_since_when_it_turns_without_having_stood_still() -> None:
    now = [100.0]
    turns = Turns(lambda: now[0])
    for pause, since in ((1, 100), (STOOD_STILL_S, 100), (STOOD_STILL_S + 1, 112), (1, 112)):
        now[0] += pause
        turns.note()
        assert (turns.last, turns.since) == (now[0], since)
