"""Writing into a folder as the run of this process that owns it, wherever in the program."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from preftune.errors import ConfigError
from preftune.files import json_text, replace_text
from preftune.ownership.run import ACTIVE, RunFolder


def active(folder: str | os.PathLike[str]) -> RunFolder | None:
    """The run of this process that writes into a folder, if there is one."""
    return ACTIVE.get(os.path.realpath(folder))


def may_put(path: Path) -> bool:
    """Whether a file can be written without replacing what its run has not written."""
    run = active(path.parent)
    return run is None or run.may_put(path.name)


def put_text(path: Path, text: str) -> Path:
    """Write a file of the run that writes into its folder, see :meth:`RunFolder.put_text`; without one, as it is.

    Returns:
        The file.

    Raises:
        OSError: It cannot be written; what was there is as it was.
    """
    run = active(path.parent)
    if run is None:
        replace_text(path, text)
        return path
    return run.put_text(path.name, text)


def put_json(path: Path, document: Any, *, indent: int = 2) -> Path:
    """Write a JSON document as :func:`put_text` writes a text; numbers that are not finite become ``null``.

    Returns:
        The file.

    Raises:
        OSError: It cannot be written; what was there is as it was.
    """
    return put_text(path, json_text(document, indent=indent))


def claim_files(folder: str | os.PathLike[str], kind: str, names: Iterable[str], where: str) -> RunFolder:
    """Find out, before any work is done, that a verb can write its files; earlier ones of the same verb are replaced.

    Args:
        folder: Where they go.
        kind: The verb; its record has this name.
        names: The files.
        where: The setting that names the folder.

    Raises:
        ConfigError: Somebody else's file has one of the names, or it has been changed since it was written.
    """
    run = RunFolder.open(folder, kind)
    for name in names:
        if not run.may_put(name):
            raise ConfigError(
                f"the folder holds {name}, which preftune {kind} did not write, or which was changed since",
                where=where,
                value=str(folder),
                remedy=f"move it, or set another {where}",
            )
    return run
