"""Keeps worker processes alive, one a GPU, and sees them die: their jobs go to others at once. Never loads torch."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import structlog

from worker.contract.child import Child
from worker.contract.errors import QueueUnavailable
from worker.contract.settings import ContractSettings
from worker.intake import Intake

log = structlog.get_logger()

COMMAND = (sys.executable, "-P", "-m", "worker.process")
POLL_S = 0.1
STEADY_S = 60.0
"""A process that lived this long is started again without the earlier deaths held against it."""

MAX_BACKOFF_S = 30.0
CANNOT_START = 2
"""The exit status of a process that another try would not help."""


@dataclass(eq=False)
class Slot:
    """One process at a time, with its own environment."""

    env: Mapping[str, str]
    child: Child | None = None
    name: str = ""  # of the worker in the child
    born: float = 0.0
    deaths: int = 0  # in a row
    restart_at: float = 0.0


@dataclass(eq=False)
class Supervisor:
    """Runs `slots`; for the main thread, which alone may start children that die with it."""

    settings: ContractSettings
    slots: Sequence[Slot]
    death_limit: int
    command: Sequence[str] = COMMAND
    now: Callable[[], float] = time.monotonic
    _signals: int = 0  # to stop, so far
    _dead: list[str] = field(default_factory=list)  # workers that Redis does not know of yet

    def run(self) -> int:
        """Until told to stop, or until a process cannot start; the exit status."""
        previous = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        intake = Intake.connect(self.settings, f"supervisor-{secrets.token_hex(4)}")
        try:
            return self._watch(intake)
        finally:
            for slot in self.slots:
                if slot.child:
                    slot.child.kill()
            intake.close()
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _watch(self, intake: Intake) -> int:
        status, passed_on = 0, 0
        while True:
            for slot in self.slots:
                if slot.child is None and not self._signals and self.now() >= slot.restart_at:
                    self._start(slot)
                elif slot.child and slot.child.exit_code is not None:
                    status = self._on_exit(slot, slot.child) or status
            if status == CANNOT_START:
                self._signals = max(self._signals, 1)
            if passed_on < self._signals:
                passed_on += 1
                for slot in self.slots:
                    if slot.child:
                        slot.child.terminate()
            self._bury(intake)
            if self._signals and not any(slot.child for slot in self.slots):
                return status
            time.sleep(POLL_S)

    def _start(self, slot: Slot) -> None:
        slot.name = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        env = {**os.environ, **slot.env, "DARKROOM_WORKER_NAME": slot.name}
        slot.child, slot.born = Child("worker", self.command, env=env), self.now()

    def _on_exit(self, slot: Slot, child: Child) -> int:
        """Notes that a process ended; the exit status that follows from it."""
        slot.child = None
        code = child.exit_code or 0
        if code:
            self._dead.append(slot.name)
        if code == CANNOT_START or self._signals:
            return code if code > 0 else 0
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


def slots(gpus: str, device: str, metrics_port: int, visible: Callable[[], int]) -> list[Slot]:
    """A slot for each GPU of `gpus`: "" (as `device` says), "all", or indices such as "0,2". ValueError.

    visible : counts the GPUs of this machine
    """
    if not gpus:
        return [Slot({})]
    count = visible()
    chosen = list(range(count)) if gpus == "all" else [int(part) for part in gpus.split(",")]
    if not chosen or max(chosen) >= count:
        raise ValueError(f"gpus is {gpus!r}, and this machine shows {count}")
    if device != "auto" and not device.startswith("cuda"):
        raise ValueError(f"gpus is {gpus!r}, but the device is {device!r}")
    return [
        Slot({"DARKROOM_DEVICE": f"cuda:{gpu}", "DARKROOM_METRICS_PORT": str(metrics_port and metrics_port + n)})
        for n, gpu in enumerate(chosen)
    ]
