"""Folders that ``save_to_disk`` wrote, whole or damaged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from preftune.data.tables import RawTable, from_dataset
from preftune.errors import DataError


def saved(name: str, path: Path) -> tuple[tuple[str, ...], Callable[[str], RawTable]]:
    """A folder that ``datasets`` wrote.

    Args:
        name: What the user called it.
        path: The folder.

    Returns:
        Names of its splits, and what reads one of them.

    Raises:
        DataError: It is not as it was saved.
    """
    import datasets

    with _undamaged(name):
        loaded = datasets.load_from_disk(str(path))
    splits = dict(loaded) if isinstance(loaded, datasets.DatasetDict) else {"train": loaded}

    def read(split: str) -> RawTable:
        with _undamaged(name):
            _read_through(splits[split])
            return from_dataset(name, splits[split])

    return tuple(splits), read


@contextmanager
def _undamaged(name: str) -> Iterator[None]:
    """What the library makes of a folder that is not as it was saved, in one line."""
    try:
        yield
    except (DataError, KeyboardInterrupt, MemoryError):
        raise
    except Exception as error:
        said = " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(
            f"the saved data set is damaged ({said})", where=name, remedy="save it again, or name a file of rows"
        ) from error


def _read_through(dataset: Any) -> None:
    """Look at every value once: what a damaged file says about itself ends the process where it is believed."""
    tables = [table.table for table in (dataset.data, dataset._indices) if table is not None]
    for table in tables:
        table.validate(full=True)
    if dataset._indices is not None and len(dataset):
        import pyarrow.compute as pc

        ends = pc.min_max(dataset._indices.column(0)).as_py()
        if ends["min"] is None or ends["min"] < 0 or ends["max"] >= dataset.data.num_rows:
            raise DataError("the saved data set is damaged", where="indices", value=ends["max"])
