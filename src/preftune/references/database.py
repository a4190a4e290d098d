"""The SQLite file under the reference store: where it lies, how it is opened, what its failures mean."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from preftune.config.paths import make_home
from preftune.errors import StoreError

FILE_NAME = "references-v1.sqlite"
APPLICATION_ID = 0x70726674
BUSY_SECONDS = 60.0
_CACHE_KIB = 32 << 10

# File systems on which the shared memory that WAL needs is not shared between machines.
_NETWORK_TYPES = frozenset(
    {
        *("9p", "afs", "beegfs", "ceph", "cifs", "coda", "davfs", "fhgfs", "fuse.ceph", "fuse.gcsfuse"),
        *("fuse.glusterfs", "fuse.juicefs", "fuse.s3fs", "fuse.sshfs", "gfs", "gfs2", "glusterfs", "gpfs", "lustre"),
        *("mfs", "ncpfs", "nfs", "nfs4", "ocfs2", "panfs", "smb2", "smb3", "smbfs", "virtiofs", "wekafs"),
    }
)

#: What SQLite's calls raise. It quotes a damaged file in its errors, and Python cannot read the quotation.
FAILURES = (sqlite3.Error, UnicodeDecodeError)
Failure = Literal["corrupt", "full", "read_only", "busy", "other"]
Journal = Literal["wal", "delete"]


@dataclass(frozen=True)
class Database:
    """An open file.

    Attributes:
        connection: In autocommit mode; transactions are begun by hand.
        writable: Whether the file and its folder can be written.
        journal_mode: ``wal``, or ``delete`` where several machines may share the folder.
    """

    connection: sqlite3.Connection
    writable: bool
    journal_mode: str


def failure_of(error: Exception) -> Failure:
    """Classify an error by its text, which SQLite keeps stable; numeric codes need Python 3.11."""
    if isinstance(error, UnicodeDecodeError):
        return "corrupt"
    text = str(error)
    if "malformed" in text or "not a database" in text:
        return "corrupt"
    if "is full" in text or "disk I/O error" in text or "too big" in text:
        return "full"
    if "readonly" in text or "unable to open" in text:
        return "read_only"
    if "locked" in text or "locking protocol" in text:
        return "busy"
    return "other"


def is_network_path(path: Path) -> bool:
    """Tell whether a folder lies on a network file system, as far as Linux says; unknown counts as local."""
    try:
        mounts = Path("/proc/self/mounts").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    target = os.path.realpath(path)
    best, kind = "", ""
    for line in mounts:
        fields = line.split(" ")
        if len(fields) < 3:
            continue
        point = fields[1].replace("\\040", " ").replace("\\011", "\t").replace("\\134", "\\")
        inside = target == point or target.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best):  # a later mount on the same point hides the earlier one
            best, kind = point, fields[2]
    return kind in _NETWORK_TYPES


@contextlib.contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Hold the folder for one process while its file is created, repaired or moved; a no-op where locks fail."""
    try:
        import fcntl
    except ImportError:  # Windows: SQLite's own locks have to do
        yield
        return
    try:
        handle = os.open(folder / ".references.lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError:
        yield
        return
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def open_database(folder: Path, max_bytes: int | None = None) -> Database:
    """Open the store's file, creating it if need be.

    Args:
        folder: Folder of the store.
        max_bytes: Upper limit of the file's size.

    Returns:
        A connection that can be written, or else one that can at least be read.

    Raises:
        sqlite3.Error: If the file is corrupt, or neither can be opened nor made.
        OSError: If the folder cannot be made.
        StoreError: If the file is some other program's database.
    """
    file = folder / FILE_NAME
    with contextlib.suppress(OSError):  # a folder that cannot be made is told apart below, by what SQLite says
        make_home(folder)
    _check_folder(folder)
    with folder_lock(folder):
        try:
            return _open_writable(file, max_bytes)
        except FAILURES as error:
            if failure_of(error) != "read_only" or not file.exists():
                raise
        return _open_read_only(file)


def _check_folder(folder: Path) -> None:
    """Refuse a folder in which anybody could put another file in the place of the store's."""
    try:
        everybody = folder.stat().st_mode & stat.S_IWOTH
    except OSError:
        return
    if everybody:
        raise StoreError(
            "All users of this machine can write to the folder of the reference store",
            where=str(folder),
            remedy=f"chmod o-w {folder}, or set PREFTUNE_CACHE to a folder below it",
        )


def _make_private(file: Path) -> None:
    """A file for this user alone, whatever the umask; one that is there is closed to all but its group.

    One that is there is not opened: closing it again would take away the locks that another connection of this process
    has on it, and another process might then delete the log that this one is writing (How To Corrupt An SQLite
    Database File, section 2.2).
    """
    with contextlib.suppress(OSError):
        try:
            os.close(os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
        except FileExistsError:
            about = os.lstat(file)
            if stat.S_ISREG(about.st_mode) and about.st_uid == os.getuid() and about.st_mode & 0o007:
                os.chmod(file, stat.S_IMODE(about.st_mode) & 0o770)


def _open_writable(file: Path, max_bytes: int | None) -> Database:
    _make_private(file)
    connection = _connect(str(file))
    try:
        if not os.access(file, os.W_OK) or not os.access(file.parent, os.W_OK):
            raise sqlite3.OperationalError("attempt to write a readonly database")
        known = _check_owner(connection, file)
        if not known:
            connection.execute("PRAGMA auto_vacuum=INCREMENTAL")  # has to come before the first page is written
        journal_mode = _set_journal(connection, "delete" if is_network_path(file.parent) else "wal")
        if not known:
            _create_tables(connection)
        if max_bytes is not None:
            (page_size,) = one_row(connection.execute("PRAGMA page_size"))
            connection.execute(f"PRAGMA max_page_count={max(1, max_bytes // page_size)}")
    except BaseException:
        connection.close()
        raise
    return Database(connection, True, journal_mode)


def _open_read_only(file: Path) -> Database:
    # WAL wants to write a file beside the database even to read. 'immutable' does without, at the risk of reading
    # pages that another machine is just replacing; the checksum of every value turns that into a miss.
    failure: Exception | None = None
    for mode in ("mode=ro", "mode=ro&immutable=1"):
        connection = _connect(f"{file.absolute().as_uri()}?{mode}", uri=True)
        try:
            if _check_owner(connection, file):
                return Database(connection, False, "none")
            failure = sqlite3.OperationalError("attempt to write a readonly database")
        except FAILURES as error:
            failure = error
        connection.close()
    assert failure is not None
    raise failure


def _connect(name: str, *, uri: bool = False) -> sqlite3.Connection:
    connection = sqlite3.connect(name, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False, uri=uri)
    # A damaged name is another name, not an error while it is read.
    connection.text_factory = lambda data: data.decode("utf-8", "replace")
    return connection


def one_row(cursor: sqlite3.Cursor) -> tuple[Any, ...]:
    """The row that a sound file is sure to have.

    Raises:
        sqlite3.DatabaseError: There is none.
    """
    row: tuple[Any, ...] | None = cursor.fetchone()
    if row is None:
        raise sqlite3.DatabaseError("database disk image is malformed (a row is missing)")
    return row


def _check_owner(connection: sqlite3.Connection, file: Path) -> bool:
    """Return whether the tables exist; refuse a database that another program made."""
    connection.execute(f"PRAGMA cache_size=-{_CACHE_KIB}")
    (owner,) = one_row(connection.execute("PRAGMA application_id"))
    tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type='table'")}
    if owner == APPLICATION_ID and {"weights", "logps"} <= tables:
        return True
    if tables - {"sqlite_sequence"}:
        raise StoreError(
            "This SQLite file was not made by preftune",
            where=str(file),
            remedy="Move it away, or set PREFTUNE_CACHE to another folder",
        )
    return False


def _set_journal(connection: sqlite3.Connection, wanted: Journal) -> str:
    (mode,) = one_row(connection.execute("PRAGMA journal_mode"))
    if mode != wanted:
        try:
            (mode,) = one_row(connection.execute(f"PRAGMA journal_mode={wanted}"))
        except sqlite3.OperationalError as error:
            # 'busy': another process has the file open in its mode, which then holds for this one too.
            # Otherwise the file system has no shared memory to offer.
            if failure_of(error) == "corrupt":
                raise
            (mode,) = connection.execute(
                "PRAGMA journal_mode" if failure_of(error) == "busy" else "PRAGMA journal_mode=delete"
            ).fetchone()
    # NORMAL under WAL: a killed process loses nothing that was committed; a power cut may lose the last commits, whole.
    connection.execute(f"PRAGMA synchronous={'NORMAL' if mode == 'wal' else 'FULL'}")
    return str(mode)


def _create_tables(connection: sqlite3.Connection) -> None:
    connection.execute("BEGIN IMMEDIATE")
    connection.execute(f"PRAGMA application_id={APPLICATION_ID}")
    # AUTOINCREMENT: an id freed by `clear` is never given to other weights, whatever a slow process still believes.
    connection.execute(
        "CREATE TABLE IF NOT EXISTS weights (id INTEGER PRIMARY KEY AUTOINCREMENT, key TEXT NOT NULL UNIQUE,"
        " created REAL NOT NULL, used REAL NOT NULL)"
    )
    connection.execute(
        "CREATE TABLE IF NOT EXISTS logps (id INTEGER PRIMARY KEY, weights INTEGER NOT NULL, key BLOB NOT NULL,"
        " value BLOB NOT NULL, UNIQUE (weights, key))"
    )
    connection.execute("COMMIT")


def move_aside(folder: Path) -> Path | None:
    """Move a corrupt file out of the way, unless another process has already replaced it by a sound one.

    Args:
        folder: Folder of the store.

    Returns:
        Where it lies now, or ``None`` if the file in place is sound.

    Raises:
        OSError: If it cannot be moved.
    """
    file = folder / FILE_NAME
    with folder_lock(folder):
        if not file.exists() or is_sound(file):
            return None
        target = file.with_name(f"{FILE_NAME}.corrupt-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}")
        # The journal goes first: left behind, it would be replayed into the file made next.
        for suffix in ("-wal", "-shm", "-journal", ""):
            part = Path(f"{file}{suffix}")
            if part.exists():
                os.replace(part, f"{target}{suffix}")
        return target


def is_sound(file: Path) -> bool:
    """Read the whole file once and tell whether SQLite finds it consistent."""
    try:
        connection = _connect(str(file))
    except FAILURES:
        return False
    try:
        return bool(connection.execute("PRAGMA integrity_check(1)").fetchone() == ("ok",))
    except FAILURES as error:
        return failure_of(error) != "corrupt"
    finally:
        connection.close()


def num_bytes(folder: Path) -> int:
    """Return what the store takes on disk, journals included."""
    parts = (Path(f"{folder / FILE_NAME}{suffix}") for suffix in ("", "-wal", "-shm", "-journal"))
    return sum(part.stat().st_size for part in parts if part.exists())
