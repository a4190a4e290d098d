"""A run on rows that are made on the spot, in memory that is limited; started by a test, writes what it took.

``python -m tests.training.endless MODEL OUT HOW [CHECKPOINT]``, where ``HOW`` is ``stream`` or ``loaded``.
"""

from __future__ import annotations

import json
import random
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from datasets import Dataset, IterableDataset
from transformers import AutoTokenizer, TrainerCallback

import preftune
from preftune.training import streams
from tests.parity import worlds

#: Rows of a step, steps, bytes of a row, and bytes that the process may take beside what it has before it reads.
ROWS, STEPS, BYTES, ROOM = 40, 250, 60_000, 300 << 20


def rows() -> Iterator[dict[str, Any]]:
    """Pairs, each with a column of notes that nobody needs: 600 MB of them."""
    pairs = worlds.pair_rows(50)
    for number in range(ROWS * STEPS):
        notes = random.Random(number).randbytes(BYTES // 2).hex()
        yield {**pairs[number % 50], "notes": notes}


def taken(name: str) -> int:
    """A figure of this process's memory, in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    raise AssertionError(name)


class Watch(TrainerCallback):
    """Resident memory at the end of every step."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Note it."""
        self.seen.append(taken("VmRSS"))


def main() -> None:
    """Train."""
    path, out, how, *checkpoint = sys.argv[1:]
    watch = Watch()
    args = preftune.DPOConfig(
        output_dir=out,
        **{
            **worlds.DEFAULTS, "max_steps": STEPS, "per_device_train_batch_size": ROWS, "reference_store": False,
            "max_length": 24, "save_strategy": "steps", "save_steps": 150, "train_sampling_strategy": "sequential",
        },
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(path)
    room = taken("VmData") + ROOM
    resource.setrlimit(resource.RLIMIT_DATA, (room, room))
    data: Any = IterableDataset.from_generator(rows) if how == "stream" else Dataset.from_list(list(rows()))
    # 10,000 rows are as many as a test has the time for, and would be read ahead.
    with mock.patch.multiple(streams, MOST_ROWS_AHEAD=0, BLOCK=200):
        trainer = preftune.DPOTrainer(model=path, args=args, train_dataset=data, processing_class=tokenizer)
        trainer.add_callback(watch)
        trainer.train(*checkpoint)
    trainer.save_model()
    Path(out, "memory.json").write_text(json.dumps(watch.seen), encoding="utf-8")


if __name__ == "__main__":
    main()
