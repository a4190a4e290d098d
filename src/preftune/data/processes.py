"""Rows prepared by several processes, none of which is waited for without end."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures import TimeoutError as WaitedTooLong
from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING, Any

from preftune.data.arrow import rows_of
from preftune.errors import SetupError

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

#: Makes a table of a batch of rows and the rows' numbers.
MakeTable = Callable[[list[dict[str, Any]], Sequence[int]], "pa.Table"]

#: What every process works on; handed over once, when it starts.
_given: tuple[Dataset, MakeTable, int] | None = None


def in_processes(
    dataset: Dataset, make_table: MakeTable, num_proc: int, desc: str, batch_size: int, patience: float
) -> list[pa.Table]:
    """Make tables of batches of rows in several processes.

    ``Dataset.map`` waits for ever for a process that never returns. Here a batch that is not done in time ends the
    whole with one error, as does a process that dies, and no process outlives its parent.

    Args:
        dataset: Rows.
        make_table: What to do with them; must be picklable, and is handed to the processes once.
        num_proc: How many processes.
        desc: Title of the progress bar.
        batch_size: Rows of one piece of work.
        patience: Seconds to wait for the next batch; 0 waits for ever.

    Returns:
        One table per batch, in order.

    Raises:
        SetupError: A process died or gave no answer in time.
    """
    from datasets.utils import tqdm

    starts = range(0, len(dataset), batch_size)
    pool = ProcessPoolExecutor(
        min(num_proc, len(starts)), initializer=_begin, initargs=(dataset, make_table, batch_size)
    )
    futures: list[Future[pa.Table]] = []
    try:
        futures = [pool.submit(_one_batch, start) for start in starts]
        bar = tqdm(futures, desc=desc, unit="batches", disable=None)
        tables = [future.result(patience or None) for future in bar]
    except BaseException as error:
        # Rows may raise a TimeoutError of their own.
        waited = isinstance(error, WaitedTooLong) and not any(f.done() and f.exception() is error for f in futures)
        _kill(pool)
        if waited or isinstance(error, BrokenProcessPool):
            raise _failed(waited, num_proc, desc, patience) from None
        raise
    pool.shutdown()
    return tables


def _failed(waited: bool, num_proc: int, desc: str, patience: float) -> SetupError:
    what, remedy = "a process died", "leave dataset_num_proc out; if the system ended it, memory was short"
    if waited:
        what = f"a process has finished no batch for {patience:g} s"
        remedy = "leave dataset_num_proc out, or raise worker_timeout"
    return SetupError(f"{desc}: {what}", where="dataset_num_proc", value=num_proc, remedy=remedy)


def _kill(pool: ProcessPoolExecutor) -> None:
    # Asking is not enough: a process that hangs would not hear, and Python joins them all at its exit.
    for process in list((getattr(pool, "_processes", None) or {}).values()):
        process.kill()
    pool.shutdown(wait=False, cancel_futures=True)


def _begin(dataset: Dataset, make_table: MakeTable, batch_size: int) -> None:
    """Runs in every process when it starts."""
    global _given
    _given = (dataset, make_table, batch_size)
    # Ctrl-C reaches every process of the terminal; the parent decides, and ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent: Any = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _one_batch(start: int) -> pa.Table:
    assert _given is not None
    dataset, make_table, batch_size = _given
    return make_table(rows_of(dataset, slice(start, start + batch_size)), range(start, len(dataset)))
