"""Tokenised data on disk: rows that were prepared once are read, not tokenised again.

A file is named after everything that its content follows from: the rows, the tokenizer, the options, the code of this
package and the versions of the libraries that tokenise. Another tokenizer, template, length or row is another file, so
that no stale one is ever found. Files are written whole or not at all, and read as they lie on the disk.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from datetime import date
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from preftune.config.paths import cache_home, private_folder
from preftune.data.arrow import in_few_pieces
from preftune.data.options import DataOptions
from preftune.files import replacing

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

logger = logging.getLogger(__name__)

#: Below this number of rows, tokenising takes less time than finding out what was tokenised before.
MIN_ROWS = 2000
#: All files together, in bytes; those unused for longest go first.
MOST_BYTES = 20 * 10**9
#: Files unused for this many seconds go whenever one is written.
LONGEST_UNUSED = 30 * 86400
#: A file that has been written for so many seconds will not be finished.
LONGEST_WRITING = 86400
#: How files are called, and files that are being written, with their locks.
_NAME, _WRITING = re.compile(r"[0-9a-f]{40}\.arrow"), re.compile(r"\.[0-9a-f]{40}\.arrow\.([0-9a-f]{32}\.tmp|lock)")
#: Options that change how long preparing takes, or whether it goes on, but no token.
_WITHOUT_TOKENS: dict[str, Any] = {"num_proc": None, "worker_timeout": 0.0, "max_dropped_share": None, "warn": False}
#: What a tokenizer notes down while it is used.
_NOTES = ("_tokenizer", "deprecation_warnings")
_LIBRARIES = ("tokenizers", "transformers", "jinja2", "datasets")


def folder(home: Path | None = None) -> Path:
    """Where the files lie below the cache home."""
    return (home or cache_home()) / "tokens"


def files(home: Path | None = None) -> list[Path]:
    """The files, those unused for longest first."""
    found = []
    for path in folder(home).glob("*.arrow"):
        if not _NAME.fullmatch(path.name):
            # Somebody else's: the cache may have been pointed at a folder of data.
            continue
        with suppress(OSError):
            found.append((path.stat().st_mtime, path))
    return [path for _, path in sorted(found)]


def remembered(dataset: Dataset, worker: Any, options: DataOptions, compute: Callable[[], pa.Table]) -> pa.Table:
    """The outcomes of a worker on all rows, from the disk where they are known.

    Args:
        dataset: Rows.
        worker: What prepares them; its attributes say how, its ``encoder`` with which tokenizer.
        options: Data options.
        compute: Prepares the rows.

    Returns:
        What ``compute`` returns, now or earlier. Outcomes with bad rows are not kept: those are told and set aside
        again each time.
    """
    if not options.data_cache or len(dataset) < MIN_ROWS or not hasattr(worker, "encoder"):
        return compute()
    try:
        path = folder() / f"{_key(dataset, worker)}.arrow"
    except Exception as error:  # whatever a foreign tokenizer may raise while it is looked at
        logger.warning("tokenised data are not kept: %s", error)
        return compute()
    try:
        # They say as much as the data themselves; and what others could put there would be trained on.
        private_folder(path.parent)
    except OSError as error:
        logger.warning("tokenised data are not kept: %s", error)
        return compute()
    table = _read(path, len(dataset))
    if table is None:
        with _one_at_a_time(path):
            table = _read(path, len(dataset))
            if table is None:
                table = compute()
                if not any(table["_bad"].unique().to_pylist()):
                    _write(path, table)
    return table


@contextmanager
def _one_at_a_time(path: Path) -> Iterator[None]:
    """Wait for another process that prepares the same; those that have waited are not kept waiting for each other.

    The processes of a training start together, and one of a machine is enough.
    """
    from filelock import FileLock, Timeout

    file = path.with_name(f".{path.name}.lock")
    lock = FileLock(file)
    with ExitStack() as held:
        try:
            lock.acquire(timeout=0)
            held.callback(lock.release)
            # Who comes between the two lines prepares for itself, which costs time alone.
            held.callback(_remove, [file])
        except Timeout:
            with lock:
                _remove([file])
        except (OSError, NotImplementedError):
            # A file system without locks: each prepares for itself.
            pass
        yield


def clear(home: Path | None = None, older_than: float | None = None) -> tuple[int, int]:
    """Remove files.

    Args:
        home: The cache home, if another.
        older_than: Only those unused for this many seconds.

    Returns:
        How many, and their bytes.
    """
    before = time.time() - (older_than or 0.0)
    return _remove([path for path in files(home) if older_than is None or _used(path) < before])


def num_bytes(home: Path | None = None) -> int:
    """Bytes of all files."""
    return sum(map(_size, files(home)))


def _read(path: Path, num_rows: int) -> pa.Table | None:
    import pyarrow as pa

    try:
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    except (OSError, pa.ArrowInvalid):
        return None
    if table.num_rows != num_rows:
        return None
    with suppress(OSError):
        os.utime(path)
    return table


def _write(path: Path, table: pa.Table) -> None:
    import pyarrow as pa

    try:
        with (
            replacing(path) as beside,
            pa.OSFile(str(beside), "wb") as sink,
            pa.ipc.new_file(sink, table.schema) as writer,
        ):
            # In one piece, which is later used as it lies there.
            writer.write_table(in_few_pieces(table))
        _tidy(path)
    except OSError as error:
        logger.warning("tokenised data are not kept: %s", error)


def _tidy(newest: Path) -> None:
    """Keep the files that are in use, within :data:`MOST_BYTES`."""
    others = [path for path in files() if path != newest]
    stale = [path for path in others if _used(path) < time.time() - LONGEST_UNUSED]
    # What a killed process was writing.
    writing = [path for path in newest.parent.glob(".*") if _WRITING.fullmatch(path.name)]
    stale += [path for path in writing if _used(path) < time.time() - LONGEST_WRITING]
    kept = [path for path in others if path not in stale]
    total = sum(map(_size, [newest, *kept]))
    while kept and total > MOST_BYTES:
        total -= _size(kept[0])
        stale.append(kept.pop(0))
    _remove(stale)


def _remove(paths: list[Path]) -> tuple[int, int]:
    count = total = 0
    for path in paths:
        with suppress(OSError):  # another process was faster
            size = path.stat().st_size
            path.unlink()
            count, total = count + 1, total + size
    return count, total


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _used(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return time.time()


# ---- what a file is named after -------------------------------------------------------------------------------------


def _key(dataset: Dataset, worker: Any) -> str:
    state = dict(vars(worker))
    encoder = state.pop("encoder")
    template = encoder.chat_template or getattr(encoder.tokenizer, "chat_template", None)
    if isinstance(state.get("options"), DataOptions):
        state["options"] = repr(replace(state["options"], **_WITHOUT_TOKENS))
    facts = {
        "worker": type(worker).__qualname__,
        "state": {name: repr(value) for name, value in sorted(state.items())},
        "template": encoder.chat_template,
        "tokenizer": _tokenizer_key(encoder.tokenizer),
        # Templates may write the date.
        "date": str(date.today()) if "strftime_now" in json.dumps(template) else None,
        "code": _code_key(),
        "versions": {name: metadata.version(name) for name in _LIBRARIES},
    }
    digest = hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=20)
    _add_rows(digest, dataset)
    return digest.hexdigest()


def _tokenizer_key(tokenizer: Any) -> str:
    """Digest of a tokenizer's content, whatever it noted down in earlier calls."""
    from datasets.fingerprint import Hasher

    backend, content = getattr(tokenizer, "_tokenizer", None), ""
    if backend is not None:
        parts = json.loads(backend.to_str())
        # Set anew by every call.
        parts.pop("truncation", None)
        parts.pop("padding", None)
        content = hashlib.blake2b(json.dumps(parts).encode(), digest_size=20).hexdigest()
    state = {name: value for name, value in vars(tokenizer).items() if name not in _NOTES}
    return f"{type(tokenizer).__module__}.{type(tokenizer).__qualname__} {content} {Hasher.hash(state)}"


@cache
def _code_key() -> str:
    """Digest of this package's source: what prepares the rows may change between two versions."""
    digest = hashlib.blake2b(digest_size=20)
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _add_rows(digest: Any, dataset: Dataset) -> None:
    import pyarrow as pa

    class Sink:
        closed = False

        def write(self, data: Any) -> int:
            digest.update(data)
            return len(data)

        def flush(self) -> None:
            pass

    digest.update(str(dataset.features).encode())
    for table in (dataset.data, dataset._indices):
        if table is not None:
            # Writing cuts slices of larger tables to what they show.
            with pa.ipc.new_stream(pa.PythonFile(Sink(), mode="w"), table.table.schema) as writer:
                writer.write_table(table.table)
