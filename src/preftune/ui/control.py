"""Stopping and saving a run that goes on."""

from __future__ import annotations

import signal
from pathlib import Path

from preftune.errors import TrainingError
from preftune.ui.folders import process_of

#: A run that finds this file in its output folder saves a checkpoint and takes the file away.
TRIGGER = "SAVE"


def stop(folder: Path) -> str:
    """Ask a run to finish its step, save and stop, as SIGTERM does.

    Args:
        folder: Its folder.

    Returns:
        What was done, in one sentence.

    Raises:
        TrainingError: It does not run here.
    """
    process = process_of(folder)
    if process is None:
        raise TrainingError("no process of this run is alive on this machine", where="stop", value=folder.name)
    # psutil looks once more whether the number still belongs to the same process.
    process.send_signal(signal.SIGTERM)
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
    if process_of(folder) is None:
        raise TrainingError("no process of this run is alive on this machine", where="save", value=folder.name)
    try:
        (folder / TRIGGER).touch()
    except OSError as error:
        raise TrainingError(f"the folder cannot be written ({error.strerror})", where="save") from error
    return "asked for a checkpoint after this step"
