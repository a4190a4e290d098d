"""Where rows come from: local files and folders, saved data sets, the Hub."""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from preftune.data.formats.base import BadRow
from preftune.errors import ConfigError, DataError

SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".parquet", ".csv")
_BATCH = 1000


@dataclass
class RawTable:
    """Rows as they were found.

    Attributes:
        name: File or data set, for messages.
        rows: A list of rows (or :class:`BadRow`), or a ``datasets.Dataset``.
        place: Row index -> file and line, or file and row number.
        select: Columns to keep; ``None`` keeps all.
        rename: Old column name -> new.
        indices: Rows to use, in order; ``None`` uses all.
    """

    name: str
    rows: Any
    place: Callable[[int], str]
    select: Sequence[str] | None = None
    rename: Mapping[str, str] = field(default_factory=dict)
    indices: Sequence[int] | None = None

    def __len__(self) -> int:
        return len(self.rows) if self.indices is None else len(self.indices)

    def raw_columns(self) -> list[str]:
        """Names of all columns as found."""
        if hasattr(self.rows, "column_names"):
            return list(self.rows.column_names)
        return list(dict.fromkeys(key for row in self.rows if isinstance(row, Mapping) for key in row))

    def columns(self) -> list[str]:
        """Names of the columns after selection and renaming."""
        kept = self.raw_columns() if self.select is None else list(self.select)
        return [self.rename.get(name, name) for name in kept if name in self.rename or name not in self._new_names()]

    def _new_names(self) -> set[str]:
        return set(self.rename.values())

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        """``(place, row)`` for every row used."""
        indices = range(len(self.rows)) if self.indices is None else self.indices
        plain = self.select is None and not self.rename
        for index, row in self._read(indices):
            yield self.place(index), row if plain or not isinstance(row, Mapping) else self._reshape(row)

    def _read(self, indices: Sequence[int]) -> Iterator[tuple[int, Any]]:
        if isinstance(self.rows, list):
            yield from ((index, self.rows[index]) for index in indices)
            return
        for start in range(0, len(indices), _BATCH):
            chunk = list(indices[start : start + _BATCH])
            try:
                batch = self.rows[chunk]
                rows: list[Any] = [
                    dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)
                ]
            except UnicodeDecodeError:
                rows = [_row_or_bad(self.rows, index) for index in chunk]
            yield from zip(chunk, rows, strict=True)

    def _reshape(self, row: Mapping[str, Any]) -> dict[str, Any]:
        names = row if self.select is None else [name for name in self.select if name in row]
        new = self._new_names()
        return {self.rename.get(name, name): row[name] for name in names if name in self.rename or name not in new}

    def example(self) -> dict[str, Any]:
        """A row to recognise the format by: an early one without nulls, or else the first that can be read."""
        columns = self.columns()
        fallback: dict[str, Any] = {}
        for _, row in islice(self, 100):
            if isinstance(row, Mapping):
                full = {**dict.fromkeys(columns), **row}
                if all(value is not None for value in full.values()):
                    return full
                fallback = fallback or full
        return fallback


def _row_or_bad(rows: Any, index: int) -> Any:
    try:
        return rows[index]
    except UnicodeDecodeError as error:
        return BadRow(
            "invalid_utf8", "row", f"bytes that are not UTF-8: {error.reason}", remedy="save the file as UTF-8"
        )


def suffix_of(path: Path) -> str | None:
    """The known suffix that ``path`` ends with."""
    return next((suffix for suffix in sorted(SUFFIXES, key=len, reverse=True) if path.name.endswith(suffix)), None)


def read_file(path: Path) -> RawTable:
    """Read a local data file.

    Args:
        path: ``.json``, ``.jsonl`` (either with ``.gz``), ``.parquet`` or ``.csv``.

    Returns:
        Its rows. Lines that cannot be read are :class:`BadRow` entries, so that the policy can decide about them.

    Raises:
        DataError: The file as a whole cannot be read.
    """
    suffix = suffix_of(path)
    if suffix is None:
        raise DataError("unknown kind of file", where=str(path), allowed=", ".join(SUFFIXES))
    if suffix == ".parquet":
        return _read_parquet(path)
    text = _read_text(path)
    if suffix == ".csv":
        table = _read_csv(path, text)
    elif text.lstrip()[:1] == "[" and not suffix.startswith(".jsonl"):
        table = _read_json_array(path, text)
    else:
        table = _read_json_lines(path, text)
    if not table.rows:
        raise DataError("the file holds no rows", where=str(path), remedy="check that it was written completely")
    return table


def _read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
        if path.name.endswith(".gz"):
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(f"the file cannot be read: {reason}", where=str(path)) from error
    # Bytes that are not UTF-8 stay recognisable, so that the row they are in can be named or skipped.
    return data.decode("utf-8", errors="surrogateescape").removeprefix("\ufeff")


def _read_json_array(path: Path, text: str) -> RawTable:
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"malformed JSON: {error.msg}", where=f"{path}:{error.lineno}", remedy="correct the file"
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"unreadable JSON: {_unreadable(error)}", where=str(path), remedy="correct the file") from error
    return RawTable(str(path), rows, lambda index: f"{path}, row {index} (the first is 0)")


def _read_json_lines(path: Path, text: str) -> RawTable:
    rows: list[Any] = []
    numbers: list[int] = []
    # Only \n ends a line: JSON text may hold the other characters that str.splitlines() breaks at.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        numbers.append(number)
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            rows.append(
                BadRow(
                    "malformed_json",
                    "line",
                    f"malformed JSON at column {error.colno}: {error.msg}",
                    value=line[max(0, error.pos - 20) : error.pos + 20],
                    remedy="correct the line or set on_bad_rows: skip",
                    raw=line,
                )
            )
        except (ValueError, RecursionError) as error:
            remedy = "correct the line or set on_bad_rows: skip"
            why = f"unreadable JSON: {_unreadable(error)}"
            rows.append(BadRow("malformed_json", "line", why, value=line[:40], remedy=remedy, raw=line))
    return RawTable(str(path), rows, lambda index: f"{path}:{numbers[index]}")


def _unreadable(error: Exception) -> str:
    # Python reads neither brackets a thousand deep nor numbers of thousands of digits.
    return "nested too deep" if isinstance(error, RecursionError) else str(error).split(";")[0]


def _read_csv(path: Path, text: str) -> RawTable:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    rows: list[Any] = []
    numbers: list[int] = []
    start = 2
    try:
        for row in reader:
            extra = row.pop(None, None)
            short = None in row.values()
            numbers.append(start)
            start = reader.line_num + 1
            rows.append(_wrong_width(extra) if extra is not None or short else row)
    except csv.Error as error:
        raise DataError(
            f"malformed CSV: {error}", where=f"{path}:{reader.line_num}", remedy="quote fields with commas or line ends"
        ) from error
    return RawTable(str(path), rows, lambda index: f"{path}:{numbers[index]}")


def _wrong_width(extra: Any) -> BadRow:
    return BadRow(
        "wrong_number_of_fields",
        "row",
        "more fields than the header has" if extra is not None else "fewer fields than the header has",
        remedy="quote fields with commas, or set on_bad_rows: skip",
    )


def _read_parquet(path: Path) -> RawTable:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Dataset

    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"not a readable parquet file: {error}", where=str(path)) from error
    return RawTable(str(path), Dataset(table), lambda index: f"{path}, row {index} (the first is 0)")


def from_dataset(name: str, dataset: Any) -> RawTable:
    """A loaded ``datasets.Dataset`` as a raw table."""
    return RawTable(name, dataset.with_format(None), lambda index: f"{name}, row {index} (the first is 0)")


@dataclass(frozen=True)
class Origin:
    """A data set that can be read split by split.

    Attributes:
        name: What the user called it.
        splits: Names of its splits; ``None`` where only reading can tell.
        read_split: Split name -> rows.
    """

    name: str
    splits: tuple[str, ...] | None
    read_split: Callable[[str], RawTable]

    def read(self, split: str) -> RawTable:
        """Rows of a split; ``train[:100]`` and ``train[10%:20%]`` cut it as ``datasets`` does."""
        base, bracket, _ = split.partition("[")
        if self.splits is None:
            return self.read_split(split)
        if base not in self.splits:
            raise ConfigError(
                "no such split",
                where=f"split of {self.name}",
                value=base,
                allowed=", ".join(self.splits),
                remedy=f"parts count too: {self.splits[0]}[:90%] to train on, {self.splits[0]}[90%:] to evaluate on",
            )
        table = self.read_split(base)
        if bracket:
            table.indices = _cut(split, base, len(table))
        return table


def _cut(split: str, base: str, num_rows: int) -> range:
    from datasets import ReadInstruction

    try:
        (part,) = ReadInstruction.from_spec(split).to_absolute({base: num_rows})
    except (ValueError, AssertionError) as error:
        raise ConfigError(
            f"cannot read the split: {error}", where="split", value=split, allowed="train, train[:100], train[10%:20%]"
        ) from error
    return range(part.from_ or 0, num_rows if part.to is None else part.to)


def find(name: str, config: str | None = None) -> Origin:
    """Find a data set by its name.

    Args:
        name: Hub id, local data file, folder written by ``save_to_disk``, or folder of data files named after splits.
        config: Configuration, for data sets of the Hub.

    Returns:
        Where to read it from.

    Raises:
        DataError: A local name that does not exist or holds nothing readable.
        ConfigError: ``config`` given for a local data set.
    """
    path = Path(name).expanduser()
    if not path.exists():
        if suffix_of(path) or name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise DataError("no such file", where="dataset_name", value=name, remedy=_nearby(path))
        return _hub(name, config)
    if config is not None:
        raise ConfigError(
            "a local data set has no configurations", where="dataset_config", value=config, remedy="leave it out"
        )
    if path.is_file():
        return Origin(name, ("train",), lambda split: read_file(path))
    if not path.is_dir():
        # A pipe or a device may never end, and cannot be read twice.
        raise DataError(
            "neither a file nor a folder", where="dataset_name", value=name, remedy="write the rows into a file first"
        )
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        return _saved(name, path)
    return _folder(name, path)


def _saved(name: str, path: Path) -> Origin:
    from preftune.data.saved import load_saved, undamaged

    splits = load_saved(name, path)

    def read(split: str) -> RawTable:
        with undamaged(name):
            return from_dataset(name, splits[split]())

    return Origin(name, tuple(splits), read)


def _nearby(path: Path) -> str | None:
    import difflib

    folder = path.parent
    names = [item.name for item in folder.iterdir()] if folder.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=1)
    if near:
        return f"did you mean {str(folder / near[0])!r}?"
    return None if folder.is_dir() else f"the folder {str(folder)!r} does not exist either"


def _folder(name: str, path: Path) -> Origin:
    files: dict[str, list[Path]] = {}
    for item in sorted(path.iterdir()):
        suffix = suffix_of(item)
        if suffix and item.is_file():
            files.setdefault(item.name[: -len(suffix)].split("-0")[0], []).append(item)
    if not files:
        raise DataError(
            "the folder holds no data set",
            where=name,
            allowed=f"a save_to_disk folder, or files such as train.jsonl and test.jsonl ({', '.join(SUFFIXES)})",
        )

    def read(split: str) -> RawTable:
        tables = [read_file(item) for item in files[split]]
        if len(tables) == 1:
            return tables[0]
        rows = [(place, row) for table in tables for place, row in table]
        return RawTable(name, [row for _, row in rows], lambda index: rows[index][0])

    return Origin(name, tuple(files), read)


def _hub(name: str, config: str | None) -> Origin:
    def read(split: str) -> RawTable:
        import datasets

        try:
            return from_dataset(f"{name} ({split})", datasets.load_dataset(name, config, split=split))
        except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
            first_line = (str(error).splitlines() or [type(error).__name__])[0]
            raise DataError(
                f"cannot be loaded from the Hub: {first_line}",
                where=f"dataset_name {name!r}",
                remedy="check the id, the configuration, the split and the network; a local file needs its suffix",
            ) from error

    return Origin(name, None, read)


def hub_splits(name: str, config: str | None) -> tuple[str, ...]:
    """Names of the splits of a data set on the Hub; empty where they cannot be listed."""
    import datasets

    try:
        return tuple(datasets.get_dataset_split_names(name, config))
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError):
        return ()
