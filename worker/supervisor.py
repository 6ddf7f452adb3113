"""Keeps worker processes alive, one a GPU, and sees them die: their jobs go to others at once. Never loads torch."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from worker.contract.child import Child
from worker.contract.errors import QueueUnavailable
from worker.contract.settings import ContractSettings
from worker.intake import Intake
from worker.metrics import forget_gauges
from worker.status import CANNOT_START, HUNG, ProcessStatus, Turns

log = structlog.get_logger()

COMMAND = (sys.executable, "-P", "-m", "worker.process")
POLL_S = 0.1
STEADY_S = 60.0
"""A process that lived this long is started again without the earlier deaths held against it."""

THAW_S = 10.0
"""After we were stopped, most likely with all of them, processes get so long to say that they turn again."""

STATUS = "status.json"
"""The file in a slot's folder where its process says what it is at."""

MAX_BACKOFF_S = 30.0
REASONS = ("killed", "crashed", "hung")
"""Why a process is started again: a signal, an error, or that it stood still, as with a GPU that does not answer."""


@dataclass(eq=False)
class Slot:
    """One process at a time, with its own environment."""

    env: Mapping[str, str]
    folder: Path | None = None  # where it says how it is and what it counts; None: nowhere
    child: Child | None = None
    name: str = ""  # of the worker in the child
    born: float = 0.0
    deaths: int = 0  # in a row
    restart_at: float = 0.0
    given_up: bool = False  # killed by us, for it stood still

    def start(self, command: Sequence[str]) -> None:
        """Starts a process, under a name that none had before."""
        self.name = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        env = {**os.environ, **self.env, "DARKROOM_WORKER_NAME": self.name}
        if self.folder:
            self.folder.mkdir(exist_ok=True)
            env |= {"DARKROOM_WORKER_STATUS": str(self.folder / STATUS), "PROMETHEUS_MULTIPROC_DIR": str(self.folder)}
        self.child, self.given_up = Child("worker", command, env=env), False

    def kill_if_stuck(self) -> None:
        """Ends a process whose control loop stands still. Does not wait: a broken driver may keep even such a one."""
        status = self.status()
        if self.child and status and (silent_s := status.stuck_s()) and not self.given_up:
            log.error("a worker process stands still and is killed", worker=self.name, silent_s=round(silent_s))
            self.given_up = True
            os.kill(self.child.pid, signal.SIGKILL)

    def ended(self) -> None:
        """Forgets a process that ended, but for what it counted."""
        self.child = None
        if self.folder:
            (self.folder / STATUS).unlink(missing_ok=True)
            forget_gauges(self.folder)

    def status(self) -> ProcessStatus | None:
        """What its process says; None: nothing yet, or there is none just now."""
        return ProcessStatus.read(self.folder / STATUS) if self.folder else None


@dataclass(eq=False)
class Supervisor:
    """Runs `slots`; for the main thread, which alone may start children that die with it."""

    settings: ContractSettings
    slots: Sequence[Slot]
    death_limit: int
    command: Sequence[str] = COMMAND
    now: Callable[[], float] = time.monotonic
    on_jobs: Callable[[int], None] | None = None  # told again and again how many jobs they hold
    restarts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(REASONS, 0))
    turns: Turns = field(default_factory=Turns)  # in which it looks after them
    _served: bool = False  # one of them was ready once
    _signals: int = 0  # to stop, so far
    _dead: list[str] = field(default_factory=list)  # workers that Redis does not know of yet

    @property
    def is_leaving(self) -> bool:
        """Whether it was told to stop, or cannot go on."""
        return self._signals > 0

    def jobs(self) -> int:
        """How many jobs its processes hold."""
        return sum(status.jobs for status in self._statuses())

    def run(self) -> int:
        """Until told to stop, or until a process cannot start; the exit status."""
        previous = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        intake = Intake.connect(self.settings, f"supervisor-{secrets.token_hex(4)}")
        try:
            return self._watch(intake)
        finally:
            for slot in self.slots:
                if slot.child and not slot.given_up:
                    slot.child.kill()
            intake.close()
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _watch(self, intake: Intake) -> int:
        status, passed_on = 0, 0
        while True:
            self.turns.note()
            self._served = self._served or any(status.state == "ready" for status in self._statuses())
            for slot in self.slots:
                if slot.child is None and not self._signals and self.now() >= slot.restart_at:
                    slot.start(self.command)
                    slot.born = self.now()
                elif slot.child and slot.child.exit_code is not None:
                    status = self._on_exit(slot, slot.child) or status
                elif self.turns.last - self.turns.since > THAW_S:
                    slot.kill_if_stuck()
            if status == CANNOT_START:
                self._signals = max(self._signals, 1)
            if passed_on < self._signals:
                passed_on += 1
                for slot in self.slots:
                    if slot.child:
                        slot.child.terminate()
            self._bury(intake)
            if self.on_jobs:
                self.on_jobs(self.jobs())
            # A process that a broken driver keeps although it was killed keeps nobody else
            if self._signals and not any(slot.child and not slot.given_up for slot in self.slots):
                return status
            time.sleep(POLL_S)

    def _statuses(self) -> Iterator[ProcessStatus]:
        return (status for slot in self.slots if (status := slot.status()))

    def _on_exit(self, slot: Slot, child: Child) -> int:
        """Notes that a process ended; the exit status that follows from it."""
        slot.ended()
        code = child.exit_code or 0
        if code:
            self._dead.append(slot.name)
        # One of several GPUs that is lost or full for a while ends none of the others: the settings were good once
        if (code == CANNOT_START and not self._served) or self._signals:
            return code if code > 0 else 0
        self.restarts["hung" if slot.given_up else reason(code)] += 1
        slot.deaths = 1 if self.now() - slot.born > STEADY_S else slot.deaths + 1
        delay_s = 0.0 if slot.deaths == 1 else min(2.0 ** (slot.deaths - 2), MAX_BACKOFF_S)
        slot.restart_at = self.now() + delay_s
        log.warning("a worker process ended", worker=slot.name, how=child.describe_exit(), restart_in_s=delay_s)
        return 0

    def _bury(self, intake: Intake) -> None:
        """Tell Redis of the dead; while it is away they are kept."""
        while self._dead:
            try:
                taken = intake.bury(self._dead[0], self.death_limit)
            except QueueUnavailable:
                return
            dead = self._dead.pop(0)
            log.info("took back its jobs", worker=dead, jobs=taken)
            for slot in self.slots:
                if slot.name == dead and taken:  # it could start, and it did work: there is nothing to wait for
                    slot.deaths, slot.restart_at = 0, 0.0

    def _on_signal(self, _signum: int, _frame: object) -> None:
        self._signals += 1


def reason(exit_code: int) -> str:
    """Which of REASONS it was; a process ends well only if somebody told it to, and it was not us."""
    return "hung" if exit_code == HUNG else "crashed" if exit_code > 0 else "killed"


def slots(gpus: str, device: str, folder: Path, visible: Callable[[], int]) -> list[Slot]:
    """A slot for each GPU of `gpus`: "" (as `device` says), "all", or indices such as "0,2". ValueError.

    folder  : holds one for each slot
    visible : counts the GPUs of this machine
    """
    if not gpus:
        return [Slot({}, folder / "0")]
    count = visible()
    chosen = list(range(count)) if gpus == "all" else [int(part) for part in gpus.split(",")]
    if not chosen or max(chosen) >= count:
        mend = f"allowed: all, or of {', '.join(map(str, range(count)))}" if count else "leave it out for the CPU"
        raise ValueError(f"--gpus is {gpus!r}; GPUs that PyTorch finds here: {count}; {mend}")
    if device != "auto" and not device.startswith("cuda"):
        raise ValueError(f"--gpus is {gpus!r}, but the device is {device!r}")
    return [Slot({"DARKROOM_DEVICE": f"cuda:{gpu}"}, folder / str(n)) for n, gpu in enumerate(chosen)]
