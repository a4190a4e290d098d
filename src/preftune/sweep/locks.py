"""One process at a time, where several share a folder; a lock dies with the process that holds it."""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from preftune.errors import SetupError
from preftune.ownership import HOME
from preftune.sweep.liveness import Stillness

#: Seconds after which a study's lock that nobody else got in between is taken from its holder.
GRACE_SECONDS = 30.0
_POLL_SECONDS = 0.005


@contextlib.contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """Let one process of several through; where the file system has no locks, all go through.

    Args:
        path: The lock file; made where it is missing.
    """
    import fcntl

    with _opened(path) as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _opened(path: Path) -> IO[str]:
    """A lock file; one that is a link, and would be made somewhere else, is refused."""
    try:
        return open(path, "a", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW, 0o644))
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        remedy = "remove it"
        raise SetupError("a link in place of a lock", where=str(path), remedy=remedy) from error


@contextlib.contextmanager
def beginning(folder: Path) -> Iterator[None]:
    """Let one process of several write what all share into a sweep's folder."""
    home = folder / HOME
    home.mkdir(exist_ok=True)
    with one_at_a_time(home / "begin.lock"):
        yield


def has_locks(path: Path) -> bool:
    """Whether the file system can lock ``path``, which is made where it is missing."""
    import fcntl

    try:
        with _opened(path) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return True


class JournalLock:
    """The lock of a study's journal, as Optuna's ``JournalFileBackend`` takes one.

    Optuna's own locks are links and files: a process that is killed while it holds one leaves it behind, and whoever
    goes on with the study waits for it. This one dies with its holder, and a holder that is stopped loses it: appending
    to the journal takes milliseconds, so that whoever has held the lock for ``grace`` seconds does nothing.

    Args:
        path: The lock file; made where it is missing.
        grace: Seconds after which a lock that has not changed hands is taken away.
    """

    def __init__(self, path: Path, grace: float = GRACE_SECONDS) -> None:
        self._path, self._grace = path, grace
        self._held: IO[str] | None = None

    def acquire(self) -> bool:
        """Wait for the lock and take it."""
        still = Stillness()
        while not self._try():
            with contextlib.suppress(FileNotFoundError):
                sign = self._path.stat()
                if still.seconds("lock", (sign.st_ino, sign.st_mtime_ns)) > self._grace:
                    # The old holder keeps a file without a name. Should it wake up in the middle of its append, lines
                    # still do not mix: the journal is opened for appending and written in one call.
                    self._path.unlink()
            time.sleep(_POLL_SECONDS)
        return True

    def _try(self) -> bool:
        import fcntl

        file = _opened(self._path)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file.fileno()), self._path.stat()):
                # The sign by which the others see that it changes hands.
                os.utime(file.fileno())
                # Not before it is ours: another thread may hold it until then.
                self._held = file
                return True
        except (BlockingIOError, FileNotFoundError):
            pass
        file.close()
        return False

    def release(self) -> None:
        """Give the lock back."""
        held, self._held = self._held, None
        assert held is not None
        held.close()


def journal_lock(journal: Path) -> Any:
    """A lock for a journal: one that dies with its holder or, on file systems without such, Optuna's own.

    Args:
        journal: The journal file.
    """
    from optuna.storages.journal import JournalFileSymlinkLock

    lock = journal.with_suffix(".lock")
    # The link points at the journal; a relative one would point nowhere, and its age could not be told.
    return JournalLock(lock) if has_locks(lock) else JournalFileSymlinkLock(str(journal.absolute()))
