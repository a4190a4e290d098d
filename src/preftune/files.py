"""Writing files so that a crash, a full disk or a reader at the wrong moment finds the old content or the new one."""

from __future__ import annotations

import json
import math
import os
import re
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

#: Levels of nesting in a file that somebody else may have written: what walks through its values calls itself once for
#: each, and Python allows no more than a thousand calls.
DEEPEST = 64


def parse_json(text: str | bytes) -> Any:
    """A JSON value out of a file that somebody else may have written.

    Raises:
        ValueError: It is not JSON, or nested more than :data:`DEEPEST` deep.
    """
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deep") from error
    brackets = ("[", "{") if isinstance(text, str) else (b"[", b"{")
    if sum(map(text.count, brackets)) > DEEPEST:  # type: ignore[arg-type]
        level = [value]
        for _ in range(DEEPEST + 1):
            level = [
                inner
                for outer in level
                if isinstance(outer, (dict, list))
                for inner in (outer.values() if isinstance(outer, dict) else outer)
            ]
        if level:
            raise ValueError(f"nested more than {DEEPEST} deep")
    return value


def sync_file(path: Path) -> None:
    """Wait until a file's content is on the disk.

    Raises:
        OSError: With the file's name, also where the system leaves it out.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
    finally:
        os.close(handle)


def sync_folder(path: Path) -> None:
    """Wait until a folder's entries are on the disk; a file system that cannot do it for folders is not an error."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:
        return
    try:
        with suppress(OSError):
            os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a file to write beside ``path``, which takes its place in one step when the block ends well.

    The name beside is nobody else's, so that several processes may replace the same file. A missing folder is
    made.

    Raises:
        OSError: It cannot be written; ``path`` is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield beside
        sync_file(beside)
        os.replace(beside, path)
    except BaseException:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def replace_text(path: Path, text: str) -> None:
    """Put ``text`` in the place of a file in one step.

    Texts of models and files may hold halves of surrogate pairs, which UTF-8 cannot express: they become "?".

    Raises:
        OSError: It cannot be written; the file is as it was.
    """
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8", errors="replace")


def write_text(path: Path, text: str) -> None:
    """Write a file that gets its final name later, and wait until it is on the disk.

    Raises:
        OSError: With the file's name, also where the system leaves it out.
    """
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
    sync_file(path)


def finite(value: Any) -> Any:
    """The value as JSON takes it: ``None`` for NaN and infinities, lists for tuples, texts as keys."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(entry) for entry in value]
    # NumPy's numbers are no numbers to json.
    return finite(value.item()) if getattr(value, "ndim", None) == 0 else value


def write_json(path: Path, document: Any, *, indent: int = 2) -> None:
    """Put a JSON document in the place of a file in one step; numbers that are not finite become ``null``.

    Raises:
        OSError: It cannot be written; the file is as it was.
    """
    replace_text(path, json_text(document, indent=indent))


def json_text(document: Any, *, indent: int = 2) -> str:
    """A JSON document as :func:`write_json` writes it."""
    return json.dumps(finite(document), indent=indent, ensure_ascii=False, allow_nan=False) + "\n"


def stop_file(token: str) -> str:
    """Name of the file in its output folder that asks one run to stop.

    Args:
        token: What the run made up when it began, and wrote into its log: no other run, and no other program, answers
            to it.
    """
    return f".stop-{token}"


def system_error(error: BaseException) -> OSError | None:
    """The system's error behind an exception: itself, or what native code reports as text, ``... (os error 28)``."""
    if isinstance(error, OSError):
        return error
    found = re.search(r"\(os error (\d+)\)", str(error))
    return None if found is None else OSError(int(found[1]), os.strerror(int(found[1])))
