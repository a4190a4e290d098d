"""Files and folders by name: free names, what is in a folder, moving out of the way."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from preftune.ownership.record import Entry


def move_aside(path: Path, into: Path) -> Path | None:
    """Move a file or folder, whatever it holds, into a folder under a name that nothing has. ``None`` if there is none.

    Raises:
        OSError: It cannot be moved.
    """
    if not os.path.lexists(path):
        return None
    into.mkdir(parents=True, exist_ok=True)
    target = free_name(into, path.name)
    os.rename(path, target)
    return target


def free_name(folder: Path, stem: str) -> Path:
    """The first of ``stem-1``, ``stem-2``, ... that nothing has as its name."""
    number = 1
    while os.path.lexists(folder / f"{stem}-{number}"):
        number += 1
    return folder / f"{stem}-{number}"


def files_of(folder: Path) -> list[Path]:
    """All files below a folder but links, in order."""
    found = [Path(root, name) for root, _, names in os.walk(folder) for name in names]
    return sorted(path for path in found if not path.is_symlink())


def others_in(folder: Path, known: Iterable[str]) -> list[str]:
    """What is in a folder beside the known files and the folders on the way to them."""
    allowed = set(known)
    parents = {parent.as_posix() for name in allowed for parent in Path(name).parents}
    found = []
    for root, inside, names in os.walk(folder):
        for name in (*inside, *names):
            path = Path(root, name)
            relative = path.relative_to(folder).as_posix()
            if relative not in allowed and (relative not in parents or path.is_symlink()):
                found.append(relative)
    return found


def begins_with(path: Path, head: Entry) -> bool:
    """Whether a file, which is no link, begins with the recorded content."""
    try:
        if path.is_symlink() or not path.is_file():
            return False
        with open(path, "rb") as file:
            return hashlib.sha256(file.read(head.bytes)).hexdigest() == head.sha256
    except OSError:
        return False
