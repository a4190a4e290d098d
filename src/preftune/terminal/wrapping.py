"""Help texts in the width of the terminal."""

from __future__ import annotations

import re
import shutil
import textwrap

#: Longer lines are hard to read, however wide the terminal is.
_MOST_COLUMNS = 110
#: What a line of a list begins with; what is wrapped stands below the rest.
_BEGINNING = re.compile(r"usage: | *\S+ {2,}| *")


def wrapped(text: str) -> str:
    """A help text with its paragraphs broken to the width of the terminal, and lists line by line.

    Examples stay, to be copied.
    """
    parts = []
    for part in text.split("\n\n"):
        lines = part.split("\n")
        if not any(line.startswith((" ", "usage: ", "example: ")) for line in lines):
            lines = [" ".join(part.split())]
        parts.append("\n".join(_lines(line) for line in lines))
    return "\n\n".join(parts)


def width() -> int:
    """Columns of a line: those of the terminal, and 110 where there is none."""
    return max(40, min(_MOST_COLUMNS, shutil.get_terminal_size((_MOST_COLUMNS, 24)).columns))


def _lines(line: str) -> str:
    if len(line) <= width() or line.startswith("example: "):
        return line
    beginning = _BEGINNING.match(line)
    indent = " " * (len(beginning[0]) if beginning else 0)
    return textwrap.fill(line, width(), subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
