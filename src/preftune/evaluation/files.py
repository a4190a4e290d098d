"""Files of results that grow line by line."""

from __future__ import annotations

import os
from pathlib import Path

from preftune.errors import SetupError
from preftune.ownership import active, claim_files

#: What an evaluation leaves.
RESULTS = ("eval.json", "generations.jsonl", "judge.jsonl")


def claim(folder: str) -> None:
    """Find out that an evaluation can write its files; those of an earlier one are replaced.

    Raises:
        ConfigError: Somebody else's file has one of the names.
    """
    claim_files(folder, "eval", RESULTS, "out")


def append(path: Path, text: str) -> None:
    """Append whole lines in one write, after a line that was torn if there is one.

    Raises:
        SetupError: The file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        run = active(path.parent)
        if run is not None:
            run.grow(path.name, text.encode("utf-8", "backslashreplace"))
        with path.open("ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    text = "\n" + text
            # Models write halves of characters. As an escape of JSON, which Python's is too, they are kept as they are.
            file.write(text.encode("utf-8", "backslashreplace"))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise SetupError(
            f"cannot write ({error.strerror})", where=str(path), remedy="free some space, or set another out"
        ) from error
