"""Texts as the checks compare them: words, shingles, and messages written out."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import xxhash

# Scripts without spaces between words count character by character.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\u0e00-\u0e7f]|[^\W_]+(?:['\u2019][^\W_]+)*")

SHINGLE = 5
#: Longest excerpt in a finding, in characters.
_EXCERPT = 80


def words(text: str) -> list[str]:
    """Words in lower case, without signs."""
    return _WORD.findall(text.lower())


def shingles(text: str, mark: str = "") -> set[int]:
    """Hashes of all runs of five words; of the whole text where it is shorter.

    Args:
        text: Text.
        mark: Keeps apart what different parts of a row have in common.

    Returns:
        64-bit numbers; empty for a text without a word.
    """
    found = words(text) or text.split()
    if not found:
        return set()
    size = min(SHINGLE, len(found))
    runs = (" ".join(found[i : i + size]) for i in range(len(found) - size + 1))
    return {xxhash.xxh3_64_intdigest(f"{mark}{run}".encode()) for run in runs}


def content(message: Any) -> str:
    """Text of one message, calls of tools included."""
    value = message.get("content")
    text = value if isinstance(value, str) else "".join(part.get("text", "") for part in value or ())
    calls = message.get("tool_calls")
    return text + (json.dumps(calls, ensure_ascii=False, default=str) if calls else "")


def flat(value: Any) -> str:
    """A text, or messages with one line ``role: content`` each; a single message is its content alone."""
    if isinstance(value, str):
        return value
    if len(value) == 1:
        return content(value[0])
    return "\n".join(f"{message.get('role')}: {content(message)}" for message in value)


def excerpt(text: str) -> str:
    """The beginning of a text on one line, without control characters."""
    line = " ".join("".join(c if c.isprintable() or c in "\n\t " else "?" for c in text[: 4 * _EXCERPT]).split())
    return line if len(line) <= _EXCERPT else line[: _EXCERPT - 1] + "…"


def same_text(text: str) -> str:
    """Text as exact duplicates compare it: without white space around and doubled inside."""
    return " ".join(text.split())


def listed(names: Sequence[str]) -> str:
    """``a, b and c``."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
