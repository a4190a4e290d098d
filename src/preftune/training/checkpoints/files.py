"""Many files at once, the old ones or the new ones whole, and what the system says when it cannot be done."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from preftune.errors import SetupError
from preftune.files import system_error, write_text


def write_json(path: Path, value: Any) -> None:
    """Write JSON, see :func:`write_text`. Floats keep every bit; NaN and infinity have to be encoded before."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def files_below(folder: Path) -> list[Path]:
    """All files of a folder and its subfolders, in a fixed order; links are not followed."""
    found = [Path(root, name) for root, _, names in os.walk(folder) for name in names]
    return sorted(path for path in found if not path.is_symlink())


def is_write_failure(error: BaseException) -> bool:
    """Whether an exception is a disk that is full, read-only or broken, rather than a defect."""
    # torch's own writer serves the sharded formats alone.
    torchs = isinstance(error, RuntimeError) and "inline_container" in str(error)
    return torchs or system_error(error) is not None


def reason_of(error: BaseException) -> str:
    """What went wrong and with which file, in a few words."""
    if isinstance(error, OSError):
        what = error.strerror or str(error)
        return f"{what}: {error.filename}" if error.filename else what
    return " ".join(str(error).split())


@contextmanager
def plain_failures(where: str) -> Iterator[None]:
    """Turn a failed write into one line that names the file and says what to do."""
    try:
        yield
    except Exception as error:
        if not is_write_failure(error) or isinstance(error, SetupError):
            raise
        raise SetupError(
            f"cannot write ({reason_of(error)})", where=where, remedy="free some space, or set another output_dir"
        ) from error
