"""Folders that ``save_to_disk`` wrote, whole or damaged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from preftune.errors import DataError


def load_saved(name: str, path: Path) -> dict[str, Callable[[], Any]]:
    """A folder that ``datasets`` wrote.

    Args:
        name: What the user called it.
        path: The folder.

    Returns:
        What reads each of its splits.

    Raises:
        DataError: It is not as it was saved.
    """
    import datasets

    with undamaged(name):
        loaded = datasets.load_from_disk(str(path))
    splits = dict(loaded) if isinstance(loaded, datasets.DatasetDict) else {"train": loaded}
    return {split: partial(_read_through, dataset) for split, dataset in splits.items()}


@contextmanager
def undamaged(name: str) -> Iterator[None]:
    """What the library makes of a folder that is not as it was saved, in one line.

    Args:
        name: What the user called the folder.

    Raises:
        DataError: In place of whatever the library raises.
    """
    try:
        yield
    except (DataError, KeyboardInterrupt, MemoryError):
        raise
    except Exception as error:
        said = " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(
            f"the saved data set is damaged ({said})", where=name, remedy="save it again, or name a file of rows"
        ) from error


def _read_through(dataset: Any) -> Any:
    """Look at every value once: what a damaged file says about itself ends the process where it is believed."""
    tables = [table.table for table in (dataset.data, dataset._indices) if table is not None]
    for table in tables:
        table.validate(full=True)
    if dataset._indices is not None and len(dataset):
        import pyarrow.compute as pc

        ends = pc.min_max(dataset._indices.column(0)).as_py()
        if ends["min"] is None or ends["min"] < 0 or ends["max"] >= dataset.data.num_rows:
            raise DataError("the saved data set is damaged", where="indices", value=ends["max"])
    return dataset
