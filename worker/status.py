"""What worker processes tell their supervisor: by files while they live, by their exit status in the end. No torch."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, Self

CANNOT_START = 2
"""The exit status of a process that another try would not help."""

HUNG = 70
"""The exit status of a process whose GPU no longer answers."""

State = Literal["connecting", "ready", "draining"]
"""connecting: the models are loaded, and Redis does not know of it yet. While they load nothing is said."""

STUCK_S = 60.0
"""A control loop turns several times a second, or once in some seconds where Redis is away."""

STOOD_STILL_S = 5.0
"""A loop that did not turn for so long was stopped, and most likely all of us with it."""

FOLDER_PREFIX = "darkroom-worker-"


@dataclass(frozen=True)
class ProcessStatus:
    """What a worker process is at."""

    state: State
    jobs: int  # that it holds
    beat: float  # when its control loop last turned, by this machine's monotonic clock

    def stuck_s(self) -> float | None:
        """For how long its control loop has not turned, where that is too long; loading and leaving have no bound."""
        silent_s = time.monotonic() - self.beat
        return silent_s if self.state in ("connecting", "ready") and silent_s > STUCK_S else None

    @classmethod
    def read(cls, file: Path) -> Self | None:
        """What was written last; None if nothing was."""
        try:
            return cls(**json.loads(file.read_text()))
        except FileNotFoundError:
            return None

    def write(self, file: Path) -> None:
        """Replaces what is there: who reads finds the old or the new one, never half of it. OSError."""
        draft = file.with_name(f"{file.name}.new")
        draft.write_text(json.dumps(asdict(self)))
        draft.replace(file)


class Turns:
    """The turns of a loop that watches others, which are not to blame for the time in which it stood still itself."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self.last = self.since = now()  # the last turn; the first since it stood still

    def note(self) -> None:
        """One more."""
        before, self.last = self.last, self._now()
        if self.last - before > STOOD_STILL_S:
            self.since = self.last


@contextmanager
def shared_folder(parent: Path | None = None) -> Iterator[Path]:
    """A folder for what processes tell their supervisor, deleted afterwards. OSError.

    So are those of supervisors that were killed: each locks its own for as long as it lives.
    """
    parent = parent or Path(tempfile.gettempdir())
    for left in parent.glob(f"{FOLDER_PREFIX}*/lock"):
        _delete_if_left(left)
    folder = Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX, dir=parent))
    draft = folder / "lock.new"
    with draft.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        draft.rename(folder / "lock")  # only now others see it, and it is locked
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _delete_if_left(lock: Path) -> None:
    try:
        if lock.parent.lstat().st_uid != os.getuid():
            return
        with lock.open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock.parent, ignore_errors=True)
    except OSError:  # it is locked, or was deleted meanwhile
        pass
