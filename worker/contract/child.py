"""A child process that cannot outlive the one that started it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

# Runs in the child, which then becomes the command: prctl(PR_SET_PDEATHSIG, ...) outlasts exec. A process of its own,
# not preexec_fn, which may deadlock where there are threads.
_BIND_AND_EXEC = """
import ctypes, os, signal, sys
number, parent = int(sys.argv[1]), int(sys.argv[2])
ctypes.CDLL(None).prctl(1, number, 0, 0, 0)
if os.getppid() != parent:
    sys.exit("the parent is gone")
signal.signal(signal.SIGPIPE, signal.SIG_DFL)
os.execvp(sys.argv[3], sys.argv[3:])
"""


class Child:
    """One named child process, its log file, and an orderly end.

    On Linux the kernel sends it `death_signal` when its parent dies, however that happens. Start it from the main
    thread: to the kernel "the parent" is the thread that forked.
    """

    def __init__(
        self,
        name: str,
        argv: Sequence[str],
        *,
        log: Path | None = None,  # None: it writes where we write
        env: Mapping[str, str] | None = None,
        death_signal: signal.Signals = signal.SIGKILL,
        config: str | None = None,  # fed to its standard input
        inherit: Sequence[int] = (),  # file descriptors
    ) -> None:
        self.name, self.log = name, log
        if log:
            log.parent.mkdir(parents=True, exist_ok=True)
        sink: IO[bytes] | None = log.open("ab") if log else None
        try:
            self._process = subprocess.Popen(
                _bound_to_parent(argv, death_signal),
                stdin=subprocess.DEVNULL if config is None else subprocess.PIPE,
                stdout=sink,
                stderr=subprocess.STDOUT if sink else None,
                env=env,
                pass_fds=inherit,
                process_group=0,  # Ctrl-C reaches us alone; we stop the others in order
            )
        finally:
            if sink:
                sink.close()
        if config is not None and self._process.stdin:
            with self._process.stdin as pipe:
                pipe.write(config.encode())

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs; negative: the signal that ended it."""
        return self._process.poll()

    def describe_exit(self) -> str:
        """How it ended, for people."""
        code = self.exit_code
        if code is None:
            return "is running"
        return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"

    def stop(self, grace_s: float) -> bool:
        """SIGTERM, then SIGKILL once `grace_s` seconds are over; True if it ended by itself."""
        if self.exit_code is None:
            self._process.terminate()
        try:
            self._process.wait(grace_s)
        except subprocess.TimeoutExpired:
            self.kill()
            return False
        return True

    def terminate(self) -> None:
        """SIGTERM, if it still runs."""
        self._process.terminate()

    def kill(self) -> None:
        """SIGKILL, at once."""
        self._process.kill()
        self._process.wait()

    def last_lines(self, count: int = 15) -> str:
        """The end of its log."""
        if not (self.log and self.log.exists()):
            return ""
        with self.log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 16_384))
            lines = file.read().decode(errors="replace").splitlines()
        return "\n".join(lines[-count:])


def _bound_to_parent(argv: Sequence[str], death_signal: signal.Signals) -> Sequence[str]:
    if sys.platform != "linux":
        return argv
    return [sys.executable, "-I", "-S", "-c", _BIND_AND_EXEC, str(int(death_signal)), str(os.getpid()), *argv]
