"""A crew without a model: `python -m tests.torture.plain`. Its worker ends jobs at once; a poisoned one kills it.

Supervised as the real one is, by a clock that runs twenty times as fast: restarts are not waited for.
"""

from __future__ import annotations

import os
import signal
import sys
import time

from tests.torture import POISON
from worker.contract.job import Result
from worker.contract.settings import ContractSettings
from worker.intake import Intake
from worker.supervisor import Slot, Supervisor

MANY = 8
DEATH_LIMIT = 3


def process() -> None:
    """Claims and ends jobs until it dies."""
    intake = Intake.connect(ContractSettings(), os.environ["DARKROOM_WORKER_NAME"])
    while True:
        intake.renew(["tiny"])
        claims = intake.claim(["tiny"], MANY)
        if any(POISON in claim.job.params.prompt for claim in claims):
            os.kill(os.getpid(), signal.SIGKILL)
        for claim in claims:
            intake.commit(claim, "succeeded", Result())
        if not claims:
            intake.wait(0.5)


def supervise() -> int:
    """One process after the other."""
    command = (sys.executable, "-m", "tests.torture.plain", "process")
    return Supervisor(ContractSettings(), [Slot({})], DEATH_LIMIT, command, now=lambda: 20 * time.monotonic()).run()


if __name__ == "__main__":
    sys.exit(process() if sys.argv[1:] == ["process"] else supervise())
