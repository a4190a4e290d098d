"""Checkpoints in an output folder: taking their names in one step, being found again, making room."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from preftune.files import sync_folder
from preftune.training.checkpoints.files import MODEL_STAGING
from preftune.training.checkpoints.manifest import InvalidCheckpoint, Manifest, verify

_NAME = re.compile(r"^checkpoint-(\d+)$")
_SAVING, _REPLACED, _DELETING = ".saving-", ".replaced-", ".deleting-"


@dataclass
class Found:
    """Outcome of a search.

    Attributes:
        manifest: The checkpoint to go on from, or ``None``.
        skipped: What was passed over, newest first: name and reason.
    """

    manifest: Manifest | None = None
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def describe_skipped(self) -> str:
        """What was passed over and why, as one line."""
        return "; ".join(f"{name} is not used: {reason}" for name, reason in self.skipped)


def staging_folder(output_dir: Path, step: int) -> Path:
    """Where a checkpoint is written before it takes its name."""
    return output_dir / f"{_SAVING}checkpoint-{step}"


def publish(staging: Path, final: Path) -> None:
    """Give a finished checkpoint its name in one step.

    A folder that has the name already, from before a resume, is moved away first and deleted last; a crash in between
    leaves both, and :func:`recover` puts things right.
    """
    old = final.with_name(_REPLACED + final.name)
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.rename(final, old)
    os.rename(staging, final)
    sync_folder(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def recover(output_dir: Path) -> None:
    """Tidy up after a crash: unfinished checkpoints go, a replaced one whose successor never came takes its place."""
    for path in _entries(output_dir):
        if path.name.startswith(_REPLACED):
            final = path.with_name(path.name.removeprefix(_REPLACED))
            if not final.exists():
                # Another process of the same run may be doing the same.
                with suppress(OSError):
                    os.rename(path, final)
                continue
            shutil.rmtree(path, ignore_errors=True)
        elif path.name.startswith((f"{_SAVING}checkpoint-", _DELETING)) or path.name == MODEL_STAGING:
            shutil.rmtree(path, ignore_errors=True)


def list_checkpoints(output_dir: Path) -> list[tuple[int, Path]]:
    """Folders named like checkpoints, valid or not, by ascending step."""
    named = [(match, path) for path in _entries(output_dir) if (match := _NAME.match(path.name)) and path.is_dir()]
    return sorted((int(match.group(1)), path) for match, path in named)


def find_checkpoint(output_dir: Path) -> Found:
    """The newest checkpoint that is whole and that training can go on from.

    Every file is compared with the manifest. Torn, damaged and foreign folders are passed over, never deleted.
    """
    recover(output_dir)
    found = Found()
    for _, path in reversed(list_checkpoints(output_dir)):
        try:
            manifest = verify(path)
        except InvalidCheckpoint as error:
            found.skipped.append((path.name, str(error)))
            continue
        if manifest.resumable:
            found.manifest = manifest
            break
        found.skipped.append((path.name, "it holds the weights alone (save_only_model)"))
    return found


def rotate(output_dir: Path, limit: int | None, protected: Iterable[Path], whole: Callable[[Path], bool]) -> list[Path]:
    """Delete the oldest valid checkpoints beyond ``limit``. Returns what was deleted.

    The newest valid one and the protected ones stay. What is not valid does not count and is left alone, so that
    damaged or foreign folders never push out a good one.

    Args:
        output_dir: Folder of the run.
        limit: How many to keep; ``None`` or less than one for all.
        protected: Checkpoints that must not go, such as the best one.
        whole: Tells whether a folder is a valid checkpoint.
    """
    if limit is None or limit < 1:
        return []
    valid = [path for _, path in list_checkpoints(output_dir) if whole(path)]
    keep = {path.absolute() for path in (*protected, *valid[-1:])}
    excess = len(valid) - max(limit, len(keep & {path.absolute() for path in valid}))
    gone = [path for path in valid if path.absolute() not in keep][: max(excess, 0)]
    for path in gone:
        remove_checkpoint(path)
    return gone


def remove_checkpoint(path: Path) -> None:
    """Delete a checkpoint; it loses its name first, so that a crash never leaves half of one under it."""
    aside = path.with_name(_DELETING + path.name)
    shutil.rmtree(aside, ignore_errors=True)
    with suppress(OSError):
        os.rename(path, aside)
        shutil.rmtree(aside, ignore_errors=True)


def is_whole(path: Path) -> bool:
    """Whether a folder's manifest is intact and all files are there in their size."""
    try:
        verify(path, deep=False)
    except InvalidCheckpoint:
        return False
    return True


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []
