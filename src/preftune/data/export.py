"""Rows of any format written as TRL's columns."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from preftune.data.convert import presented
from preftune.data.options import DataOptions
from preftune.errors import ConfigError, DataError, SetupError
from preftune.files import replacing

if TYPE_CHECKING:
    from datasets import Dataset

#: Endings of files that can be written.
SUFFIXES = (".jsonl", ".json", ".parquet")


def check_target(path: str | Path) -> Path:
    """The file to write; one that exists is left as it is.

    Raises:
        ConfigError: It has no known ending, is a folder, or exists.
    """
    target = Path(path).expanduser()
    if target.suffix not in SUFFIXES or target.is_dir():
        raise ConfigError("not a file to write to", where="--out", value=str(path), allowed=", ".join(SUFFIXES))
    if os.path.lexists(target):
        raise ConfigError(
            "the file exists and is left as it is", where="--out", value=str(path), remedy="name another file"
        )
    return target


def rows_of_columns(dataset: Dataset, options: DataOptions | None = None) -> Iterator[dict[str, Any]]:
    """Canonical rows without fields that are null.

    Args:
        dataset: What :func:`preftune.data.load` returned.
        options: What becomes of transcripts and of other text; by default they stay as they are.
    """
    for row in dataset:
        kept = {name: value for name, value in row.items() if value is not None}
        yield presented(kept, options)[0] if options else kept


def write(dataset: Dataset, path: str | Path, options: DataOptions | None = None) -> int:
    """Write canonical rows; a reader never sees half a file.

    Args:
        dataset: What :func:`preftune.data.load` returned.
        path: File to write, ending with one of :data:`SUFFIXES`.
        options: What becomes of transcripts and of other text; by default they stay as they are.

    Returns:
        The number of rows.

    Raises:
        ConfigError: A kind of file that is not written.
        SetupError: The file cannot be written.
        DataError: Some rows become conversations and others stay text.
    """
    target = check_target(path)
    rows = list(rows_of_columns(dataset, options))
    texts = [n for n, row in enumerate(rows) if isinstance(row.get("prompt", row.get("text")), str)]
    if options and options.transcripts == "messages" and 0 < len(texts) < len(rows):
        raise DataError(
            f"{len(texts)} of {len(rows)} rows cannot be made conversations as the others are, and would stay text",
            where=f"row {texts[0]} (the first is 0)",
            value=str(rows[texts[0]].get("prompt", rows[texts[0]].get("text")))[-60:],
            remedy="set transcripts: text, or correct these rows (an empty line before each `Human:` and `Assistant:`)",
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as beside:
            if target.suffix == ".parquet":
                from datasets import Dataset as HFDataset

                HFDataset.from_list(rows, on_mixed_types="use_json").to_parquet(str(beside))
            else:
                _write_text(beside, rows, lines=target.suffix == ".jsonl")
    except OSError as error:
        what = f"cannot write ({error.strerror})"
        raise SetupError(what, where=str(target), remedy="choose another --out") from error
    return len(rows)


def _write_text(path: Path, rows: list[dict[str, Any]], *, lines: bool) -> None:
    with open(path, "w", encoding="utf-8") as file:
        if lines:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        else:
            json.dump(rows, file, ensure_ascii=False, indent=1)
            file.write("\n")


def columns_told(columns: dict[str, str] | Any) -> list[str]:
    """What is done with every column, one line for all that are used and one for the rest."""
    from preftune.data.formats import NOT_USED

    used = [f"{name} ({use})" for name, use in columns.items() if use != NOT_USED]
    unused = [name for name, use in columns.items() if use == NOT_USED]
    out = [f"columns used: {', '.join(used)}"] if used else []
    return [*out, f"columns not used: {', '.join(unused)}"] if unused else out
