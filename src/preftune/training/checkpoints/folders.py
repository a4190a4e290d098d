"""Checkpoints in an output folder: taking their names in one step, being found again, making room.

What belongs to a run is told by the run's record, see :mod:`preftune.ownership`, and by the run's id in a checkpoint's
manifest; a name tells nothing.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from preftune.ownership import Entry, RunFolder, current, holding
from preftune.ownership.record import entry_of
from preftune.training.checkpoints.manifest import FILE_NAME, InvalidCheckpoint, Manifest, verify

_NAME = re.compile(r"^checkpoint-(\d+)$")


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


def staging_folder(run: RunFolder, step: int) -> Path:
    """Where a checkpoint is written before it takes its name."""
    return run.staging / f"checkpoint-{step}"


def publish(run: RunFolder, staging: Path, step: int) -> Path:
    """Give a sealed checkpoint its name in one step; one of this run that has it already is replaced.

    Returns:
        The checkpoint.

    Raises:
        ForeignFile: Something that is not this run's has the name.
        OSError: The disk cannot take it.
    """
    final = run.folder / f"checkpoint-{step}"
    adopt(run, final)
    run.put_folder(staging, final.name, files_of(verify(staging, deep=False)))
    return final


def files_of(manifest: Manifest) -> dict[str, Entry]:
    """The files of a checkpoint, for the record of its run."""
    folder = manifest.folder
    found = {
        name: Entry(entry["bytes"], entry["sha256"], (folder / name).stat().st_mtime_ns)
        for name, entry in manifest.body["files"].items()
    }
    return {**found, FILE_NAME: entry_of(folder / FILE_NAME)}


def adopt(run: RunFolder, path: Path) -> None:
    """Record a checkpoint whose own manifest says that it is this run's, where the record has been lost."""
    if path.name in run.record.folders or path.is_symlink():
        return
    try:
        manifest = verify(path)
    except InvalidCheckpoint:
        return
    if manifest.body.get("run") == run.record.run:
        run.adopt_folder(path.name, files_of(manifest))


def recover(output_dir: Path, *, tidy: bool = True) -> None:
    """Put right what a crash of the run has left that wrote into a folder last; only what it has recorded is touched.

    Args:
        output_dir: The folder.
        tidy: Remove what is unfinished, too; otherwise only a checkpoint that has lost its name gets it back.

    Raises:
        SetupError: Another process is writing into the folder.
    """
    record = current(output_dir)
    if record is None:
        return
    run = RunFolder(output_dir, record)
    if os.environ.get("RANK", "0") != "0":
        # Every process of a run looks for its checkpoint, and has to find the same; the first one holds the folder.
        run.restore()
        return
    with holding(output_dir):
        if tidy:
            run.recover()
        else:
            run.restore()


def list_checkpoints(output_dir: Path) -> list[tuple[int, Path]]:
    """Folders named like checkpoints, valid or not, by the step in their name."""
    named = [(match, path) for path in _entries(output_dir) if (match := _NAME.match(path.name)) and path.is_dir()]
    return sorted((int(match.group(1)), path) for match, path in named)


def find_checkpoint(output_dir: Path) -> Found:
    """The newest checkpoint that is whole, that training can go on from, and that is of the folder's last run.

    The step is what the manifest says. Every file is compared with the manifest. Torn, damaged and foreign folders are
    passed over, never deleted.
    """
    recover(output_dir, tidy=False)
    record = current(output_dir)
    found = Found()
    named = [(_step(path, step), path) for step, path in list_checkpoints(output_dir)]
    for _, path in sorted(named, reverse=True):
        try:
            manifest = verify(path)
        except InvalidCheckpoint as error:
            found.skipped.append((path.name, str(error)))
            continue
        if record is not None and manifest.body.get("run") != record.run:
            found.skipped.append((path.name, "it belongs to another run than the last one in this folder"))
            continue
        if manifest.resumable:
            found.manifest = manifest
            break
        found.skipped.append((path.name, "it holds the weights alone (save_only_model)"))
    return found


def _step(path: Path, otherwise: int) -> int:
    try:
        return verify(path, deep=False).step
    except InvalidCheckpoint:
        return otherwise


def rotate(run: RunFolder, limit: int | None, protected: Iterable[Path]) -> list[Path]:
    """Delete the run's oldest checkpoints beyond ``limit``. Returns what was deleted.

    The newest one and the protected ones stay. What is not this run's, or not whole, does not count and is left alone,
    so that damaged or foreign folders never push out a good one.

    Args:
        run: The run and its folder.
        limit: How many to keep; ``None`` or less than one for all.
        protected: Checkpoints that must not go, such as the best one.
    """
    if limit is None or limit < 1:
        return []
    valid = [path for _, path in list_checkpoints(run.folder) if path.name in run.record.folders and is_whole(path)]
    keep = {path.absolute() for path in (*protected, *valid[-1:])}
    excess = len(valid) - max(limit, len(keep & {path.absolute() for path in valid}))
    gone = [path for path in valid if path.absolute() not in keep][: max(excess, 0)]
    return [path for path in gone if run.remove_folder(path.name)]


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


def keep_only(run: RunFolder, name: str) -> None:
    """Remove all checkpoints of a run but one."""
    for each in list(run.record.folders):
        if each.startswith("checkpoint-") and each != name:
            run.remove_folder(each)


def warn_not_saved(final: Path, failure: str) -> None:
    """Say that a checkpoint could not be written, and which one is the last good one."""
    good = [path.name for _, path in list_checkpoints(final.parent) if is_whole(path)]
    last = f"the last good one is {good[-1]}" if good else "there is no earlier one"
    warnings.warn(
        f"{final.name} could not be written ({failure}); {last}; training goes on, and the next save tries again: "
        f"free some space in {final.parent}",
        UserWarning,
        stacklevel=2,
    )
