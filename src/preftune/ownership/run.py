"""A run and a folder: what it may replace and remove there, and how whatever it writes gets its name."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from preftune.files import replacing, sync_file, sync_folder
from preftune.ownership.paths import begins_with, files_of, free_name, others_in
from preftune.ownership.record import HOME, Entry, Record, entries_of, entry_of, read_record, read_records

logger = logging.getLogger(__name__)

#: Runs of this process, by the folder that they write into.
ACTIVE: dict[str, RunFolder] = {}


class ForeignFile(OSError):
    """Something that this run did not write has the name that it needs."""


class RunFolder:
    """A folder as one run sees it.

    Args:
        folder: The folder.
        record: What the run has written there before.
    """

    def __init__(self, folder: Path, record: Record) -> None:
        self.folder, self.record = folder, record
        self.home = folder / HOME / record.run
        #: Where files are completed before they take their names.
        self.staging = self.home / "saving"

    @classmethod
    def open(cls, folder: str | os.PathLike[str], run: str) -> RunFolder:
        """The folder as ``run`` sees it; from now on, what this process puts into it is recorded as that run's."""
        place = Path(folder)
        others = [each.turn for each in read_records(place) if each.run != run]
        record = read_record(place, run) or Record(run)
        record.turn = max(record.turn, 1 + max(others, default=0))
        found = ACTIVE[os.path.realpath(place)] = cls(place, record)
        return found

    # ---- whose is it ------------------------------------------------------------------------------------------------

    def owns(self, name: str) -> bool:
        """Whether the run has written the file or folder of this name, and nobody has changed it since."""
        path = self.folder / name
        if name in self.record.folders:
            return self._missing(name) == [] and self._extra(name) == []
        if name in self.record.grown:
            return begins_with(path, self.record.grown[name])
        return any(entry.fits(path) for entry in self.record.files.get(name, ()))

    def has_part_of(self, name: str) -> bool:
        """Whether a folder is one that the run has published, though it may be damaged or have been added to."""
        files = self.record.folders.get(name, {})
        return any(entry.bytes and entry.fits(self.folder / name / each) for each, entry in files.items())

    def may_put(self, name: str) -> bool:
        """Whether a file can take this name without replacing what the run has not written."""
        parent = self.folder
        for part in Path(name).parts[:-1]:
            parent /= part
            if parent.is_symlink() or (os.path.lexists(parent) and not parent.is_dir()):
                return False
        return not os.path.lexists(self.folder / name) or self.owns(name)

    def _missing(self, name: str) -> list[str]:
        """Recorded files of a folder that are not there as they were written."""
        place = self.folder / name
        if place.is_symlink() or not place.is_dir():
            return ["."]
        return [each for each, entry in self.record.folders[name].items() if not entry.fits(place / each)]

    def _extra(self, name: str) -> list[str]:
        return others_in(self.folder / name, self.record.folders[name])

    # ---- files ------------------------------------------------------------------------------------------------------

    def put_text(self, name: str, text: str) -> Path:
        """Write a file in one step; where somebody else's has the name, write it beside that one.

        Returns:
            The file.

        Raises:
            OSError: It cannot be written; what was there is as it was.
        """
        if not self.may_put(name):
            other = Path(name)
            name = str(other.with_name(f"{other.stem}-{self.record.run[:8]}{other.suffix}"))
            if not self.may_put(name):
                raise ForeignFile(17, "not written by this run", str(self.folder / name))
            said = f"{self.folder / other} was not written by this run and is left as it is; see {name}"
            warnings.warn(said, UserWarning, stacklevel=3)
        path = self.folder / name
        with replacing(path) as beside:
            # As replace_text: halves of surrogate pairs become "?".
            beside.write_text(text, encoding="utf-8", errors="replace")
            self._remember({name: entry_of(beside)})
        return path

    def put_files(self, staging: Path) -> Path:
        """Let every file of ``staging`` take its place, one whole file after the other.

        Where somebody else's file has one of the names, none is replaced: all of them go into a folder of their own.

        Returns:
            The folder that they are in.

        Raises:
            OSError: The disk cannot take it.
        """
        paths = files_of(staging)
        for path in paths:
            sync_file(path)
        entries = entries_of(staging, paths)
        strange = [name for name in entries if not self.may_put(name) and not entries[name].fits(self.folder / name)]
        if strange:
            final = free_name(self.folder, f"saved-{self.record.run[:8]}")
            os.rename(staging, final)
            sync_folder(self.folder)
            self.record.folders[final.name] = entries
            self.record.write(self.folder)
            said = f"{self.folder / strange[0]} was not written by this run and is left as it is"
            warnings.warn(f"{said}; the model is saved in {final}", UserWarning, stacklevel=4)
            return final
        self._remember(entries)
        for path in paths:
            place = self.folder / path.relative_to(staging)
            place.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, place)
            if place.parent != self.folder:
                sync_folder(place.parent)
        shutil.rmtree(staging, ignore_errors=True)
        sync_folder(self.folder)
        return self.folder

    def note(self, names: Iterable[str]) -> None:
        """Record files that have just been written by a library, where nothing of the name was before."""
        self._remember(entries_of(self.folder, [self.folder / name for name in names]))

    def seal(self, names: Iterable[str]) -> None:
        """Record files and folders as they are now, where nothing of the names was before the run."""
        for name in names:
            path = self.folder / name
            if path.is_symlink():
                continue
            if path.is_dir():
                self.record.folders[name] = entries_of(path, files_of(path))
            elif path.is_file():
                self.record.files[name] = [entry_of(path)]
        self.record.write(self.folder)

    def grow(self, name: str, beginning: bytes) -> None:
        """Record that the run appends to a file.

        Args:
            name: The file.
            beginning: What is going to be written first, where it is empty or missing.

        Raises:
            ForeignFile: The file is somebody else's.
        """
        if os.path.lexists(self.folder / name) and (self.folder / name).stat().st_size:
            if not self.owns(name):
                raise ForeignFile(17, "not written by this run", str(self.folder / name))
            return
        head = beginning[: beginning.find(b"\n") + 1] or beginning
        self.record.grown[name] = Entry(len(head), hashlib.sha256(head).hexdigest(), 0)
        self.record.write(self.folder)

    def remove_file(self, name: str) -> bool:
        """Remove a file of the run's. Returns whether it was one."""
        if name in self.record.folders or not self.owns(name):
            return False
        (self.folder / name).unlink()
        return True

    def _remember(self, entries: Mapping[str, Entry]) -> None:
        """Record contents before they take their names: a crash must not leave a file that nobody owns."""
        for name, entry in entries.items():
            before = [each for each in self.record.files.get(name, ()) if each.fits(self.folder / name)]
            self.record.files[name] = [*before[:1], entry]
        self.record.write(self.folder)

    # ---- folders ----------------------------------------------------------------------------------------------------

    def put_folder(self, staging: Path, name: str, files: Mapping[str, Entry]) -> None:
        """Give a finished folder its name in one step.

        One that the run has published under this name before is replaced; one that was changed since is set aside.

        Args:
            staging: The folder, complete and on the disk.
            name: Its name.
            files: Its files.

        Raises:
            ForeignFile: A folder that is not the run's has the name.
            OSError: The disk cannot take it.
        """
        final, moved = self.folder / name, self.home / "going" / name
        if os.path.lexists(final) and not self.owns(name):
            if not self.has_part_of(name):
                raise ForeignFile(17, "a folder that this run did not write has this name", str(final))
            place = free_name(self.folder, f"{name}.aside")
            os.rename(final, place)
            logger.warning("%s has been changed since it was written, and is now %s", final, place)
        if os.path.lexists(final):
            self.record.going[name] = self.record.folders[name]
        self.record.folders[name] = dict(files)
        self.record.write(self.folder)
        if os.path.lexists(final):
            self._make_room(moved)
            os.rename(final, moved)
        os.rename(staging, final)
        sync_folder(self.folder)
        self._delete(name, moved)

    def adopt_folder(self, name: str, files: Mapping[str, Entry]) -> None:
        """Record a folder that the run's own manifest inside of it describes."""
        self.record.folders.setdefault(name, dict(files))

    def remove_folder(self, name: str) -> bool:
        """Remove what the run has written into a folder; what others have added stays where it is.

        Returns:
            Whether it was a folder of the run's.
        """
        files = self.record.folders.get(name)
        if files is None or not self.has_part_of(name):
            return False
        self.record.going[name] = self.record.folders.pop(name)
        self.record.write(self.folder)
        final, moved = self.folder / name, self.home / "going" / name
        if others_in(final, files):
            self._delete(name, final)
        else:
            # It loses its name first, so that a crash never leaves half of one under it.
            self._make_room(moved)
            os.rename(final, moved)
            self._delete(name, moved)
        return True

    def _make_room(self, moved: Path) -> None:
        moved.parent.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(moved):
            os.rename(moved, free_name(self.folder, f"{moved.name}.aside"))

    def _delete(self, name: str, place: Path) -> None:
        """Delete the files of a folder that is on its way out, and whatever folders that leaves empty."""
        files = self.record.going.get(name)
        if files is None:
            return
        # Without its manifest, which is the last name in no alphabet, it is no checkpoint any more.
        for each in sorted(files, key=lambda other: (other != "manifest.json", other)):
            if files[each].fits(place / each):
                with suppress(OSError):
                    (place / each).unlink()
        for root, _, _ in os.walk(place, topdown=False):
            with suppress(OSError):
                os.rmdir(root)
        del self.record.going[name]
        self.record.write(self.folder)

    def restore(self) -> None:
        """Give folders their names back whose successors never came, after a crash of this run."""
        for name in self.record.going:
            final, moved = self.folder / name, self.home / "going" / name
            if moved.is_dir() and name in self.record.folders and not os.path.lexists(final):
                # Another process of the same run may be doing the same.
                with suppress(OSError):
                    os.rename(moved, final)

    def recover(self) -> None:
        """Tidy up after a crash of this run: nothing that it has not recorded is touched."""
        shutil.rmtree(self.staging, ignore_errors=True)
        self.restore()
        for name, files in list(self.record.going.items()):
            final, moved = self.folder / name, self.home / "going" / name
            if moved.is_dir():
                self._delete(name, moved)
                continue
            if not all(entry.fits(final / each) for each, entry in files.items()):
                if name in self.record.folders:
                    del self.record.going[name]
                else:
                    self._delete(name, final)
                continue
            self.record.folders[name] = self.record.going.pop(name)
            self.record.write(self.folder)

    # ---- others -----------------------------------------------------------------------------------------------------

    def set_aside(self, names: Sequence[str]) -> Path:
        """Move what other runs have left into a new folder beside this run's files, with their records.

        Args:
            names: What to move.

        Returns:
            The new folder, in which those runs can be resumed.

        Raises:
            OSError: It cannot be moved.
        """
        target = free_name(self.folder, "earlier")
        target.mkdir()
        for name in names:
            os.rename(self.folder / name, target / name)
        (target / HOME).mkdir()
        for record in read_records(self.folder):
            if record.run != self.record.run and len(record.run) == len(self.record.run):
                os.rename(self.folder / HOME / record.run, target / HOME / record.run)
        sync_folder(self.folder)
        return target
