"""One process at a time, where several share a folder; a lock dies with the process that holds it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """Let one process of several through; where the file system has no locks, all go through.

    Args:
        path: The lock file; made where it is missing.
    """
    import fcntl

    with path.open("a") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def has_locks(path: Path) -> bool:
    """Whether the file system can lock ``path``, which is made where it is missing."""
    import fcntl

    try:
        with path.open("a") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return True


class JournalLock:
    """The lock of a study's journal, as Optuna's ``JournalFileBackend`` takes one.

    Optuna's own locks are links and files: a process that is killed while it holds one leaves it behind, and whoever
    goes on with the study waits for it.

    Args:
        path: The lock file; made where it is missing.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._held: Any = None

    def acquire(self) -> bool:
        """Wait for the lock and take it."""
        held = one_at_a_time(self._path)
        held.__enter__()
        # Not before it is ours: another thread may hold it until then.
        self._held = held
        return True

    def release(self) -> None:
        """Give the lock back."""
        held, self._held = self._held, None
        held.__exit__(None, None, None)


def journal_lock(journal: Path) -> Any:
    """A lock for a journal: one that dies with its holder or, on file systems without such, Optuna's own.

    Args:
        journal: The journal file.
    """
    from optuna.storages.journal import JournalFileSymlinkLock

    lock = journal.with_suffix(".lock")
    # The link points at the journal; a relative one would point nowhere, and its age could not be told.
    return JournalLock(lock) if has_locks(lock) else JournalFileSymlinkLock(str(journal.absolute()))
