"""Holding prompts out where the data have no test split."""

from __future__ import annotations

import os
import shutil
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from preftune.errors import ConfigError, DataError
from preftune.ownership import RunFolder
from preftune.runs.holdout import chosen_prompts, prompt_key

if TYPE_CHECKING:
    from datasets import Dataset

FOLDER = "data"
#: What a sweep's record is called.
KIND = "sweep"


def held_out(keys: Sequence[Hashable], share: float, seed: int) -> list[bool]:
    """Which rows are held out: all rows of about ``share`` of the distinct prompts.

    Args:
        keys: Prompt of each row.
        share: Share of the prompts, more than 0 and less than 1.
        seed: Of the choice.

    Returns:
        One flag per row; no prompt has rows on both sides.

    Raises:
        ConfigError: The share is out of range.
        DataError: There are too few prompts for two sides of two.
    """
    if not 0 < share < 1:
        raise ConfigError("not a share", where="--eval_share", value=share, allowed="more than 0, less than 1")
    prompts = set(keys)
    number = max(2, round(share * len(prompts)))
    if len(prompts) < number + 2:
        raise DataError(
            "too few prompts to hold some out",
            where="--eval_share",
            value=len(prompts),
            allowed=f"{number + 2} or more",
        )
    return chosen_prompts(keys, number, seed)


def split_off(dataset: Dataset, share: float, seed: int, folder: Path) -> tuple[int, int]:
    """Write ``train`` and ``test`` to the sweep's folder, where every worker and the final run read them.

    One that is there already has to be the same split of the same rows.

    Args:
        dataset: Canonical rows.
        share: Share of the prompts to hold out.
        seed: Of the choice.
        folder: The sweep's folder, which nobody else begins a sweep in meanwhile.

    Returns:
        Number of rows on either side.

    Raises:
        ConfigError: Something else is there.
        OSError: It cannot be written; nothing is left behind.
    """
    from datasets import DatasetDict, disable_progress_bars

    from preftune.training.checkpoints.manifest import seal
    from preftune.training.provenance import describe_dataset

    flags = held_out([prompt_key(row) for row in dataset], share, seed)
    parts = {
        "train": dataset.select([i for i, out in enumerate(flags) if not out]),
        "test": dataset.select([i for i, out in enumerate(flags) if out]),
    }
    identity = {"rows": describe_dataset(dataset)["sha256"], "share": share, "seed": seed}
    target = folder / FOLDER
    if os.path.lexists(target):
        check_split(folder, identity)
    else:
        disable_progress_bars()
        run = RunFolder.open(folder, KIND)
        # What a process left that died while it saved.
        run.recover()
        try:
            DatasetDict(parts).save_to_disk(str(run.staging / FOLDER))
            seal(run.staging / FOLDER, {"step": 0, "resumable": False, "kind": KIND, "identity": identity})
            os.rename(run.staging / FOLDER, target)
        finally:
            shutil.rmtree(run.staging, ignore_errors=True)
    return len(parts["train"]), len(parts["test"])


def check_split(folder: Path, identity: dict[str, Any] | None = None) -> None:
    """Refuse held-out pairs that no sweep has written, or that have been changed since.

    Args:
        folder: The sweep's folder.
        identity: What they have to be a split of, where that is known.

    Raises:
        ConfigError: They are something else.
    """
    from preftune.training.checkpoints.manifest import InvalidCheckpoint, verify

    target = folder / FOLDER
    try:
        if target.is_symlink():
            raise InvalidCheckpoint("it is a link")
        found = verify(target)
        why = None if found.body.get("kind") == KIND else "it is something else"
        if identity is not None and found.identity != identity:
            why = "they were split off other rows, or with another share or seed"
    except InvalidCheckpoint as error:
        why = str(error)
    if why is not None:
        raise ConfigError(
            f"{FOLDER} does not hold the pairs of this sweep ({why})",
            where="--out",
            value=str(folder),
            remedy=f"move {target}, or name a new folder",
        )
