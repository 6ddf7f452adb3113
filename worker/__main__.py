"""`python -m worker`: can be told to stop from its first moment on, as PID 1 too, where the kernel ignores it else."""

from __future__ import annotations

import os
import signal
import sys
from typing import NoReturn


def leave(_signum: int, _frame: object) -> NoReturn:
    """End at once and well: nothing is held yet. Not SystemExit, which a library may swallow while it is imported."""
    try:
        os.write(2, b"darkroom worker: told to stop before it was ready\n")
    finally:
        os._exit(0)


def main() -> int:
    """Run a worker from the environment; the exit status says how it ended."""
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, leave)
    from worker.main import serve  # torch and transformers take seconds

    return serve()


if __name__ == "__main__":
    sys.exit(main())
