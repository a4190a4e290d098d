"""Rows as they were found, with the place of each, and the columns to take from them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from preftune.data.arrow import rows_of, with_class_names
from preftune.data.formats.base import BadRow
from preftune.data.formats.openings import SYSTEMS
from preftune.data.formats.turns import parsed

_BATCH = 1000
OPENING = (*SYSTEMS, "history")


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
        opening: Columns of system turn and history that other pieces of the same data have.
    """

    name: str
    rows: Any
    place: Callable[[int], str]
    select: Sequence[str] | None = None
    rename: Mapping[str, str] = field(default_factory=dict)
    indices: Sequence[int] | None = None
    opening: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.rows) if self.indices is None else len(self.indices)

    def raw_columns(self) -> list[str]:
        """Names of all columns as found."""
        if hasattr(self.rows, "column_names"):
            return list(self.rows.column_names)
        return list(dict.fromkeys(key for row in self.rows if isinstance(row, Mapping) for key in row))

    def columns(self) -> list[str]:
        """Names of the columns after selection and renaming."""
        raw = self.raw_columns()
        kept = [*raw, *self._nested(raw)] if self.select is None else list(self.select)
        return [self.rename.get(name, name) for name in kept if name in self.rename or name not in self._new_names()]

    def _nested(self, raw: Sequence[str]) -> list[str]:
        return [name for name in self.rename if is_within(raw, name)]

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
            # A row without them among rows that have them is a row whose system turn and history are empty.
            names = {*self.raw_columns(), *self.opening, *self._new_names()}
            absent = dict.fromkeys(name for name in OPENING if name in names)
            for index in indices:
                row = self.rows[index]
                yield index, {**absent, **row} if absent and isinstance(row, Mapping) else row
            return
        for start in range(0, len(indices), _BATCH):
            chunk = list(indices[start : start + _BATCH])
            try:
                rows: list[Any] = list(rows_of(self.rows, chunk))
            except UnicodeDecodeError:
                rows = [_row_or_bad(self.rows, index) for index in chunk]
            yield from zip(chunk, rows, strict=True)

    def _reshape(self, row: Mapping[str, Any]) -> dict[str, Any]:
        columns = list(row)
        names = columns if self.select is None else [name for name in self.select if name in row]
        new = self._new_names()
        nested = {self.rename[name]: within(row, name) for name in self._nested(columns)}
        return nested | {
            self.rename.get(name, name): row[name] for name in names if name in self.rename or name not in new
        }

    def first(self) -> list[dict[str, Any]]:
        """The first hundred rows, each with all columns."""
        columns = dict.fromkeys(self.columns())
        return [{**columns, **row} for _, row in islice(self, 100) if isinstance(row, Mapping)]

    def example(self, first: Sequence[Mapping[str, Any]] | None = None) -> dict[str, Any]:
        """A row to recognise the format by: of the first ones the most ordinary, with the fewest nulls."""
        rows = [dict(row) for row in (self.first() if first is None else first)]
        if not rows:
            return {}
        kinds = {name: Counter(type(row[name]) for row in rows) for name in rows[0]}
        usual = {name: found.most_common(2) for name, found in kinds.items()}

        def ordinary(row: Mapping[str, Any]) -> tuple[int, int, int]:
            alike = sum(type(row[name]) is _kind(usual[name]) for name in kinds)
            # A short answer may look like a name or a label, a long one does not.
            length = sum(len(value) for value in row.values() if isinstance(value, str))
            return alike, sum(row[name] not in (None, "") for name in kinds), length

        return max(rows, key=ordinary)


def _kind(usual: list[tuple[type, int]]) -> type:
    """The type of most values that are no nulls."""
    return next((kind for kind, _ in usual if kind is not type(None)), type(None))


def _row_or_bad(rows: Any, index: int) -> Any:
    try:
        return rows_of(rows, [index])[0]
    except UnicodeDecodeError as error:
        return BadRow(
            "invalid_utf8", "row", f"bytes that are not UTF-8: {error.reason}", remedy="save the file as UTF-8"
        )


def from_dataset(name: str, dataset: Any) -> RawTable:
    """A loaded ``datasets.Dataset`` as a raw table."""
    return RawTable(
        name, with_class_names(dataset.with_format(None)), lambda index: f"{name}, row {index} (the first is 0)"
    )


def within(row: Mapping[str, Any], path: str) -> Any:
    """The value at a path such as ``data.answers.0.text``; ``None`` where there is none.

    Args:
        row: A row. Fields that hold JSON text are looked into as well.
        path: Names of fields and positions in lists, with dots between them.
    """
    value: Any = row
    for name in path.split("."):
        value = parsed(value) if isinstance(value, str) else value
        if isinstance(value, Mapping):
            value = value.get(name)
        elif isinstance(value, list) and name.lstrip("-").isdigit() and -len(value) <= int(name) < len(value):
            value = value[int(name)]
        else:
            return None
    return value


def is_within(columns: Sequence[str], path: str) -> bool:
    """Whether a name leads into one of the columns."""
    return path not in columns and "." in path and path.split(".")[0] in columns
