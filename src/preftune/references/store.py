"""Content-addressed store of reference log-probs: computed once, found again by every later run.

An entry is the per-token log-probs of one sequence's scored tokens under one reference, filed under
:func:`~preftune.references.fingerprint.weights_key` and :func:`~preftune.references.fingerprint.sequence_key`. Values
per token, not sums, so that length-dependent losses can be changed without scoring anything again.

The store is a cache: training never fails because of it. Where the disk cannot be written, entries stay in memory and
one warning says so; an unreadable value is a miss; a corrupt file is moved aside.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType

import numpy.typing as npt

from preftune.config.paths import cache_home
from preftune.errors import StoreError
from preftune.references import database, names, rows
from preftune.references.database import failure_of
from preftune.references.rows import FloatArray

__all__ = ["ReferenceStore", "StoreInfo", "StoreWarning", "WeightsInfo", "cache_home"]

_WRITE_CHUNK = 4096
# Connections inherited through a fork. SQLite forbids even closing them in the child, so they must not be collected.
_ABANDONED: list[database.Database] = []
_USED_RESOLUTION = 60.0


class StoreWarning(UserWarning):
    """The reference store works, but not as it should; the message says how and what to do."""


@dataclass(frozen=True)
class WeightsInfo:
    """What the store holds for one reference.

    Attributes:
        weights_key: Content key of the reference.
        num_entries: Sequences stored on disk.
        created: First write, in seconds since the epoch.
        last_used: Last read or write, in seconds since the epoch, to about a minute.
    """

    weights_key: str
    num_entries: int
    created: float
    last_used: float


@dataclass(frozen=True)
class StoreInfo:
    """What the store holds.

    Attributes:
        path: The database file.
        num_bytes: Its size on disk, journals included.
        mode: ``disk``, ``read_only`` (new entries stay in memory) or ``memory``.
        journal_mode: ``wal``, ``delete`` on network file systems, ``none`` if nothing is written.
        weights: One item per reference, the last used first.
        num_in_memory: Entries that could not be written to disk.
    """

    path: Path
    num_bytes: int
    mode: str
    journal_mode: str
    weights: tuple[WeightsInfo, ...]
    num_in_memory: int

    @property
    def num_entries(self) -> int:
        """Entries on disk over all references."""
        return sum(item.num_entries for item in self.weights)


class ReferenceStore:
    """The store in one folder, shared safely by threads, processes and, without WAL, machines.

    Args:
        path: Folder; by default :func:`cache_home`.
        strict: Raise :class:`~preftune.errors.StoreError` instead of going on in memory or moving a corrupt file.
        max_bytes: Upper limit of the file; what does not fit stays in memory.
    """

    def __init__(
        self, path: str | os.PathLike[str] | None = None, *, strict: bool = False, max_bytes: int | None = None
    ) -> None:
        self.path = Path(path) if path is not None else cache_home()
        self._strict = strict
        self._max_bytes = max_bytes
        self._mutex = threading.RLock()
        self._memory: dict[str, dict[bytes, FloatArray]] = {}
        self._touched: set[str] = set()
        self._warned: set[str] = set()
        self._database: database.Database | None = None
        self._open()

    def __enter__(self) -> ReferenceStore:
        """Return the open store."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file."""
        self.close()

    def __del__(self) -> None:
        """Close the file of a store that nobody closed."""
        if hasattr(self, "_database"):
            self.close()

    def close(self) -> None:
        """Close the file; the store then answers from memory alone."""
        with self._mutex:
            if self._database is not None:
                if self._pid == os.getpid():  # a connection must not be touched by a forked child, even to close it
                    self._database.connection.close()
                self._database = None

    @property
    def file(self) -> Path:
        """The database file, whether or not it exists."""
        return self.path / database.FILE_NAME

    def get_many(self, weights_key: str, keys: Sequence[bytes]) -> dict[bytes, FloatArray]:
        """Look up sequences.

        Args:
            weights_key: Content key of the reference.
            keys: Content keys of the sequences; repeats are allowed.

        Returns:
            Per-token log-probs (natural logarithm) of the scored tokens, shape ``(num_scored,)`` and read-only, for
            each sequence that is known and intact.
        """
        with self._mutex:
            kept = self._memory.get(weights_key, {})
            found = {key: kept[key] for key in keys if key in kept} if kept else {}
            wanted = [key for key in dict.fromkeys(keys) if key not in found]
            connection = self._connection()
            if connection is None or not wanted:
                return found
            try:
                for key, blob in rows.select(connection, weights_key, wanted):
                    value = rows.decode(weights_key, key, blob)
                    if value is not None:
                        found[key] = value
            except database.FAILURES as error:
                self._fail(error)
            else:
                self._touch(weights_key)
            return found

    def put_many(self, weights_key: str, items: Mapping[bytes, npt.ArrayLike]) -> None:
        """Store sequences; what is known already is replaced.

        Returns once the entries are committed, a few thousand per transaction, so an interrupted pass keeps what it
        has done.

        Args:
            weights_key: Content key of the reference.
            items: Content key of each sequence to its per-token log-probs, shape ``(num_scored,)``. Sequences with
                a non-finite value are not stored, which a warning says.

        Raises:
            DataError: If a value is not one-dimensional.
        """
        values = {key: rows.as_floats(key, value) for key, value in items.items()}
        finite = rows.finite(values)
        if len(finite) < len(values):
            self._warn("finite", "Reference log-probs with non-finite values are not stored; check the reference model")
        names.write_down(self.path, weights_key)
        with self._mutex:
            pending = list(finite.items())
            for start in range(0, len(pending), _WRITE_CHUNK):
                chunk = pending[start : start + _WRITE_CHUNK]
                if not self._write(weights_key, chunk):
                    self._memory.setdefault(weights_key, {}).update(chunk)

    def info(self) -> StoreInfo:
        """Return where the store lies and what it holds."""
        with self._mutex:
            found: list[tuple[str, int, float, float]] = []
            connection = self._connection()
            if connection is not None:
                try:
                    found = rows.summary(connection)
                except database.FAILURES as error:
                    self._fail(error)
            opened = self._database
            return StoreInfo(
                path=self.file,
                num_bytes=database.num_bytes(self.path),
                mode="memory" if opened is None else "disk" if opened.writable else "read_only",
                journal_mode="none" if opened is None else opened.journal_mode,
                weights=tuple(WeightsInfo(*row) for row in found),
                num_in_memory=sum(map(len, self._memory.values())),
            )

    def clear(self, weights_key: str | None = None, older_than: timedelta | float | None = None) -> int:
        """Forget entries and give their disk space back.

        Args:
            weights_key: Only this reference; ``None`` for all.
            older_than: Only references that were last used longer ago than this (seconds, if a number).

        Returns:
            Number of entries removed.

        Raises:
            StoreError: If the store cannot be written.
        """
        seconds = older_than.total_seconds() if isinstance(older_than, timedelta) else older_than
        with self._mutex:
            removed = 0
            if seconds is None:  # what is in memory was used by this very process
                names = list(self._memory) if weights_key is None else [weights_key]
                removed = sum(len(self._memory.pop(name, {})) for name in names)
            connection = self._writable()
            if connection is None:
                raise StoreError(
                    "The reference store cannot be written, so nothing was cleared from disk",
                    where=str(self.file),
                    remedy="Check the permissions of the folder, or set PREFTUNE_CACHE to another one",
                )
            before = None if seconds is None else time.time() - seconds
            try:
                return removed + rows.delete(connection, weights_key, before)
            except database.FAILURES as error:
                rows.roll_back(connection)
                raise StoreError(
                    f"Clearing failed ({error})",
                    where=str(self.file),
                    remedy="If other runs are using the store, try again when they are done",
                ) from error

    # Opening, and what to do when something goes wrong.

    def _open(self, *, again: bool = False) -> None:
        self._pid = os.getpid()
        self._database = None
        try:
            self._database = database.open_database(self.path, self._max_bytes)
        except database.FAILURES as error:
            if self._strict:
                raise self._as_store_error(error) from error
            if again or failure_of(error) != "corrupt" or not self._move_aside():
                self._warn_memory(str(error))
            else:
                self._open(again=True)
        except StoreError as error:  # some other program's file
            if self._strict:
                raise
            self._warn("memory", f"{error}; until then reference log-probs are kept in memory only")
        if self._database is not None and not self._database.writable and not self._strict:
            self._warn_memory("it is read-only")

    def _connection(self) -> sqlite3.Connection | None:
        if self._database is not None and self._pid != os.getpid():
            _ABANDONED.append(self._database)
            self._open()
        return None if self._database is None else self._database.connection

    def _writable(self) -> sqlite3.Connection | None:
        connection = self._connection()
        return connection if self._database is not None and self._database.writable else None

    def _fail(self, error: Exception) -> None:
        """Deal with an error of an open store; afterwards it is sound, read from only, or served from memory."""
        if self._strict:
            raise self._as_store_error(error) from error
        failure = failure_of(error)
        if failure == "corrupt":
            self.close()
            if self._move_aside():
                self._open(again=True)
            else:
                self._warn_memory(str(error))
        elif failure in ("full", "read_only"):
            self._warn_memory("the disk is full or broken" if failure == "full" else "it is read-only")
        else:
            # Locked for a whole minute: waiting as long again for every batch would stall training.
            self.close()
            self._warn_memory(str(error))

    def _move_aside(self) -> bool:
        """Return whether it is worth trying to open the file again."""
        try:
            target = database.move_aside(self.path)
        except OSError:
            return False
        if target is not None:
            self._warn(
                "corrupt",
                f"The reference store {self.file} was corrupt and has been moved to {target.name}; a new one is "
                "begun and reference log-probs are computed again. Delete the old file when you like",
            )
        return True

    def _as_store_error(self, error: Exception) -> StoreError:
        remedy = {
            "corrupt": "`preftune cache clear` moves the file aside and begins a new one",
            "full": "Free some space, or run `preftune cache clear`",
            "busy": "Wait for the process that holds it, or stop that process",
        }.get(failure_of(error), "Set PREFTUNE_CACHE to a folder that can be written")
        return StoreError(f"The reference store cannot be used ({error})", where=str(self.file), remedy=remedy)

    def _warn_memory(self, reason: str) -> None:
        self._warn(
            "memory",
            f"The reference store {self.file} cannot be written ({reason}): new reference log-probs are kept in "
            "memory and lost at the end. Free some space, or set PREFTUNE_CACHE to a folder that can be written",
        )

    def _warn(self, topic: str, message: str) -> None:
        if topic not in self._warned:
            self._warned.add(topic)
            warnings.warn(message, StoreWarning, stacklevel=4)

    # Writing.

    def _write(self, weights_key: str, chunk: list[tuple[bytes, FloatArray]]) -> bool:
        for _ in range(2):  # once more after a corrupt file was replaced
            connection = self._writable()
            if connection is None:
                break
            try:
                rows.insert(connection, weights_key, chunk)
                return True
            except database.FAILURES as error:
                rows.roll_back(connection)
                self._fail(error)
                if failure_of(error) != "corrupt":
                    break
        if self._strict:
            raise StoreError("The reference store is read-only", where=str(self.file))
        return False

    def _touch(self, weights_key: str) -> None:
        """Note the time of use, for ``clear(older_than=...)``; never worth waiting or failing for."""
        connection = self._writable()
        if weights_key in self._touched or connection is None:
            return
        self._touched.add(weights_key)
        now = time.time()
        try:
            connection.execute("PRAGMA busy_timeout=100")
            connection.execute(
                "UPDATE weights SET used = ? WHERE key = ? AND used < ?", (now, weights_key, now - _USED_RESOLUTION)
            )
        except database.FAILURES:
            pass
        finally:
            with suppress(*database.FAILURES):
                connection.execute(f"PRAGMA busy_timeout={int(1000 * database.BUSY_SECONDS)}")
