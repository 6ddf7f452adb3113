"""`python -m worker.process`: one worker process. It can be told to stop from its first moment on."""

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
    """Serve what the environment asks for; the exit status says how it ended."""
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, leave)
    from worker.main import serve  # torch and transformers take seconds

    return serve()


if __name__ == "__main__":
    sys.exit(main())
