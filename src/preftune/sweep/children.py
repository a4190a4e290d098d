"""The worker processes that a sweep started: watched, waited for, and ended where they would never end."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Collection, Sequence
from typing import Any

from preftune.sweep import liveness
from preftune.sweep.liveness import Stillness, is_stopped

#: Seconds in which a worker that was asked to end gives its trial back.
END_SECONDS = 30.0


class Children:
    """Worker processes of this sweep.

    Args:
        processes: As they were started.
        patience: Seconds after which a stopped one is ended; by default the sweep's for workers on this machine.
        stopped: Whether a process is stopped.
        still: Adds up for how long.
    """

    def __init__(
        self,
        processes: Sequence[subprocess.Popen[Any]],
        patience: float | None = None,
        stopped: Callable[[int], bool] = is_stopped,
        still: Stillness | None = None,
    ) -> None:
        self._processes, self._stopped = processes, stopped
        self._patience = liveness.PATIENCE_HERE_SECONDS if patience is None else patience
        self._still = still or Stillness()

    def end_hung(self, given_up: Collection[int]) -> list[str]:
        """End those whose trial was given up, and those that have been stopped for too long.

        Args:
            given_up: Process numbers of hung workers, this sweep's and others'.

        Returns:
            Lines for the user.
        """
        told = []
        for process in self._processes:
            if process.poll() is not None:
                continue
            # Without a trial, as while it starts, a worker leaves no sign of life whose absence would show.
            stopped = self._stopped(process.pid)
            still = self._still.seconds(process.pid, stopped)
            if process.pid in given_up or (stopped and still > self._patience):
                process.kill()
                process.wait()
                told.append(f"worker process {process.pid} hung and was ended; what it was working on is done again")
        return told

    def wait(self) -> None:
        """Wait for those that have been asked to end; one that does not answer is ended."""
        for process in self._processes:
            try:
                process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def end(self) -> None:
        """Ask those that are left to end, and see to it."""
        for process in self._processes:
            if process.poll() is None:
                process.terminate()
        self.wait()
