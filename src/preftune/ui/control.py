"""Stopping and saving a run that goes on, by files that it looks for: nothing here ever signals a process.

Folders come from other machines and other people, and a log may name any process at all. A run that is asked to stop
finds a file named after the token that it made up when it began, and ends itself.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from preftune.errors import TrainingError
from preftune.files import stop_file
from preftune.ui.folders import begun_of, process_of

#: A run that finds this file in its output folder saves a checkpoint and takes the file away.
TRIGGER = "SAVE"


def stop(folder: Path) -> str:
    """Ask a run to finish its step, save and stop, as SIGTERM does.

    Args:
        folder: Its folder.

    Returns:
        What was done, in one sentence.

    Raises:
        TrainingError: It does not run here, or its folder cannot be written.
    """
    token = _alive(folder, "stop").get("token")
    if not isinstance(token, str) or not re.fullmatch(r"[0-9a-f]{32}", token):
        raise TrainingError(
            "the run did not say how to ask it", where="stop", value=folder.name, remedy="press Ctrl-C where it runs"
        )
    _make(folder / stop_file(token), "stop")
    return "asked to stop: it finishes its step and saves a checkpoint first"


def save(folder: Path) -> str:
    """Ask a run for a checkpoint after its current step.

    Args:
        folder: Its folder.

    Returns:
        What was done, in one sentence.

    Raises:
        TrainingError: It does not run here, or its folder cannot be written.
    """
    _alive(folder, "save")
    _make(folder / TRIGGER, "save")
    return "asked for a checkpoint after this step"


def _alive(folder: Path, action: str) -> dict[str, Any]:
    """How the run began."""
    if process_of(folder) is None:
        raise TrainingError("no process of this run is alive on this machine", where=action, value=folder.name)
    return begun_of(folder)


def _make(path: Path, action: str) -> None:
    try:
        # No link is followed: the file is made here or not at all.
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600))
    except OSError as error:
        raise TrainingError(f"the folder cannot be written ({error.strerror})", where=action) from error
