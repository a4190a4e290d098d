"""One process at a time writes into a folder; the second one is told which process that is."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from preftune.config.machine import machine_id
from preftune.errors import SetupError
from preftune.files import parse_json
from preftune.ownership.record import HOME

#: In ``.preftune``: the file that is locked. It says who holds it, and is empty while nobody does.
FILE_NAME = "holder.json"
#: Seconds to wait for the lock of a process that is dead: its children may hold it a little longer.
_PATIENCE = 15.0
#: Lock and number of holders in this process, by folder.
_held: dict[str, tuple[Any, int]] = {}

# A forked child holds nothing; filelock closes its copy of the descriptor.
os.register_at_fork(after_in_child=_held.clear)


@contextmanager
def holding(folder: str | os.PathLike[str], where: str = "output_dir") -> Iterator[None]:
    """Hold the lock of a folder; within one process it may be held several times.

    The lock ends with its process, however that ends.

    Args:
        folder: The folder; made where it is missing.
        where: The setting that names it.

    Raises:
        SetupError: Another process holds it, or the folder cannot be written.
    """
    key = os.path.realpath(folder)
    lock, count = _held[key] if key in _held else (_take(Path(key), where), 0)
    _held[key] = (lock, count + 1)
    try:
        yield
    finally:
        # A forked child that unwinds its parent's blocks holds nothing.
        if key in _held:
            lock, count = _held.pop(key)
            if count > 1:
                _held[key] = (lock, count - 1)
            else:
                _say(Path(key), None)
                lock.release()


def _take(folder: Path, where: str) -> Any:
    from filelock import FileLock, Timeout

    path = folder / HOME / FILE_NAME
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path, timeout=0, thread_local=False)
        deadline = time.monotonic() + _PATIENCE
        while True:
            try:
                lock.acquire()
                break
            except Timeout as error:
                holder = _holder(path)
                if holder is None or _is_alive(holder) or time.monotonic() > deadline:
                    raise _refusal(folder, holder, where) from error
                time.sleep(0.1)
        me = {"preftune": "lock", "pid": os.getpid(), "started": _started(os.getpid()), "machine": machine_id()}
        _say(folder, me)
    except OSError as error:
        if isinstance(error, SetupError):
            raise
        raise SetupError(
            f"cannot write ({error.strerror or error})",
            where=str(error.filename or path),
            remedy=f"free some space, or set another {where}",
        ) from error
    except NotImplementedError:
        # A file system without locks.
        from contextlib import nullcontext

        return _Unlocked(nullcontext())
    return lock


class _Unlocked:
    def __init__(self, nothing: Any) -> None:
        self._nothing = nothing

    def release(self) -> None:
        """There is nothing to release."""


def _say(folder: Path, holder: dict[str, Any] | None) -> None:
    """Write who holds the lock, for the error of the next process; nothing depends on it."""
    path = folder / HOME / FILE_NAME
    with suppress(OSError):
        if path.stat().st_size and _holder(path) is None:
            # Somebody else's file of this name: it is locked, and left as it is.
            return
        handle = os.open(path, os.O_WRONLY | getattr(os, "O_NOFOLLOW", 0))
        try:
            os.ftruncate(handle, 0)
            if holder is not None:
                os.write(handle, json.dumps(holder).encode())
        finally:
            os.close(handle)


def _holder(path: Path) -> dict[str, Any] | None:
    try:
        found = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(found, dict) or found.get("preftune") != "lock":
        return None
    numbers = isinstance(found.get("pid"), int) and isinstance(found.get("started"), (int, float))
    return found if numbers else None


def _started(pid: int) -> float | None:
    import psutil

    try:
        return float(psutil.Process(pid).create_time())
    except (psutil.Error, ValueError, OverflowError):
        return None


def _is_alive(holder: dict[str, Any]) -> bool:
    """Whether the holder runs; what cannot be told from this machine counts as running."""
    if holder.get("machine") != machine_id():
        return True
    started = _started(holder["pid"])
    return started is not None and abs(started - holder["started"]) < 1.0


def _refusal(folder: Path, holder: dict[str, Any] | None, where: str) -> SetupError:
    who = "another process"
    if holder is not None:
        with suppress(ValueError, OverflowError, OSError):
            since = datetime.fromtimestamp(holder["started"]).strftime("%Y-%m-%d %H:%M:%S")
            who = f"process {holder['pid']}, started {since}"
        who += "" if holder.get("machine") == machine_id() else " on another machine"
    return SetupError(
        f"{who}, is writing into this folder",
        where=where,
        value=str(folder),
        remedy=f"wait until it has ended, or set another {where}",
    )
