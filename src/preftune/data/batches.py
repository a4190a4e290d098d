"""Runs a row worker over a data set and gathers its outcomes in Arrow columns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any, Protocol

from preftune.data.arrow import in_few_pieces, rows_of
from preftune.data.options import DataOptions
from preftune.data.processes import in_processes
from preftune.data.rows import NEUTRAL
from preftune.data.streams import read_to_end
from preftune.data.token_cache import remembered
from preftune.errors import DataError, DataTypeError

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

BATCH_SIZE = 1000
# Below this number of rows, starting processes takes longer than the work they would share.
MIN_ROWS_FOR_PROCESSES = 2000

TRUNCATED, MERGED, DOUBLED_BOS, EOS_MISSING, EOS_APPENDED, ENVIRONMENT, TRANSCRIPT, MARKED = 1, 2, 4, 8, 16, 32, 64, 128
REPEATED, PLAIN = 256, 512

#: Status of a row that was left out because it is bad; any other text is the reason why it was dropped.
BAD = "bad"


@dataclass
class Outcome:
    """What became of one row.

    Attributes:
        status: Empty where the row is kept, :data:`BAD`, or the reason why it was dropped.
        bad: Reason why the row is bad, whether it is kept or not.
        flags: Sum of the flags above.
        example: Text shown as an example of a merged boundary.
        problem: Place and problem of a row that was left out.
        lists: Lists of integers, one per column of the worker.
        floats: Numbers that travel with the row.
    """

    status: str = ""
    bad: str = ""
    flags: int = 0
    example: str | None = None
    problem: str | None = None
    lists: Sequence[Sequence[int] | None] = ()
    floats: Mapping[str, float] = field(default_factory=dict)


class Worker(Protocol):
    """Turns rows into outcomes; must be picklable for ``num_proc``."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the integer-list columns, in the order of :attr:`Outcome.lists`."""
        ...

    @property
    def floats(self) -> tuple[str, ...]:
        """Names of the numbers that may travel with a row."""
        ...

    def outcomes(self, rows: list[dict[str, Any]], indices: Sequence[int]) -> list[Outcome]:
        """One outcome per row."""
        ...


@dataclass(frozen=True)
class Tally:
    """Sums over all outcomes."""

    dropped: dict[str, int]
    bad: dict[str, int]
    num_bad_left_out: int
    num_tokenised: int
    num_truncated: int
    num_merged: int
    num_doubled_bos: int
    num_eos_missing: int
    num_eos_appended: int
    num_environment: int
    num_transcripts: int
    num_marked: int
    num_repeated: int
    num_plain: int
    example: str | None
    first: str = ""


def run(dataset: Dataset, worker: Worker, options: DataOptions, desc: str) -> tuple[Dataset, Tally]:
    """Apply a worker to every row, or find what it made of them earlier.

    Args:
        dataset: Rows.
        worker: What to do with them.
        options: Data options; processes are used from :data:`MIN_ROWS_FOR_PROCESSES` rows on.
        desc: Title of the progress bar that large data sets get.

    Returns:
        The kept rows (ids only, in order) and the sums.

    Raises:
        SetupError: A process died or gave no answer in time.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    from datasets import Dataset as HFDataset

    dataset, num_proc = dataset.with_format(None), options.num_proc

    def compute() -> pa.Table:
        if num_proc is not None and num_proc > 1 and len(dataset) >= MIN_ROWS_FOR_PROCESSES:
            tables: Iterable[pa.Table] = in_processes(
                dataset, partial(to_table, worker=worker), num_proc, desc, BATCH_SIZE, options.worker_timeout
            )
        else:
            tables = _in_batches(dataset, worker, desc)
        return pa.concat_tables(tables)

    table = remembered(dataset, worker, options, compute)
    tally = _tally(table)
    kept = table.filter(pc.equal(table["_status"], "")) if tally.dropped or tally.num_bad_left_out else table
    names = [name for name in worker.columns + worker.floats if not _all_null(kept, name, worker)]
    if "weight" in names:
        # A row without a weight among rows that have one counts as one row.
        filled = pc.fill_null(kept["weight"], 1.0)
        kept = kept.set_column(kept.column_names.index("weight"), "weight", filled)
    return HFDataset(in_few_pieces(kept.select(names))), tally


def _all_null(table: Any, name: str, worker: Worker) -> bool:
    optional = name in worker.floats or name.endswith("_mask")
    return optional and table[name].null_count == table.num_rows


def _in_batches(dataset: Dataset, worker: Worker, desc: str) -> Iterable[pa.Table]:
    from datasets.utils import tqdm

    starts = range(0, len(dataset), BATCH_SIZE)
    for start in tqdm(starts, desc=desc, unit="k rows", disable=len(dataset) < 10 * BATCH_SIZE or None):
        yield to_table(rows_of(dataset, slice(start, start + BATCH_SIZE)), range(start, len(dataset)), worker)


def to_table(rows: list[dict[str, Any]], indices: Sequence[int], worker: Worker) -> pa.Table:
    """Arrow table of the outcomes of one batch."""
    import pyarrow as pa

    outcomes = worker.outcomes(rows, indices[: len(rows)])
    columns: dict[str, Any] = {
        name: list_array([outcome.lists[i] if outcome.lists else () for outcome in outcomes])
        for i, name in enumerate(worker.columns)
    }
    for name in worker.floats:
        columns[name] = pa.array([outcome.floats.get(name) for outcome in outcomes], pa.float64())
    columns["_status"] = pa.array([outcome.status for outcome in outcomes], pa.string())
    columns["_bad"] = pa.array([outcome.bad for outcome in outcomes], pa.string())
    columns["_flags"] = pa.array([outcome.flags for outcome in outcomes], pa.int32())
    columns["_example"] = pa.array([outcome.example for outcome in outcomes], pa.string())
    columns["_problem"] = pa.array([outcome.problem for outcome in outcomes], pa.string())
    return pa.table(columns)


def list_array(lists: Sequence[Sequence[int] | None]) -> pa.Array:
    """Lists of integers as an Arrow list array of int32, with nulls where a list is ``None``."""
    import numpy as np
    import pyarrow as pa

    sizes = np.fromiter((0 if ids is None else len(ids) for ids in lists), np.int64, len(lists))
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
    values = np.fromiter(chain.from_iterable(ids for ids in lists if ids is not None), np.int32, int(offsets[-1]))
    nulls = np.fromiter((ids is None for ids in lists), bool, len(lists))
    mask = pa.array(nulls) if nulls.any() else None
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(values), mask=mask)


def _tally(table: pa.Table) -> Tally:
    import numpy as np

    statuses = Counter(table["_status"].to_pylist())
    bad = Counter(table["_bad"].to_pylist())
    flags = table["_flags"].to_numpy()
    examples = table["_example"].drop_null()
    problems = table["_problem"].drop_null()
    num_bad = statuses.pop(BAD, 0)
    statuses.pop("", None)
    bad.pop("", None)

    def count(flag: int) -> int:
        return int(np.count_nonzero(flags & flag))

    return Tally(
        dropped=dict(statuses),
        bad=dict(bad),
        num_bad_left_out=num_bad,
        num_tokenised=table.num_rows - num_bad,
        num_truncated=count(TRUNCATED),
        num_merged=count(MERGED),
        num_doubled_bos=count(DOUBLED_BOS),
        num_eos_missing=count(EOS_MISSING),
        num_eos_appended=count(EOS_APPENDED),
        num_environment=count(ENVIRONMENT),
        num_transcripts=count(TRANSCRIPT),
        num_marked=count(MARKED),
        num_repeated=count(REPEATED),
        num_plain=count(PLAIN),
        example=examples[0].as_py() if len(examples) else None,
        first=problems[0].as_py() if len(problems) else "",
    )


def materialise(dataset: Any, name: str) -> tuple[Dataset, list[str]]:
    """A data set with random access, and notes about how it came to be.

    Raises:
        DataError: No rows.
        DataTypeError: Not a data set.
    """
    import datasets

    notes = []
    if isinstance(dataset, datasets.IterableDataset):
        rows = read_to_end(dataset, name)
        if rows:
            dataset = as_table(rows)
            notes.append(f"{len(rows)} rows of the stream were read ahead, because packing needs lengths")
    if not isinstance(dataset, datasets.Dataset | datasets.IterableDataset):
        splits = isinstance(dataset, dict) and ", ".join(map(str, dataset))
        raise DataTypeError(
            "not a data set",
            where=name,
            value=type(dataset).__name__,
            allowed="datasets.Dataset, datasets.IterableDataset",
            remedy=f"pass one of its splits: {splits}" if splits else None,
        )
    if isinstance(dataset, datasets.Dataset) and dataset.format["type"] == "custom" and len(dataset):
        # Rows are read past a transform, so that it has to be applied now.
        dataset = as_table(list(dataset))
        notes.append("the transform of the data set (with_transform) was applied to every row, once")
    if isinstance(dataset, datasets.IterableDataset) or len(dataset) == 0:
        raise DataError("the data set holds no rows", where=name, remedy="check the split and the file")
    media = [column for column in _MEDIA if column in dataset.column_names]
    if media:
        refuse_images(media, dataset.select_columns(media).with_format(None), f"{name} data set")
    return dataset, notes


def as_table(rows: Sequence[Mapping[str, Any]]) -> Dataset:
    """Rows as a data set with the columns of all of them: the library takes those of the first."""
    import datasets

    columns = dict.fromkeys(name for row in rows for name in row)
    return datasets.Dataset.from_list([{**columns, **row} for row in rows], on_mixed_types="use_json")


_MEDIA = ("image", "images", "video", "videos", "audio", "audios")


def refuse_images(columns: Collection[str], rows: Iterable[Any], where: str) -> None:
    """Text alone is trained on, and never text without the images that belong to it.

    Args:
        columns: Names of the columns.
        rows: The rows, which are looked at where a column is named after images.
        where: The data set, for messages.

    Raises:
        DataError: A column of images, videos or sounds holds some.
    """
    named = [name for name in _MEDIA if name in columns]
    if not named:
        return
    given = ((name, row.get(name)) for row in rows if isinstance(row, Mapping) for name in named)
    # Tables of numbers write NaN, the one value that differs from itself, where there is none.
    found = {name for name, value in given if value not in (None, "", []) and value == value}
    if found:
        raise DataError(
            "vision-language data are not supported",
            where=where,
            value=sorted(found),
            remedy="remove the image column (or select others with `dataset_columns`) to train on the text alone",
        )


def check_share(
    tally: Tally,
    rows_read: int,
    lost_before: Mapping[str, int],
    max_share: float | None,
    name: str,
    first: str = "",
) -> None:
    """Refuse to go on after losing too much, or everything.

    Args:
        tally: Sums over the rows.
        rows_read: Rows found at the source.
        lost_before: Rows that earlier stages left out, by reason.
        max_share: Most that may be lost; ``None`` for any share.
        name: Name of the data set, for messages.
        first: Place and problem of the first row that an earlier stage left out.

    Raises:
        DataError: More than ``max_share`` of the rows was lost, or no row is left.
    """
    left_out = tally.num_bad_left_out + sum(lost_before.values())
    by_reason = Counter(lost_before) + Counter(tally.bad) + Counter(tally.dropped)
    ties = sum(by_reason[reason] for reason in NEUTRAL)
    lost = left_out + sum(tally.dropped.values()) - ties
    rows_read -= ties
    reasons = ", ".join(f"{count} {reason}" for reason, count in by_reason.items())
    first = first or tally.first
    told = f"{reasons}; the first is {first}" if first else reasons
    # What truncation leaves nothing of has another remedy than what is wrong.
    long = sum(tally.dropped.values()) * 2 >= lost
    remedy = "raise max_length, set truncation_mode: keep_end, or correct the data" if long else "correct the rows"
    if lost >= rows_read:
        raise DataError(f"no row is left of {rows_read}: {told}", where=name, remedy=remedy)
    if max_share is not None and lost > max_share * rows_read:
        raise DataError(
            f"{lost} of {rows_read} rows are lost ({lost / rows_read:.1%}): {told}",
            where=name,
            allowed=f"up to {max_share:.0%}",
            remedy=f"{remedy}; or go on as it is with a higher max_dropped_share",
        )
