"""What a checkpoint consists of, written last: a folder without a valid manifest is no checkpoint."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preftune.files import parse_json, sync_file, sync_folder, write_text
from preftune.training.checkpoints.files import files_below

FILE_NAME = "manifest.json"
FORMAT = 1
_CHUNK = 1 << 22
#: Formats that run code or need pickle to be read.
_PICKLED = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
# Files that were read through once need not be read again as long as neither size nor time of change differ.
_READ_THROUGH: set[tuple[tuple[str, int, int, int], ...]] = set()


class InvalidCheckpoint(Exception):
    """A folder that must not be used as a checkpoint; the text says why."""


@dataclass(frozen=True)
class Manifest:
    """A checkpoint's own description.

    Attributes:
        folder: Where it is.
        step: Optimizer steps done.
        resumable: Whether it holds everything that training needs to go on; weights alone are not enough.
        identity: What the run was: settings, data, reference; see :mod:`preftune.training.checkpoints.identity`.
        num_bytes: Size of all files.
        body: The whole document.
    """

    folder: Path
    step: int
    resumable: bool
    identity: dict[str, Any]
    num_bytes: int
    body: dict[str, Any]


def canonical(value: Any) -> str:
    """One text per content."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(value: Any) -> str:
    """SHA-256 of a JSON value's content."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            found.update(chunk)
    return found.hexdigest()


def seal(folder: Path, body: Mapping[str, Any]) -> None:
    """Wait until all files are on the disk, then write the manifest over them.

    Args:
        folder: The checkpoint, complete but for its manifest.
        body: ``step``, ``resumable``, ``identity`` and whatever else describes it.

    Raises:
        OSError: If the disk cannot take it.
    """
    paths = [path for path in files_below(folder) if path != folder / FILE_NAME]

    def settle(path: Path) -> str:
        sync_file(path)
        return file_digest(path)

    # Hashing releases the interpreter lock. A single file is not worth a thread.
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        big = any(path.stat().st_size > _CHUNK for path in paths)
        digests = list(pool.map(settle, paths)) if big else [settle(path) for path in paths]
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": found}
        for path, found in zip(paths, digests, strict=True)
    }
    document = {"format": FORMAT, **body, "files": files}
    write_text(
        folder / FILE_NAME,
        json.dumps({**document, "sha256": digest(document)}, indent=1, allow_nan=False) + "\n",
    )
    for root, _, _ in os.walk(folder, topdown=False):
        sync_folder(Path(root))


def verify(folder: Path, *, deep: bool = True) -> Manifest:
    """Read a checkpoint's manifest and compare the files with it.

    Args:
        folder: The checkpoint.
        deep: Compare contents too, not only names and sizes.

    Raises:
        InvalidCheckpoint: With the reason.
    """
    document = _read(folder)
    files: dict[str, dict[str, Any]] = document["files"]
    _refuse_links(folder)
    for name, entry in files.items():
        path = folder / name
        try:
            size = path.stat().st_size
        except OSError as error:
            raise InvalidCheckpoint(f"{name} is missing") from error
        if size != entry["bytes"]:
            raise InvalidCheckpoint(f"{name} has {size} bytes, {entry['bytes']} were written")
    if deep:
        _compare_contents(folder, files)
    if not document.get("sharded"):
        strange = [p.name for p in files_below(folder) if p.suffix in _PICKLED]
        if strange:
            raise InvalidCheckpoint(f"{strange[0]} is pickled, which preftune neither writes nor reads")
    return Manifest(
        folder=folder,
        step=document["step"],
        resumable=bool(document["resumable"]),
        identity=document["identity"],
        num_bytes=sum(entry["bytes"] for entry in files.values()),
        body=document,
    )


def _read(folder: Path) -> dict[str, Any]:
    path = folder / FILE_NAME
    if not path.is_file():
        raise InvalidCheckpoint(f"no {FILE_NAME}: it was not finished, or not written by preftune")
    try:
        document = parse_json(path.read_text(encoding="utf-8"))
        found = document.pop("sha256")
        if document["format"] != FORMAT:
            raise InvalidCheckpoint(f"{FILE_NAME} has format {document['format']}, this version reads {FORMAT}")
        if digest(document) != found or not _is_whole(document):
            raise InvalidCheckpoint(f"{FILE_NAME} is damaged")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidCheckpoint(f"{FILE_NAME} is damaged") from error
    assert isinstance(document, dict)
    return document


def _is_whole(document: Mapping[str, Any]) -> bool:
    """Whether every part has its type: a digest that fits says only that somebody could compute it."""
    parts = (("step", int), ("resumable", bool), ("identity", dict), ("files", dict))
    return all(type(document.get(name)) is kind for name, kind in parts) and all(
        _inside(name) and isinstance(entry, dict) and type(entry.get("bytes")) is int
        for name, entry in document["files"].items()
    )


def _inside(name: str) -> bool:
    return bool(name) and "\0" not in name and not os.path.isabs(name) and ".." not in Path(name).parts


def _refuse_links(folder: Path) -> None:
    """A link, even one of a whole subfolder, would have files read that are no part of the checkpoint."""
    for root, inside, names in os.walk(folder):
        for name in (*inside, *names):
            path = Path(root, name)
            if path.is_symlink():
                raise InvalidCheckpoint(f"{path.relative_to(folder)} is a link, which preftune does not write")


def _compare_contents(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    names = sorted(files)
    stats = [(folder / name).stat() for name in names]
    mark = tuple(
        (str((folder / name).absolute()), s.st_ino, s.st_size, s.st_mtime_ns)
        for name, s in zip(names, stats, strict=True)
    )
    if mark in _READ_THROUGH:
        return
    for name in names:
        try:
            found = file_digest(folder / name)
        except OSError as error:
            raise InvalidCheckpoint(f"{name} cannot be read ({error.strerror})") from error
        if found != files[name]["sha256"]:
            raise InvalidCheckpoint(f"the content of {name} is not what was written")
    _READ_THROUGH.add(mark)
