"""`python -m worker [--gpus all]`: a supervisor with one worker process, or with one for each GPU.

With `--announce` it only makes the models known.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from contextlib import ExitStack

import structlog
from pydantic import ValidationError

from worker.contract.errors import CannotStart
from worker.contract.settings import complaints
from worker.contract.variables import unread
from worker.logs import configure
from worker.pod import DeletionCost
from worker.probes import serving
from worker.process import leave
from worker.settings import WorkerSettings
from worker.status import CANNOT_START, shared_folder
from worker.supervisor import Supervisor, slots

log = structlog.get_logger()


def main(arguments: list[str] | None = None) -> int:
    """Supervise until told to stop; the exit status says how it ended."""
    parser = argparse.ArgumentParser(prog="darkroom worker", description="Serve the models of DARKROOM_MODELS.")
    parser.add_argument("--gpus", help="a process for each GPU: all, or indices such as 0,2  [env: DARKROOM_GPUS]")
    parser.add_argument("--announce", action="store_true", help="make the models known to the gateways, and end")
    options = parser.parse_args(arguments)
    configure()
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, leave)  # as process 1 of a container we would not hear it otherwise
    try:
        settings = WorkerSettings() if options.gpus is None else WorkerSettings(gpus=options.gpus)
        if options.announce:
            from worker.announce import announce  # with it comes torch

            return announce(settings)
        for told in unread():
            log.warning(told)
        return supervise(settings)
    except ValidationError as error:
        sys.stderr.write(f"darkroom worker: {complaints(error)}\n")
    except (CannotStart, OSError, ValueError) as error:
        sys.stderr.write(f"darkroom worker: {error}\n")
    return CANNOT_START


def supervise(settings: WorkerSettings) -> int:
    """Run the processes that the settings ask for; the exit status. CannotStart, OSError, ValueError."""
    with ExitStack() as cleanup:
        folder = cleanup.enter_context(shared_folder())
        processes = slots(settings.gpus, settings.device, folder, count_gpus)
        cost = DeletionCost.of_pod(settings.pod_name, settings.pod_namespace, os.environ)
        if cost:
            cleanup.callback(cost.close)
        supervisor = Supervisor(settings, processes, settings.death_limit, on_jobs=cost.publish if cost else None)
        if settings.metrics_port:
            cleanup.enter_context(serving(supervisor, settings.metrics_host, settings.metrics_port))
        return supervisor.run()


def count_gpus() -> int:
    """GPUs that torch sees, asked in a process of its own: this one stays small."""
    asked = [sys.executable, "-P", "-c", "import torch; print(torch.cuda.device_count())"]
    return int(subprocess.run(asked, stdout=subprocess.PIPE, check=True).stdout)


if __name__ == "__main__":
    sys.exit(main())
