"""JSON as people have it: lines, arrays, objects that hold the rows, values one after another, Python's own print."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from preftune.data.formats.base import BadRow
from preftune.data.formats.turns import is_exchanges, is_messages, is_turn, parsed
from preftune.data.tables import RawTable
from preftune.errors import DataError

#: What objects call the rows that they hold.
_TABLES = ("data", "rows", "train", "test", "examples", "samples", "items", "records", "instances", "results",
           "dataset", "entries", "pairs", "preferences", "comparisons")  # fmt: skip
_BETWEEN = re.compile(r"[\s,]*")


def read_json(path: Path, text: str, *, lines: bool) -> RawTable:
    """Rows of JSON text in any of its forms.

    Args:
        path: The file, for messages.
        text: What it holds.
        lines: Whether its name promises one object a line.

    Returns:
        The rows. Lines that cannot be read are :class:`BadRow` entries.

    Raises:
        DataError: The text as a whole cannot be read.
    """
    if "\n" not in text and "\r" in text:
        # Line ends of old Macintoshes.
        text = text.replace("\r", "\n")
    first = text.lstrip()[:1]
    if first == "[":
        if not lines:
            return _read_array(path, text)
        whole = _whole(text)
        if isinstance(whole, list) and (not whole or isinstance(whole[0], Mapping)):
            return _of_rows(path, whole)
    if first == "{":
        whole = _whole(text)
        one_line = "\n" not in text.strip()
        rows = _rows_within(whole, path, one_line) if isinstance(whole, Mapping) else None
        if rows is not None:
            return _of_rows(path, rows)
        if isinstance(whole, Mapping) and not one_line:
            return _of_rows(path, [whole])
    return read_lines(path, text)


def _load(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_unique)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; two values under one name are refused, because the first would be lost without a word."""
    out = dict(pairs)
    if len(out) != len(pairs):
        for key, value in pairs:
            if out[key] != value:
                raise ValueError(f"two values are called {key!r}")
    return out


def _whole(text: str) -> Any:
    """What a text holds as one JSON value; ``None`` where it is none."""
    try:
        return _load(text)
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


def _rows_within(whole: Mapping[str, Any], path: Path, one_line: bool) -> list[Any] | None:
    """The rows of a JSON object that holds them as a list, or column by column; ``None`` where it is a row itself."""
    names, cells = whole.get("columns"), whole.get("data")
    if isinstance(names, list) and isinstance(cells, list) and all(isinstance(row, list) for row in cells):
        # pandas, orient="split".
        return [dict(zip(names, row, strict=False)) for row in cells]
    served = whole.get("rows")
    if isinstance(served, list) and served and isinstance(served[0], Mapping) and "row_idx" in served[0]:
        return served
    inner = next(iter(whole.values())) if len(whole) == 1 else whole.get("data")
    if isinstance(inner, Mapping):
        # Answers of services wrap what they return.
        found = _rows_within(inner, path, one_line)
        if found is not None:
            return found
    tables = [key for key, value in whole.items() if _is_table(value)]
    alone = len(tables) == 1 and sum(isinstance(value, list) for value in whole.values()) == 1
    if alone and (tables[0].lower() in _TABLES or len(whole) == 1) and not _is_ranked(whole, tables[0]):
        return list(whole[tables[0]])
    if len(tables) > 1 and len(tables) == len(whole) and any(name.lower() in _TABLES for name in tables):
        raise DataError(
            f"the file holds several tables: {', '.join(tables)}",
            where=str(path),
            remedy="write one file per split, or a folder of files named after splits",
        )
    return None if len(whole) < 2 else _columns_within(whole)


def _is_table(value: Any) -> bool:
    if not isinstance(value, list) or not value or not isinstance(value[0], Mapping):
        return False
    return not is_messages(value) and not is_exchanges(value)


def _columns_within(whole: Mapping[str, Any]) -> list[Any] | None:
    """Rows of an object of columns, or of one that gives every row a name."""
    values = list(whole.values())
    columns = all(isinstance(value, list) and len(value) == len(values[0]) for value in values)
    # A list of conversations is a column, and so is a list of texts; a list of turns is a conversation of one row.
    chats = any(isinstance(value, list) and bool(value) and is_messages(value[0]) for value in values)
    texts = any(isinstance(value, list) and bool(value) and isinstance(value[0], str) for value in values)
    if columns and (chats or (texts and not any(is_messages(value) for value in values))):
        return [dict(zip(whole, cells, strict=True)) for cells in zip(*values, strict=True)]
    alike = all(isinstance(value, Mapping) and set(value) == set(values[0]) for value in values)
    if alike and all(map(is_turn, values)):
        # A row of one turn a column.
        return None
    if alike and values[0] and all(str(key).isdigit() for key in values[0]):
        return [{column: whole[column][key] for column in whole} for key in values[0]]
    return values if alike and len(values[0]) > 1 else None


def _is_ranked(whole: Mapping[str, Any], table: str) -> bool:
    """Whether the one list of an object is that of a row's rated answers, beside their prompt."""
    return any(isinstance(whole.get(name), str) for name in ("prompt", "question", "instruction")) and table != "data"


def _stream(text: str) -> list[Any] | None:
    """Objects one after another, with commas or without, in brackets or not; ``None`` where it is anything else."""
    decoder = json.JSONDecoder(object_pairs_hook=_unique)
    stripped = text.strip()
    inside = stripped.removeprefix("[").removesuffix("]") if stripped.startswith("[") else stripped
    rows: list[Any] = []
    position = _end(inside, 0)
    while position < len(inside):
        try:
            row, position = decoder.raw_decode(inside, position)
        except (ValueError, RecursionError):
            return None
        if not isinstance(row, Mapping):
            return None
        rows.append(row)
        position = _end(inside, position)
    return rows


def _end(text: str, position: int) -> int:
    found = _BETWEEN.match(text, position)
    return found.end() if found else position


def _read_array(path: Path, text: str) -> RawTable:
    try:
        rows = _load(text)
    except json.JSONDecodeError as error:
        # A comma after the last row, and nothing else, harms nobody.
        streamed = _stream(text)
        if streamed:
            return _of_rows(path, streamed)
        raise DataError(
            f"malformed JSON: {error.msg}", where=f"{path}:{error.lineno}", remedy="correct the file"
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"unreadable JSON: {_unreadable(error)}", where=str(path), remedy="correct the file") from error
    return _of_rows(path, rows)


def read_lines(path: Path, text: str, first: int = 1) -> RawTable:
    """Rows of text that holds one JSON object a line.

    Args:
        path: The file, for messages.
        text: What it holds, or a part of it.
        first: Number of the first line.

    Raises:
        DataError: No line from the beginning of the file can be read.
    """
    rows: list[Any] = []
    numbers: list[int] = []
    # Only \n ends a line: JSON text may hold the other characters that str.splitlines() breaks at.
    for number, line in enumerate(text.split("\n"), start=first):
        if line.strip() and not line.lstrip().startswith("//"):
            numbers.append(number)
            rows.append(_line(line))
    if first == 1 and rows and not any(isinstance(row, Mapping) for row in rows):
        streamed = _stream("\n".join(line for line in text.split("\n") if not line.lstrip().startswith("//")))
        if streamed:
            return _of_rows(path, streamed)
        bad = rows[0] if isinstance(rows[0], BadRow) else None
        if bad is not None and all(isinstance(row, BadRow) for row in rows):
            raise DataError(
                f"no line can be read: {bad.what}",
                where=f"{path}:{numbers[0]}",
                value=bad.value,
                remedy="write one JSON object a line, or one array of them",
            )
    return RawTable(str(path), rows, lambda index: f"{path}:{numbers[index]}")


def _line(line: str) -> Any:
    """What a line holds, or why it holds nothing. A comma at its end is left over from an array."""
    remedy = "correct the line or set on_bad_rows: skip"
    try:
        return _load(line)
    except json.JSONDecodeError as error:
        again = line.rstrip().removesuffix(",")
        found = _whole(again) if again != line.rstrip() else None
        # Python prints objects with quotes of another kind.
        found = parsed(again.strip()) if found is None and again.lstrip().startswith("{'") else found
        if isinstance(found, Mapping):
            return found
        return BadRow(
            "malformed_json",
            "line",
            f"malformed JSON at column {error.colno}: {error.msg}",
            value=line[max(0, error.pos - 20) : error.pos + 20],
            remedy=remedy,
            raw=line,
        )
    except (ValueError, RecursionError) as error:
        why = f"unreadable JSON: {_unreadable(error)}"
        return BadRow("malformed_json", "line", why, value=line[:40], remedy=remedy, raw=line)


def _unreadable(error: Exception) -> str:
    # Python reads neither brackets a thousand deep nor numbers of thousands of digits.
    return "nested too deep" if isinstance(error, RecursionError) else str(error).split(";")[0]
