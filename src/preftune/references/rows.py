"""Rows of the reference store: SQL statements, and values as bytes with a checksum."""

from __future__ import annotations

import math
import sqlite3
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from preftune.errors import DataError
from preftune.references.database import FAILURES, one_row

FloatArray = npt.NDArray[np.float32]

_READ_CHUNK = 900  # SQLite before 3.32 takes no more than 999 parameters
_CHECKSUM_BYTES = 8
_FLOAT = np.dtype("<f4")


def select(connection: sqlite3.Connection, weights_key: str, keys: list[bytes]) -> Iterator[tuple[Any, Any]]:
    """Yield key and stored bytes of the sequences that are known."""
    for start in range(0, len(keys), _READ_CHUNK):
        chunk = keys[start : start + _READ_CHUNK]
        marks = ",".join("?" * len(chunk))
        yield from connection.execute(
            f"SELECT key, value FROM logps WHERE weights = (SELECT id FROM weights WHERE key = ?) AND key IN ({marks})",
            (weights_key, *chunk),
        )


def insert(connection: sqlite3.Connection, weights_key: str, chunk: list[tuple[bytes, FloatArray]]) -> None:
    """Write one chunk in one transaction."""
    blobs = [(key, encode(weights_key, key, value)) for key, value in chunk]
    now = time.time()
    connection.execute("BEGIN IMMEDIATE")
    # The id is looked up inside the transaction: another process may have cleared and recreated these weights.
    connection.execute("INSERT OR IGNORE INTO weights (key, created, used) VALUES (?, ?, ?)", (weights_key, now, now))
    (weights,) = one_row(connection.execute("SELECT id FROM weights WHERE key = ?", (weights_key,)))
    connection.execute("UPDATE weights SET used = ? WHERE id = ?", (now, weights))
    connection.executemany(
        "INSERT OR REPLACE INTO logps (weights, key, value) VALUES (?, ?, ?)",
        ((weights, key, blob) for key, blob in blobs),
    )
    connection.execute("COMMIT")


def delete(connection: sqlite3.Connection, weights_key: str | None, before: float | None) -> int:
    """Remove one reference's entries, or all, that were last used before a time; return how many."""
    connection.execute("BEGIN IMMEDIATE")
    ids = [
        number
        for number, key, used in connection.execute("SELECT id, key, used FROM weights").fetchall()
        if weights_key in (None, key) and (before is None or _seconds(used) < before)
    ]
    removed = 0
    for number in ids:
        removed += connection.execute("DELETE FROM logps WHERE weights = ?", (number,)).rowcount
        connection.execute("DELETE FROM weights WHERE id = ?", (number,))
    connection.execute("COMMIT")
    connection.executescript("PRAGMA incremental_vacuum")  # execute() would run one step, which frees one page
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    return removed


def summary(connection: sqlite3.Connection) -> list[tuple[str, int, float, float]]:
    """Return key, number of entries, created and last used of each reference, the last used first."""
    found = connection.execute(
        "SELECT key, (SELECT COUNT(*) FROM logps WHERE weights = weights_row.id), created, used"
        " FROM weights AS weights_row ORDER BY used DESC, key"
    ).fetchall()
    return [(str(key), number, _seconds(created), _seconds(used)) for key, number, created, used in found]


def _seconds(value: Any) -> float:
    """A time as it was stored; the beginning of all times where a damaged file holds something else."""
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else 0.0


def roll_back(connection: sqlite3.Connection) -> None:
    """End a transaction that failed."""
    try:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
    except FAILURES:
        pass  # SQLite has rolled back by itself


def _checksum(weights_key: str, key: bytes, data: bytes) -> bytes:
    # Bound to both keys: a value that a damaged index serves under another name does not pass either.
    return xxhash.xxh3_64_digest(b"%b|%b|%b" % (weights_key.encode(), key, data))


def encode(weights_key: str, key: bytes, value: FloatArray) -> bytes:
    """Return a value as it is stored: checksum, then little-endian float32."""
    data = value.tobytes()
    return _checksum(weights_key, key, data) + data


def decode(weights_key: str, key: Any, blob: Any) -> FloatArray | None:
    """Return the value, or ``None`` if its bytes are not what was stored."""
    if not isinstance(blob, bytes) or not isinstance(key, bytes):
        return None  # a bit that says of which type a value is
    if len(blob) < _CHECKSUM_BYTES or (len(blob) - _CHECKSUM_BYTES) % _FLOAT.itemsize:
        return None
    data = blob[_CHECKSUM_BYTES:]
    if _checksum(weights_key, key, data) != blob[:_CHECKSUM_BYTES]:
        return None
    return np.frombuffer(data, dtype=_FLOAT)


def as_floats(key: bytes, value: npt.ArrayLike) -> FloatArray:
    """Return a value as contiguous little-endian float32, shape ``(num_scored,)``."""
    array = np.ascontiguousarray(value, dtype=_FLOAT)
    if np.ndim(value) != 1:
        raise DataError(
            "Log-probs of a sequence have to be one-dimensional", where=key.hex(), value=np.shape(value), allowed="(n,)"
        )
    return array


def finite(values: dict[bytes, FloatArray]) -> dict[bytes, FloatArray]:
    """Return the values without those that hold a NaN or an infinity."""
    if not values or np.isfinite(np.concatenate(list(values.values()))).all():
        return values
    return {key: value for key, value in values.items() if np.isfinite(value).all()}
