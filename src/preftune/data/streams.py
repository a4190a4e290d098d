"""Streams, whose end nobody knows."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Any

from preftune.errors import DataError

if TYPE_CHECKING:
    from datasets import IterableDataset

#: Rows after which a stream counts as one without end.
MOST_ROWS = 1_000_000


def read_to_end(stream: IterableDataset, name: str) -> list[Any]:
    """All rows of a stream.

    Raises:
        DataError: It repeats itself for ever, or does not end within :data:`MOST_ROWS` rows.
    """
    if _repeats(stream):
        why = "the stream repeats itself for ever"
    else:
        rows = list(islice(stream, MOST_ROWS + 1))
        if len(rows) <= MOST_ROWS:
            return rows
        why = f"the stream does not end within {MOST_ROWS:,} rows"
    remedy = "pass its beginning, stream.take(number)"
    raise DataError(why, where=f"{name} data set", remedy=f"set max_steps, or {remedy}" if name == "train" else remedy)


def _repeats(stream: IterableDataset) -> bool:
    """Whether a stream was told to begin again without end, at any place of the way that rows take."""
    from datasets.iterable_dataset import RepeatExamplesIterable

    step: Any = getattr(stream, "_ex_iterable", None)
    while step is not None:
        if isinstance(step, RepeatExamplesIterable) and step.num_times is None:
            return True
        step = getattr(step, "ex_iterable", None)
    return False
