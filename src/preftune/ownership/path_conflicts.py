"""Paths of settings that point at each other."""

from __future__ import annotations

import os
from collections.abc import Mapping

from preftune.errors import ConfigError


def check_places(written: Mapping[str, str | None], read: Mapping[str, str | None], *, may_hold: bool = False) -> None:
    """Refuse a place to write into that is, holds or is inside a place that is read; links are followed.

    Args:
        written: Files and folders by the setting that names them.
        read: Models, data and caches likewise; a name that is no local path is left out. A single file may be in a
            folder that is written into, where nothing is replaced that was not written by the run.
        may_hold: A folder that is read may do so as well.

    Raises:
        ConfigError: Naming both settings.
    """
    for ours, target in written.items():
        for theirs, source in read.items():
            if target is None or source is None or not _exists(source):
                continue
            one, other = os.path.realpath(target), os.path.realpath(source)
            how = None
            if one == other:
                how = "is the same place as"
            elif _is_in(one, other) and os.path.isdir(other):
                how = "is inside"
            elif _is_in(other, one) and os.path.isdir(other) and not may_hold:
                how = "holds"
            if how is not None:
                raise ConfigError(
                    f"{how} {theirs} ({source!r}), which must not be written into",
                    where=ours,
                    value=target,
                    remedy=f"set another {ours}",
                )


def _exists(path: str) -> bool:
    try:
        return os.path.exists(path)
    except ValueError:
        return False


def _is_in(path: str, folder: str) -> bool:
    return path.startswith(folder.rstrip(os.sep) + os.sep)
