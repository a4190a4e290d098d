"""Which checkpoint a run goes on from."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

from preftune.errors import ConfigError
from preftune.training.checkpoints import folders
from preftune.training.checkpoints.manifest import InvalidCheckpoint, Manifest, verify
from preftune.training.zero_config import zero_stage


def resolve(asked: Any, output_dir: Path) -> Manifest:
    """The checkpoint that is asked for.

    Args:
        asked: ``True`` for the newest that is whole, or a folder.
        output_dir: Where the run writes.

    Raises:
        ConfigError: There is none, it is damaged, or it holds the weights alone.
    """
    if asked is True:
        found = folders.find_checkpoint(output_dir)
        if found.skipped:
            warnings.warn(found.describe_skipped(), UserWarning, stacklevel=4)
        if found.manifest is None:
            raise ConfigError(
                "no checkpoint to go on from",
                where="resume_from_checkpoint",
                value=str(output_dir),
                remedy="leave resume_from_checkpoint out to begin anew, or check output_dir",
            )
        return found.manifest
    folder = Path(os.fspath(asked))
    folders.recover(folder.parent, tidy=False)
    try:
        manifest = verify(folder)
    except InvalidCheckpoint as error:
        raise ConfigError(
            f"not a checkpoint to go on from: {error}",
            where="resume_from_checkpoint",
            value=str(folder),
            remedy="resume_from_checkpoint: true takes the newest one that is whole",
        ) from error
    if not manifest.resumable:
        raise ConfigError(
            "the checkpoint holds the weights alone (save_only_model)",
            where="resume_from_checkpoint",
            value=str(folder),
            remedy="train anew with it as model_name_or_path",
        )
    return manifest


def resume_point(asked: Any, output_dir: str) -> Manifest | None:
    """The checkpoint that a command line asks for, before anything is loaded; see ``check_resume``."""
    return None if asked in (None, False) else resolve(asked, Path(output_dir))


def check_same_shards(manifest: Manifest, args: Any) -> None:
    """Refuse a checkpoint of DeepSpeed whose parts are not those that the processes would read.

    Raises:
        ConfigError: Another number of processes, or another stage, wrote it.
    """
    now = {"num_processes": args.world_size, "zero_stage": zero_stage(args)}
    for name, value in now.items():
        before = manifest.body.get(name, value)
        if before != value:
            raise ConfigError(
                f"a checkpoint of DeepSpeed goes on as it was written: {name} {before} -> {value}",
                where="resume_from_checkpoint",
                value=str(manifest.folder),
                remedy="restore the old value, or train anew with the checkpoint as model_name_or_path",
            )
