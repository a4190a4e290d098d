"""Streams that are trained on while they are read, in memory that does not grow."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count, islice
from typing import Any

from torch.utils.data import IterableDataset

from preftune.errors import DataError
from preftune.training.batch import Example
from preftune.training.config import PackedConfig
from preftune.training.task import Task

#: Rows that are read before training at most: the reference of a run that visits more is run along.
MOST_ROWS_AHEAD = 100_000
#: Rows that are prepared at a time.
BLOCK = 1000


class Stream(IterableDataset[Example]):
    """Examples of a stream, prepared block by block as they are asked for. It begins again where it ends.

    Whoever goes through it sees the same examples in the same order, so that a run goes on where it was by leaving out
    what it has had.

    Args:
        rows: The raw rows.
        prepare: Tokenises a block of them; told whether it is the first.
    """

    def __init__(self, rows: Any, prepare: Callable[[Any, bool], Any]) -> None:
        self._rows = rows
        self._prepare = prepare

    def __iter__(self) -> Iterator[Example]:
        import datasets

        first = True
        for epoch in count():
            if hasattr(self._rows, "set_epoch"):
                self._rows.set_epoch(epoch)
            rows, empty = iter(self._rows), True
            while block := list(islice(rows, BLOCK)):
                yield from self._prepare(datasets.Dataset.from_list(block, on_mixed_types="use_json"), first)
                first = empty = False
            if empty:
                raise DataError("the stream holds no rows", where="train data set", remedy="check the split")


def is_read_late(dataset: Any, args: PackedConfig, task: Task) -> bool:
    """Whether a stream is too long to be read before training."""
    import datasets

    if not isinstance(dataset, datasets.IterableDataset) or not task.streams or args.max_steps <= 0:
        return False
    per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    return bool(args.max_steps * per_step > MOST_ROWS_AHEAD)


def read_late(dataset: Any, args: PackedConfig, task: Task, prepare: Callable[[Any], Any]) -> Stream:
    """A stream that is prepared while it is trained on, in its own order; ``args`` is changed to say so.

    What is wrong with rows is told of the first block alone; those that cannot be used are left out everywhere.
    """
    args.train_sampling_strategy = "sequential"

    def prepared(rows: Any, first: bool) -> Any:
        before = task.options
        quiet = replace(before, num_proc=None, data_cache=False)
        task.options = quiet if first else replace(quiet, warn=False, max_dropped_share=None)
        try:
            return prepare(rows)
        finally:
            task.options = before

    return Stream(dataset, prepared)
