"""Local files: JSON in its forms, CSV, Arrow and Parquet, in whatever encoding they were saved."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import sys
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from preftune.data.formats.base import BadRow
from preftune.data.formats.turns import is_messages
from preftune.data.tables import RawTable, from_dataset
from preftune.errors import DataError

_TEXT = (".json", ".jsonl", ".ndjson", ".csv", ".tsv")
SUFFIXES = (*_TEXT, *(f"{suffix}.gz" for suffix in _TEXT), ".parquet", ".arrow")
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_OTHER_KINDS = {
    ".xlsx": "save the sheet as CSV (UTF-8)",
    ".xls": "save the sheet as CSV (UTF-8)",
    ".txt": "rename it to .jsonl if every line is JSON",
    ".zip": "unpack it first",
    ".zst": "unpack it first (zstd -d)",
    ".bz2": "unpack it first",
    ".pkl": "pickled files run code when they are read; write the rows as JSON lines",
    ".pt": "pickled files run code when they are read; write the rows as JSON lines",
    ".yaml": "write the rows as JSON lines",
}


def suffix_of(path: Path) -> str | None:
    """The known suffix that ``path`` ends with."""
    return next((suffix for suffix in sorted(SUFFIXES, key=len, reverse=True) if path.name.endswith(suffix)), None)


def read_file(path: Path) -> RawTable:
    """Read a local data file.

    Args:
        path: ``.json``, ``.jsonl``, ``.csv``, ``.tsv`` (each also with ``.gz``), ``.parquet`` or ``.arrow``.

    Returns:
        Its rows. Lines that cannot be read are :class:`BadRow` entries, so that the policy can decide about them.

    Raises:
        DataError: The file as a whole cannot be read.
    """
    suffix = suffix_of(path)
    if suffix is None:
        remedy = _OTHER_KINDS.get(path.suffix.lower(), "convert the file to one of these")
        raise DataError("unknown kind of file", where=str(path), allowed=", ".join(SUFFIXES), remedy=remedy)
    if suffix in (".parquet", ".arrow"):
        return _read_arrow(path, suffix)
    text = _read_text(path)
    if suffix.startswith((".csv", ".tsv")):
        table = _read_csv(path, text, "\t" if suffix.startswith(".tsv") else _delimiter(text))
    else:
        table = _read_json(path, text, lines=not suffix.startswith(".json.") and suffix != ".json")
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
    for mark, encoding in _MARKS:
        if data.startswith(mark):
            return data.decode(encoding, errors="replace").removeprefix("\ufeff")
    # Text of two bytes a character without its mark: every other byte of Latin text is zero.
    if len(data) > 3 and data[:64].count(0) * 3 > len(data[:64]):
        return data.decode("utf-16-be" if data[0] == 0 else "utf-16-le", errors="replace")
    # Bytes that are not UTF-8 stay recognisable, so that the row they are in can be named or skipped.
    return data.decode("utf-8", errors="surrogateescape").removeprefix("\ufeff")


def _read_json(path: Path, text: str, *, lines: bool) -> RawTable:
    """JSON lines, one array of rows, or one object that holds the rows."""
    first = text.lstrip()[:1]
    if first == "[":
        if not lines:
            return _read_json_array(path, text)
        whole = _whole(text)
        if isinstance(whole, list) and (not whole or isinstance(whole[0], Mapping)):
            return _of_rows(path, whole)
    if first == "{":
        whole = _whole(text)
        rows = _rows_within(whole, path) if isinstance(whole, Mapping) else None
        if rows is not None:
            return _of_rows(path, rows)
        if isinstance(whole, Mapping) and "\n" in text.strip():
            return _of_rows(path, [whole])
    return _read_json_lines(path, text)


def _whole(text: str) -> Any:
    """What a text holds as one JSON value; ``None`` where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _of_rows(path: Path, rows: list[Any]) -> RawTable:
    if rows and all(isinstance(row, Mapping) and {"row", "row_idx"} <= set(row) for row in rows):
        # What the Hub's viewer answers with.
        rows = [row["row"] for row in rows]
    if rows and all(map(is_messages, rows)):
        # Conversations alone, without a name.
        rows = [{"messages": row} for row in rows]
    return RawTable(str(path), rows, lambda index: f"{path}, row {index} (the first is 0)")


def _rows_within(whole: Mapping[str, Any], path: Path) -> list[Any] | None:
    """The rows of a JSON object that holds them as a list, or column by column; ``None`` where it is a row itself."""
    served = whole.get("rows")
    if isinstance(served, list) and served and isinstance(served[0], Mapping) and "row_idx" in served[0]:
        return served
    tables = [
        key
        for key, value in whole.items()
        if isinstance(value, list) and value and isinstance(value[0], Mapping) and not is_messages(value)
    ]
    alone = len(tables) == 1 and sum(isinstance(value, list) for value in whole.values()) == 1
    if alone and not _is_ranked(whole, tables[0]):
        return list(whole[tables[0]])
    if len(tables) > 1 and len(tables) == len(whole):
        raise DataError(
            f"the file holds several tables: {', '.join(tables)}",
            where=str(path),
            remedy="write one file per split, or a folder of files named after splits",
        )
    values = list(whole.values())
    if len(values) < 2:
        return None
    columns = all(isinstance(value, list) and len(value) == len(values[0]) for value in values)
    # A list of conversations is a column, and so is a list of texts; a list of turns is a conversation of one row.
    chats = any(isinstance(value, list) and bool(value) and is_messages(value[0]) for value in values)
    texts = any(isinstance(value, list) and bool(value) and isinstance(value[0], str) for value in values)
    if columns and (chats or (texts and not any(is_messages(value) for value in values))):
        return [dict(zip(whole, cells, strict=True)) for cells in zip(*values, strict=True)]
    numbered = all(isinstance(value, Mapping) and set(value) == set(values[0]) for value in values)
    if numbered and all(str(key).isdigit() for key in values[0]):
        return [{column: whole[column][key] for column in whole} for key in values[0]]
    return None


def _is_ranked(whole: Mapping[str, Any], table: str) -> bool:
    """Whether the one list of an object is that of a row's rated answers, beside their prompt."""
    return any(isinstance(whole.get(name), str) for name in ("prompt", "question", "instruction")) and table != "data"


def _read_json_array(path: Path, text: str) -> RawTable:
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"malformed JSON: {error.msg}", where=f"{path}:{error.lineno}", remedy="correct the file"
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"unreadable JSON: {_unreadable(error)}", where=str(path), remedy="correct the file") from error
    return _of_rows(path, rows)


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


def _delimiter(text: str) -> str:
    """What divides the fields of a header; commas unless there are none."""
    header = text.partition("\n")[0]
    return "," if "," in header else next((mark for mark in (";", "\t", "|") if mark in header), ",")


def _read_csv(path: Path, text: str, delimiter: str) -> RawTable:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter)
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


def _read_arrow(path: Path, suffix: str) -> RawTable:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Dataset

    try:
        if suffix == ".arrow":
            return from_dataset(str(path), Dataset.from_file(str(path)))
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        kind = suffix.removeprefix(".")
        raise DataError(f"not a readable {kind} file: {error}", where=str(path)) from error
    return from_dataset(str(path), Dataset(table))
