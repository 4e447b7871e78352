"""Stopping on a signal, and noticing a run that hangs."""

import contextlib
import faulthandler
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

REQUEUE = os.EX_TEMPFAIL  # 75, "try again later": the exit status of a run that saved and stopped on a signal
STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # SIGUSR1: SLURM's --signal
ECHO_SECONDS = 5.0  # Ctrl-C reaches a rank from the terminal and, moments later, as SIGTERM from DeepSpeed's launcher


class Stopped(Exception):
    """The run stopped on a signal and has saved; `cli.run` exits with REQUEUE."""


class StopSignals:
    """Within its context the first of STOPPING is only noted, in `received`; a second one ends the process at once.

    A signal within ECHO_SECONDS of the first is the same one, forwarded by a launcher. A thread listens: Python's own
    handlers wait for the main thread, which may hang in a collective call.
    """

    def __init__(self) -> None:
        self.received = ""
        self._before: dict[signal.Signals, Any] = {}
        self._reader, self._writer = -1, -1

    def __enter__(self) -> "StopSignals":
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, lambda number, frame: None) for number in STOPPING}
        threading.Thread(target=self._listen, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(-1)
        os.close(self._writer)  # which ends the thread

    def _listen(self) -> None:
        first = 0.0
        while arrived := os.read(self._reader, 1):
            if arrived[0] not in STOPPING:
                continue
            if not self.received:
                self.received, first = signal.Signals(arrived[0]).name, time.monotonic()
            elif time.monotonic() - first > ECHO_SECONDS:
                os._exit(128 + arrived[0])
        os.close(self._reader)


def leave_signals_alone(worker: int) -> None:
    """For a rank's own workers: a signal to the process group must not stop them before the rank's last step.

    They end with their rank.
    """
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)


class StallWatch:
    """Writes the stacks of all this process's threads to a file when `moved` has not been called for some minutes.

    faulthandler's C thread needs no Python lock, so it works while a collective call hangs.
    """

    def __init__(self, path: Path, minutes: float) -> None:
        self.path = path
        self.seconds = 60 * minutes
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w", encoding="utf-8")

    def moved(self) -> None:
        faulthandler.dump_traceback_later(self.seconds, repeat=True, file=self._file)

    def close(self) -> None:
        """Removes the file if it is empty."""
        faulthandler.cancel_dump_traceback_later()
        self._file.close()
        if self.path.exists() and self.path.stat().st_size == 0:
            self.path.unlink()
            with contextlib.suppress(OSError):  # other ranks' files are still in it
                self.path.parent.rmdir()
