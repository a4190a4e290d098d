"""Whether the process that works on a trial is still there."""

from __future__ import annotations

import os
import platform
import socket
import time
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any

import psutil

#: Seconds between two signs of life.
BEAT_SECONDS = 10.0
#: A worker on another machine is given up after this long without one.
PATIENCE_SECONDS = 90.0
#: A worker on this machine whose process is still there is given up after this long without one: it is stopped, or
#: something holds it.
PATIENCE_HERE_SECONDS = 300.0

Owner = Mapping[str, Any]


def identity() -> dict[str, Any]:
    """Who this process is: machine, process number, and when it was started, since numbers come round again."""
    return {
        "machine": _machine(),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "born": psutil.Process().create_time(),
    }


def _machine(boot: Path = Path("/proc/sys/kernel/random/boot_id"), space: str = "/proc/self/ns/pid") -> str:
    """A name for the space that process numbers count in: containers of one machine may each have their own."""
    try:
        return f"{boot.read_text(encoding='ascii').strip()} {os.readlink(space)}"
    except OSError:
        return f"{platform.node()} {psutil.boot_time():.0f}"


def runs_here(owner: Owner) -> bool | None:
    """Whether the owner is a live process of this machine; ``None`` where it belongs to another machine."""
    if owner.get("machine") != _machine():
        return None
    try:
        process = psutil.Process(int(owner["pid"]))
        # Two hundredths: the kernel counts starting times in ticks.
        same = abs(process.create_time() - float(owner["born"])) < 0.02
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


class Stillness:
    """For how long something has not changed, as far as somebody looked.

    A machine that sleeps, or a terminal in which all processes are stopped together, is no sign of a process that
    hangs: of the time between two looks only two beats count.

    Args:
        clock: Monotonic time.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: dict[Hashable, tuple[Any, float, float]] = {}

    def seconds(self, key: Hashable, sign: Any) -> float:
        """Seconds for which ``key`` has shown ``sign``."""
        now = self._clock()
        last, looked, still = self._seen.get(key, (None, now, 0.0))
        still = still + min(now - looked, 2 * BEAT_SECONDS) if key in self._seen and last == sign else 0.0
        self._seen[key] = (sign, now, still)
        return still


class Watcher:
    """Tells dead owners from live ones.

    On this machine the process table answers at once. An owner on another machine is dead when the sign of life that it
    leaves in the study has not changed for :data:`PATIENCE_SECONDS` under our eyes: clocks are not compared. So is one
    on this machine whose process is there and leaves none for :data:`PATIENCE_HERE_SECONDS`.

    Args:
        patience: Seconds.
        clock: Monotonic time.
        patience_here: Seconds, for owners on this machine; by default :data:`PATIENCE_HERE_SECONDS`.

    Attributes:
        hung: Processes of this machine that were given up although they are still there.
    """

    def __init__(
        self,
        patience: float = PATIENCE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
        patience_here: float | None = None,
    ) -> None:
        self._patience = patience
        self._patience_here = PATIENCE_HERE_SECONDS if patience_here is None else patience_here
        self._clock = clock
        self._seen: dict[int, tuple[Any, float]] = {}
        self._still = Stillness(clock)
        self.hung: set[int] = set()

    def is_dead(self, trial: int, owner: Owner | None, beat: Any) -> bool:
        """Whether whoever works on a trial is gone, or as good as gone.

        Args:
            trial: Number of the trial.
            owner: What :func:`identity` said there; ``None`` where the owner has not signed yet.
            beat: Its last sign of life.
        """
        here = runs_here(owner) if owner is not None else None
        sign = (None if owner is None else dict(owner), beat)
        if owner is not None and here:
            if self._still.seconds(trial, sign) <= self._patience_here:
                return False
            self.hung.add(int(owner["pid"]))
            return True
        if here is not None:
            return True
        now = self._clock()
        last, since = self._seen.get(trial, (None, now))
        if trial not in self._seen or last != sign:
            self._seen[trial] = (sign, now)
            return False
        return now - since > self._patience


def is_stopped(pid: int) -> bool:
    """Whether a process of this machine is stopped, as by SIGSTOP or Ctrl-Z."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_STOPPED
    except psutil.Error:
        return False
