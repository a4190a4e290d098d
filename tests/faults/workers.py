"""Processes that hang or die beside the training process: jobs for children of the fork server."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch.utils.data

from tests.faults.worlds import make_trainer

#: Seconds that a run waits for a worker here.
PATIENCE = 1.5


def _signalled(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


#: What befalls a process, done by itself.
ENDS: dict[str, Callable[[], None]] = {
    "stopped": _signalled(signal.SIGSTOP),
    "never returns": lambda: time.sleep(3600),
    "killed": _signalled(signal.SIGKILL),
}


class StrikingCollator:
    """Collates as the trainer does, and strikes in the second loader worker at one of its batches.

    Args:
        collate: The trainer's own.
        how: Name in :data:`ENDS`.
        at: Number of the batch that this worker makes, from 1.
    """

    def __init__(self, collate: Callable[[Any], Any], how: str, at: int) -> None:
        self._collate, self._how, self._at, self._count = collate, how, at, 0

    def __call__(self, features: Any) -> Any:
        worker = torch.utils.data.get_worker_info()
        if worker is not None and worker.id == 1:
            self._count += 1
            if self._count == self._at:
                ENDS[self._how]()
        return self._collate(features)


def train_with_workers(world: Path, out: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Train with two loader workers, one of which is struck."""
    from preftune.runs.failures import foreseen

    # Workers make batches as they are taken, so that the strike falls between saves.
    changes = {"dataloader_num_workers": 2, "dataloader_prefetch_factor": 1, "worker_timeout": PATIENCE}
    trainer = make_trainer(world, out, options["scenario"], **changes)
    with foreseen(SimpleNamespace(output_dir=str(out))):
        trainer.data_collator = StrikingCollator(trainer.data_collator, options["how"], options["batch"])
        trainer.train()
    return {}


def prepare_with_processes(world: Path, out: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Prepare rows in two processes, one of which is struck."""
    from preftune.data import batches
    from preftune.runs.failures import trainer_errors

    plain = batches.to_table

    def to_table(rows: list[dict[str, Any]], indices: Sequence[int], worker: batches.Worker) -> Any:
        if indices[0] == 14:
            ENDS[options["how"]]()
        return plain(rows, indices, worker)

    batches.MIN_ROWS_FOR_PROCESSES, batches.BATCH_SIZE, batches.to_table = 10, 7, to_table
    with trainer_errors():
        make_trainer(world, out, options["scenario"], dataset_num_proc=2, worker_timeout=PATIENCE)
    return {}


JOBS = {"train with workers": train_with_workers, "prepare with processes": prepare_with_processes}
