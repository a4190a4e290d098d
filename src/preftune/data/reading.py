"""Local files: JSON in its forms, CSV, Arrow and Parquet, packed or not, in whatever encoding they were saved."""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import re
import sys
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from preftune.data.formats.base import BadRow
from preftune.data.json_text import read_json
from preftune.data.tables import RawTable, from_dataset
from preftune.errors import DataError

_TEXT = (".json", ".jsonl", ".jsonlines", ".ndjson", ".csv", ".tsv")
_TABLES = (".parquet", ".arrow", ".feather")


def _unzstd(data: bytes) -> bytes:
    import pyarrow as pa

    return bytes(pa.CompressedInputStream(pa.BufferReader(data), "zstd").read())


#: Suffix of packed files -> the bytes that they begin with, and what unpacks them.
_PACKED: Mapping[str, tuple[bytes, Callable[[bytes], bytes]]] = {
    ".gz": (b"\x1f\x8b", gzip.decompress),
    ".bz2": (b"BZh", bz2.decompress),
    ".xz": (b"\xfd7zXZ\x00", lzma.decompress),
    ".zst": (b"\x28\xb5\x2f\xfd", _unzstd),
}
SUFFIXES = (*_TEXT, *(f"{suffix}{packed}" for packed in _PACKED for suffix in _TEXT), *_TABLES)
#: The same for messages.
SUFFIXES_TOLD = f"{', '.join(_TEXT)} (each also with {', '.join(_PACKED)}), {', '.join(_TABLES)}"
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_ARCHIVE = "unpack it first"
_PICKLED = "pickled files run code when they are read; write the rows as JSON lines"
_DATABASE = "write the rows as JSON lines or CSV, as `sqlite3 -json FILE 'select ...'` does"
_OTHER_KINDS = {
    ".xlsx": "save the sheet as CSV (UTF-8)",
    ".xls": "save the sheet as CSV (UTF-8)",
    ".ods": "save the sheet as CSV (UTF-8)",
    ".txt": "rename it to .jsonl if every line is JSON",
    ".zip": _ARCHIVE,
    ".tar": _ARCHIVE,
    ".gz": _ARCHIVE,
    ".tgz": _ARCHIVE,
    ".zst": _ARCHIVE,
    ".bz2": _ARCHIVE,
    ".xz": _ARCHIVE,
    ".7z": _ARCHIVE,
    ".pkl": _PICKLED,
    ".pickle": _PICKLED,
    ".pt": _PICKLED,
    ".db": _DATABASE,
    ".sqlite": _DATABASE,
    ".sqlite3": _DATABASE,
    ".yaml": "write the rows as JSON lines",
    ".yml": "write the rows as JSON lines",
}
#: What the file that Git LFS leaves in place of another begins with.
_POINTER = b"version https://git-lfs"
#: What files begin with that are not what their name says, and what to do about it.
_MISNAMED = (
    (b"<!DOCTYPE html", "this is a web page, not the file", "download the file itself"),
    (b"<html", "this is a web page, not the file", "download the file itself"),
    (b"PAR1", "this is a Parquet file under another name", "rename it to .parquet"),
    (b"ARROW1", "this is an Arrow file under another name", "rename it to .arrow"),
    (b"PK\x03\x04", "this is a packed archive or a sheet", "unpack it, or save the sheet as CSV (UTF-8)"),
    (b"SQLite format 3", "this is a database", _DATABASE),
)
#: A field of one line that begins and ends with a quote.
_QUOTED_FIELD = re.compile(r'(?:^|\t)"(?:[^"\t\n]|"")*"(?=\t|\r?$)', re.MULTILINE)
_SEPARATOR_LINE = re.compile(r'\A"?sep=(.)"?\r?\n')


def suffix_of(path: Path) -> str | None:
    """The known suffix that ``path`` ends with, in either case."""
    name = path.name.lower()
    return next((suffix for suffix in sorted(SUFFIXES, key=len, reverse=True) if name.endswith(suffix)), None)


def read_file(path: Path) -> RawTable:
    """Read a local data file.

    Args:
        path: ``.json``, ``.jsonl``, ``.csv``, ``.tsv`` (each also packed), ``.parquet``, ``.arrow`` or ``.feather``.

    Returns:
        Its rows. Lines that cannot be read are :class:`BadRow` entries, so that the policy can decide about them.

    Raises:
        DataError: The file as a whole cannot be read.
    """
    suffix = suffix_of(path) or _suffix_within(path)
    if suffix is None:
        remedy = _OTHER_KINDS.get(path.suffix.lower(), "convert the file to one of these")
        raise DataError("unknown kind of file", where=str(path), allowed=SUFFIXES_TOLD, remedy=remedy)
    _refuse_pointer(path)
    if suffix in _TABLES:
        return _read_arrow(path, suffix)
    text = _decode(_read_bytes(path))
    if suffix.startswith((".csv", ".tsv")):
        table = _read_csv(path, text, "\t" if suffix.startswith(".tsv") else None)
    else:
        table = read_json(path, text, lines=not suffix.startswith(".json.") and suffix != ".json")
    if not table.rows:
        raise DataError("the file holds no rows", where=str(path), remedy="check that it was written completely")
    if isinstance(table.rows, list) and not any(isinstance(row, Mapping) for row in table.rows):
        raise _no_row(table)
    return table


def _suffix_within(path: Path) -> str | None:
    """What a file without a known suffix is, if it holds JSON: objects on lines of their own, or one array."""
    if path.suffix.lower() not in ("", ".txt", ".data", ".log"):
        return None
    with suppress(OSError), open(path, "rb") as file:
        head = file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")
        return {b"{": ".jsonl", b"[": ".json"}.get(head[:1])
    return None


def _refuse_pointer(path: Path) -> None:
    """Refuse a Git LFS pointer, whatever kind of file it stands for."""
    with suppress(OSError), open(path, "rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            remedy = "fetch it with `git lfs pull`"
            raise DataError("a Git LFS pointer in place of the file", where=str(path), remedy=remedy)


def _no_row(table: RawTable) -> DataError:
    """The error of a file of which nothing is a row, by its first entry."""
    first = table.rows[0]
    if isinstance(first, BadRow):
        value = {} if first.value is None else {"value": first.value}
        return DataError(f"no row can be read: {first.what}", where=table.place(0), remedy=first.remedy, **value)
    return DataError(
        "the rows have no columns", where=table.place(0), value=first, remedy="write every row as {column: value}"
    )


def _read_bytes(path: Path) -> bytes:
    """What a file holds, unpacked where it is packed, whatever its name says about that."""
    try:
        data = path.read_bytes()
        packed = next((name for name in _PACKED if path.name.lower().endswith(name)), None)
        packed = packed or next((name for name, (mark, _) in _PACKED.items() if data.startswith(mark)), None)
        data = data if packed is None else _PACKED[packed][1](data)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(f"the file cannot be read: {reason}", where=str(path)) from error
    for mark, what, remedy in _MISNAMED:
        if data[: len(mark) + 8].lstrip().lower().startswith(mark.lower()):
            raise DataError(what, where=str(path), remedy=remedy)
    return data


def _decode(data: bytes) -> str:
    for mark, encoding in _MARKS:
        if data.startswith(mark):
            return data.decode(encoding, errors="replace").removeprefix("\ufeff")
    # Text of two bytes a character without its mark: every other byte of Latin text is zero.
    if len(data) > 3 and data[:64].count(0) * 3 > len(data[:64]):
        return data.decode("utf-16-be" if data[0] == 0 else "utf-16-le", errors="replace")
    # Bytes that are not UTF-8 stay recognisable, so that the row they are in can be named or skipped.
    return data.decode("utf-8", errors="surrogateescape").removeprefix("\ufeff")


def _first_line(text: str) -> str:
    """A header, whose names may hold line ends between quotes."""
    start, quotes = 0, 0
    while (end := text.find("\n", start)) >= 0:
        quotes += text.count('"', start, end)
        if quotes % 2 == 0:
            return text[:end]
        start = end + 1
    return text


def _delimiter(text: str) -> str:
    """What divides the fields of a header; where nothing does, a mark that no text has, as a line is one field then."""
    header = _first_line(text)
    # The one that occurs most: a comma may be a part of a name.
    mark = max((",", ";", "\t", "|"), key=header.count)
    return mark if mark in header else "\x1f"


def _read_csv(path: Path, text: str, delimiter: str | None) -> RawTable:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    told = _SEPARATOR_LINE.match(text)
    before = 0 if told is None else 1
    if told is not None:
        # Excel writes into a line of its own what divides the fields.
        text, delimiter = text[told.end() :], told.group(1)
    if "\n" not in text:
        text = text.replace("\r", "\n")
    mark = delimiter or _delimiter(text)
    if mark == "\t" and '"' in text and not _QUOTED_FIELD.search(text):
        # Tools that write tabs between fields often quote nothing.
        plain = _table_of(path, text, mark, before, csv.QUOTE_NONE)
        if not any(isinstance(row, BadRow) for row in plain.rows):
            return plain
    try:
        return _plain_or_spaced(path, text, mark, before)
    except csv.Error as error:
        raise DataError(
            f"malformed CSV: {str(error.args[0]).replace(repr(mark), 'a separator')}",
            where=f"{path}:{error.args[-1]}",
            remedy="quote fields with commas or line ends, and write quotes in them twice",
        ) from error


def _plain_or_spaced(path: Path, text: str, mark: str, before: int) -> RawTable:
    """A table as it stands or, where that divides quoted fields, as one with spaces between comma and quote."""
    spaced = f'{mark} "' in text
    try:
        plain = _table_of(path, text, mark, before, csv.QUOTE_MINIMAL)
    except csv.Error:
        if not spaced:
            raise
        return _table_of(path, text, mark, before, csv.QUOTE_MINIMAL, spaces=True)
    if spaced and any(isinstance(row, BadRow) for row in plain.rows):
        with suppress(csv.Error):
            other = _table_of(path, text, mark, before, csv.QUOTE_MINIMAL, spaces=True)
            return other if not any(isinstance(row, BadRow) for row in other.rows) else plain
    return plain


def _table_of(
    path: Path, text: str, mark: str, before: int, quoting: Literal[0, 3], *, spaces: bool = False
) -> RawTable:
    file = io.StringIO(text, newline="")
    reader = csv.reader(file, strict=True, delimiter=mark, quoting=quoting, skipinitialspace=spaces)
    rows: list[Any] = []
    numbers: list[int] = []
    try:
        names = _header(path, next(reader, []))
        start = reader.line_num + 1
        for cells in reader:
            # Sheets end with rows of nothing but separators.
            if any(cell.strip() for cell in cells):
                numbers.append(start + before)
                rows.append(_row_of(names, cells))
            start = reader.line_num + 1
    except csv.Error as error:
        raise csv.Error(str(error), reader.line_num) from error
    return RawTable(str(path), rows, lambda index: f"{path}:{numbers[index]}")


def _row_of(names: list[str], cells: list[str]) -> dict[str, str] | BadRow:
    if len(cells) != len(names):
        return _wrong_width(len(cells), len(names))
    if [cell.strip() for cell in cells] == names:
        what = "the header once more, as files that were put together have it"
        return BadRow("header_repeated", "row", what, remedy="remove the line, or set on_bad_rows: skip")
    return dict(zip(names, cells, strict=True))


def _header(path: Path, cells: list[str]) -> list[str]:
    names = [cell.strip() for cell in cells]
    twice = sorted({name for name in names if names.count(name) > 1 and name})
    if twice:
        raise DataError(
            "two columns have the same name", where=f"{path}:1", value=twice, remedy="give each a name of its own"
        )
    return names


def _wrong_width(number: int, wanted: int) -> BadRow:
    more = "more" if number > wanted else "fewer"
    return BadRow(
        "wrong_number_of_fields",
        "row",
        f"{more} fields than the header has ({number}, not {wanted})",
        remedy="quote fields with commas, or set on_bad_rows: skip",
    )


def _read_arrow(path: Path, suffix: str) -> RawTable:
    import pyarrow as pa
    import pyarrow.feather
    import pyarrow.parquet as pq
    from datasets import Dataset

    try:
        with open(path, "rb") as file:
            marked = file.read(6) == b"ARROW1"
        if suffix == ".parquet":
            table = pq.read_table(path)
        elif marked or suffix == ".feather":
            table = pyarrow.feather.read_table(path)
        else:
            return from_dataset(str(path), Dataset.from_file(str(path)))
    except (OSError, pa.ArrowException) as error:
        kind = suffix.removeprefix(".")
        raise DataError(f"not a readable {kind} file: {error}", where=str(path)) from error
    return from_dataset(str(path), Dataset(_readable(table)))


def _readable(table: Any) -> Any:
    """An Arrow table with columns of types that the library does not know as JSON text."""
    import pyarrow as pa
    from datasets.features.features import generate_from_arrow_type

    for place, field in enumerate(table.schema):
        try:
            generate_from_arrow_type(field.type)
        except (ValueError, TypeError, NotImplementedError, pa.ArrowException):
            texts = [None if value is None else json.dumps(value, default=str) for value in table[place].to_pylist()]
            table = table.set_column(place, field.name, pa.array(texts, pa.string()))
    return table
