"""`python -m worker [--gpus all]`: a supervisor with one worker process, or with one for each GPU."""

from __future__ import annotations

import argparse
import subprocess
import sys

from pydantic import ValidationError

from worker.contract.settings import complaints
from worker.logs import configure
from worker.settings import WorkerSettings
from worker.supervisor import CANNOT_START, Supervisor, slots


def main(arguments: list[str] | None = None) -> int:
    """Supervise until told to stop; the exit status says how it ended."""
    parser = argparse.ArgumentParser(prog="darkroom worker", description="Serve the models of DARKROOM_MODELS.")
    parser.add_argument("--gpus", help="a process for each GPU: all, or indices such as 0,2  [env: DARKROOM_GPUS]")
    options = parser.parse_args(arguments)
    configure()
    try:
        settings = WorkerSettings() if options.gpus is None else WorkerSettings(gpus=options.gpus)
        processes = slots(settings.gpus, settings.device, settings.metrics_port, count_gpus)
    except ValidationError as error:
        sys.stderr.write(f"darkroom worker: {complaints(error)}\n")
        return CANNOT_START
    except ValueError as error:
        sys.stderr.write(f"darkroom worker: {error}\n")
        return CANNOT_START
    return Supervisor(settings, processes, settings.death_limit).run()


def count_gpus() -> int:
    """GPUs that torch sees, asked in a process of its own: this one stays small."""
    asked = [sys.executable, "-P", "-c", "import torch; print(torch.cuda.device_count())"]
    return int(subprocess.run(asked, stdout=subprocess.PIPE, check=True).stdout)


if __name__ == "__main__":
    sys.exit(main())
