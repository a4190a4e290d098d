"""The record of a run: which files and folders it has written into a folder, and with what content."""

from __future__ import annotations

import hashlib
import json
import os
import re
import uuid
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from preftune.files import parse_json, replace_text

#: Folder inside a folder that runs write into: what they remember, and what is not finished yet.
HOME = ".preftune"
FILE_NAME = "record.json"
FORMAT = 1
_CHUNK = 1 << 22
_ID = re.compile(r"[0-9a-z][0-9a-z-]{0,63}\Z")


@dataclass(frozen=True)
class Entry:
    """Content of a file as it was written.

    Attributes:
        bytes: Size.
        sha256: Digest.
        mtime_ns: Time of the last change; a file of the same size and time is not read again.
    """

    bytes: int
    sha256: str
    mtime_ns: int

    def fits(self, path: Path) -> bool:
        """Whether the file is still as it was written. Links never are."""
        try:
            found = path.lstat()
            if not _is_file(found) or found.st_size != self.bytes:
                return False
            return found.st_mtime_ns == self.mtime_ns or digest_of(path) == self.sha256
        except OSError:
            return False


def digest_of(path: Path) -> str:
    """SHA-256 of a file."""
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            found.update(chunk)
    return found.hexdigest()


def entry_of(path: Path, sha256: str | None = None) -> Entry:
    """The entry of a file.

    Args:
        path: The file.
        sha256: Its digest where it is known.
    """
    found = path.stat()
    return Entry(found.st_size, digest_of(path) if sha256 is None else sha256, found.st_mtime_ns)


def entries_of(folder: Path, paths: Iterable[Path]) -> dict[str, Entry]:
    """Entries of several files by their name below ``folder``."""
    several = list(paths)
    # Hashing releases the interpreter lock.
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        found = list(pool.map(entry_of, several)) if len(several) > 1 else [entry_of(path) for path in several]
    return {path.relative_to(folder).as_posix(): entry for path, entry in zip(several, found, strict=True)}


def new_id() -> str:
    """A random id for a run."""
    return uuid.uuid4().hex


@dataclass
class Record:
    """What one run has written into one folder.

    Attributes:
        run: The run's id.
        turn: Ascends from run to run in a folder; the highest is the run that wrote last.
        files: By name the contents that the run gave a file: the last one, and the one before in case that a crash
            kept the last one from taking its place.
        grown: By name the beginning of files that the run appends to.
        folders: By name the files of folders that were published as a whole.
        going: Folders that are being removed.
    """

    run: str
    turn: int = 0
    files: dict[str, list[Entry]] = field(default_factory=dict)
    grown: dict[str, Entry] = field(default_factory=dict)
    folders: dict[str, dict[str, Entry]] = field(default_factory=dict)
    going: dict[str, dict[str, Entry]] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Write the record into its place in ``folder``, in one step.

        Raises:
            OSError: It cannot be written.
        """
        document = {"format": FORMAT, **asdict(self)}
        text = json.dumps({**document, "sha256": _digest(document)}, indent=1)
        replace_text(folder / HOME / self.run / FILE_NAME, text + "\n")

    @classmethod
    def parse(cls, text: str) -> Record:
        """Read a record.

        Raises:
            ValueError: It is none, or damaged.
        """
        try:
            document = parse_json(text)
            found = document.pop("sha256")
            if document["format"] != FORMAT or _digest(document) != found:
                raise ValueError("damaged")
            record = cls(
                run=document["run"],
                turn=int(document["turn"]),
                files={name: [_entry(entry) for entry in each] for name, each in document["files"].items()},
                grown=_entries(document["grown"]),
                folders={name: _entries(each) for name, each in document["folders"].items()},
                going={name: _entries(each) for name, each in document["going"].items()},
            )
        except (KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
            raise ValueError("damaged") from error
        names = [*record.files, *record.grown, *record.folders, *record.going]
        names += [name for each in (*record.folders.values(), *record.going.values()) for name in each]
        if not _ID.match(record.run) or not all(map(_is_inside, names)):
            raise ValueError("damaged")
        return record


def read_record(folder: Path, run: str) -> Record | None:
    """The record of one run in a folder, or ``None``."""
    try:
        record = Record.parse((folder / HOME / run / FILE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if record.run == run else None


def read_records(folder: Path) -> list[Record]:
    """The records of all runs in a folder, the last one last."""
    try:
        names = sorted(os.listdir(folder / HOME))
    except OSError:
        return []
    found = [read_record(folder, name) for name in names if _ID.match(name)]
    return sorted((record for record in found if record is not None), key=lambda record: record.turn)


def current(folder: Path) -> Record | None:
    """The record of the training run that wrote into a folder last; verbs that keep a record have no random id."""
    runs = [record for record in read_records(folder) if len(record.run) == 32]
    return runs[-1] if runs else None


def _entries(given: Mapping[str, Mapping[str, Any]]) -> dict[str, Entry]:
    return {name: _entry(entry) for name, entry in given.items()}


def _entry(given: Mapping[str, Any]) -> Entry:
    found = Entry(**given)
    # A digest that fits says only that somebody could compute it.
    if (type(found.bytes), type(found.sha256), type(found.mtime_ns)) != (int, str, int) or found.bytes < 0:
        raise ValueError("damaged")
    return found


def _digest(document: Any) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _is_inside(name: str) -> bool:
    parts = Path(name).parts
    return bool(parts) and "\0" not in name and not os.path.isabs(name) and ".." not in parts and parts[0] != HOME


def _is_file(found: os.stat_result) -> bool:
    import stat

    return stat.S_ISREG(found.st_mode)
