"""Reads files that another program may still be writing, or may have left half-written.

A report must come out of what is there. Whatever cannot be read becomes a note that the page shows, never an error.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from preftune.errors import flat
from preftune.files import finite, parse_json

#: Larger files are no result files of ours; reading one would only fill the memory.
MAX_BYTES = 512 * 1024 * 1024


class Notes(list[str]):
    """What could not be read, one sentence each."""

    def add(self, where: Path, why: str) -> None:
        """Note that a file was left out.

        Args:
            where: The file.
            why: The reason, as a short phrase.
        """
        self.append(f"{where.name} was left out: {why}")


def read_object(path: Path, notes: Notes) -> dict[str, Any] | None:
    """A JSON object, or ``None`` where there is none.

    Args:
        path: The file.
        notes: Takes the reason where the file exists but is not what it should be.

    Returns:
        The object, with numbers that are not finite replaced by ``None``.
    """
    text = read_text(path, notes)
    if text is None:
        return None
    try:
        content = parse_json(text)
    except ValueError as error:
        notes.add(path, f"it is not valid JSON ({flat(error)[:120]})")
        return None
    if not isinstance(content, dict):
        notes.add(path, "it holds no JSON object")
        return None
    result: dict[str, Any] = finite(content)
    return result


def read_lines(path: Path, notes: Notes) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file; lines that are none are counted in a note.

    A last line without its line feed is being written at this moment and is left for the next reading.

    Args:
        path: The file.
        notes: Takes the number of damaged lines.

    Returns:
        The objects in their order; empty where there is no file.
    """
    text = read_text(path, notes)
    if text is None:
        return []
    found: list[dict[str, Any]] = []
    damaged = []
    lines = text.split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = parse_json(line)
        except ValueError:
            entry = None
        if isinstance(entry, dict):
            found.append(finite(entry))
        elif number < len(lines):
            damaged.append(number)
    if damaged:
        which = ", ".join(map(str, damaged[:5])) + (", ..." if len(damaged) > 5 else "")
        notes.append(f"{path.name}: {len(damaged)} damaged line(s) left out (line {which})")
    return found


def number(value: Any) -> float | None:
    """The value as a finite float, or ``None`` where it is no number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        as_float = float(value)
    except OverflowError:
        return None
    return as_float if math.isfinite(as_float) else None


def objects(value: Any) -> list[dict[str, Any]]:
    """The mappings of a list; empty where the value is no list."""
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []


def strings(value: Any) -> list[str]:
    """The texts of a list; empty where the value is no list."""
    return [entry for entry in value if isinstance(entry, str)] if isinstance(value, list) else []


def mapping(value: Any) -> dict[str, Any]:
    """The value where it is a mapping, else an empty one."""
    return value if isinstance(value, dict) else {}


def leads_out(path: Path) -> bool:
    """Whether a file is a link to one outside of its folder: a report may be passed on, other files may not."""
    return path.is_symlink() and not path.resolve().is_relative_to(path.parent.resolve())


def read_text(path: Path, notes: Notes) -> str | None:
    """The text of a file, or ``None`` where there is none; what is no file of text is left out.

    Args:
        path: The file.
        notes: Takes the reason where it exists and is left out.
    """
    try:
        if not path.is_file():
            return None
        if leads_out(path):
            notes.add(path, "it is a link that leads out of its folder")
            return None
        if path.stat().st_size > MAX_BYTES:
            notes.add(path, f"it is larger than {MAX_BYTES // 1024**2} MiB")
            return None
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        notes.add(path, f"it cannot be read ({error.strerror or flat(error)[:120]})")
        return None
