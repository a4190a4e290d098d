"""The file of rows that were set aside: begun anew by every run, and never anything but its own lines.

Every line ends with a digest of itself, so that a file that somebody else wrote, or has edited, is told from one that
may be replaced.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from preftune.errors import ConfigError

_LINE = re.compile(rb"(\{.*), \"sha256\": \"([0-9a-f]{16})\"\}\n", re.DOTALL)


def line(entry: Mapping[str, Any]) -> str:
    """One line of the file. ASCII-safe JSON: bad text must not make the file itself unreadable."""
    text = json.dumps(entry, ensure_ascii=True, default=repr)
    return f'{text[:-1]}, "sha256": "{_digest(text.encode())}"}}\n'


def is_own(path: str) -> bool:
    """Whether every line of a file was written by :func:`line`; of an empty file that is true."""
    try:
        with open(path, "rb") as file:
            return all(_fits(each) for each in file)
    except OSError:
        return False


def begin(path: str) -> None:
    """Begin the file anew.

    Raises:
        ConfigError: There is one that is not made of lines of this kind alone.
    """
    if os.path.lexists(path):
        _require_own(path)
        if os.path.exists(path):
            os.remove(os.path.realpath(path))


def append(path: str, lines: Sequence[str]) -> None:
    """Append lines in one write.

    Raises:
        ConfigError: The file is not made of lines of this kind alone.
        OSError: It cannot be written.
    """
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    if os.path.lexists(path):
        _require_own(path)
    with open(path, "ab", buffering=0) as file:
        file.write("".join(lines).encode())


def _require_own(path: str) -> None:
    # A link to nothing is as good as no file.
    if os.path.exists(path) and not (os.path.isfile(path) and is_own(path)):
        raise ConfigError(
            "the file was not written as a quarantine file, or has been changed since",
            where="quarantine_path",
            value=path,
            remedy="move it, or set another quarantine_path",
        )


def _fits(text: bytes) -> bool:
    found = _LINE.fullmatch(text)
    return found is not None and _digest(found[1] + b"}") == found[2].decode()


def _digest(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()[:16]
