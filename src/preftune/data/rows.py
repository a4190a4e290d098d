"""Validation of canonical rows, and what happens to the bad ones."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from preftune.data import quarantine
from preftune.data.formats.base import BadRow, Row
from preftune.data.formats.turns import ROLES
from preftune.errors import DataError

# TRL trains on rows like these without a word, so `on_bad_rows="warn"` goes on as well. Every other reason makes TRL
# crash somewhere inside, which helps nobody.
_TRL_GOES_ON = frozenset(
    {
        "answer_ends_with_user",
        "empty_completion",
        "identical_pair",
        "no_assistant_turn",
        "text_lost",
        "tools_lost",
        "unknown_role",
    }
)

#: Reasons that leave a row out without anything being wrong with it: a vote that ended in a tie prefers nothing.
NEUTRAL = frozenset({"no_preference"})

_SKIP = "remove the row or set on_bad_rows: skip"


def check_pair(row: Mapping[str, Any]) -> None:
    """Check a canonical preference row.

    Raises:
        BadRow: The first thing that is wrong with it.
    """
    for field in ("prompt", "chosen", "rejected"):
        check_value(row[field], field)
    _same_kind(row, ("prompt", "chosen", "rejected"))
    for field in ("chosen", "rejected"):
        _not_empty(row[field], field)
        _is_answer(row[field], field)
    if row["chosen"] == row["rejected"]:
        raise BadRow("identical_pair", "rejected", "chosen and rejected are the same", remedy=_SKIP)
    if row.get("weight", 1.0) < 0:
        raise BadRow("negative_weight", "weight", "a weight below 0", value=row["weight"], remedy="use 0 or more")


def check_sft(row: Mapping[str, Any]) -> None:
    """Check a canonical SFT row: ``messages``, ``prompt`` and ``completion``, or ``text``.

    Raises:
        BadRow: The first thing that is wrong with it.
    """
    for field in ("messages", "prompt", "completion", "text"):
        if field in row:
            check_value(row[field], field)
    if "completion" in row:
        _same_kind(row, ("prompt", "completion"))
        _not_empty(row["completion"], "completion")
        _is_answer(row["completion"], "completion")
    elif "messages" in row:
        if not any(message.get("role") == "assistant" for message in row["messages"]):
            raise BadRow("no_assistant_turn", "messages", "no assistant turn to learn from", remedy=_SKIP)
    else:
        _not_empty(row["text"], "text")


def check_value(value: Any, field: str) -> None:
    """Check one text or list of messages: types, roles, and characters that UTF-8 cannot express.

    Raises:
        BadRow: The first thing that is wrong with it.
    """
    if isinstance(value, str):
        _encodable(value, field)
        return
    if not value:
        raise BadRow("empty_messages", field, f"{field!r} holds no messages", remedy=_SKIP)
    unknown = None
    for message in value:
        content = message.get("content")
        if isinstance(content, str):
            _encodable(content, field)
        elif content is None:
            if not message.get("tool_calls") and message.get("role") != "assistant":
                raise BadRow("null", field, f"a message in {field!r} has no content", value=message, remedy=_SKIP)
        elif not _text_parts(content):
            raise BadRow(
                "not_text",
                field,
                f"a message in {field!r} holds something other than text",
                value=content,
                remedy="preference tuning here reads text only",
            )
        if message.get("role") not in ROLES:
            unknown = message.get("role")
    # Last, because it is the only one here that a chat template may well accept.
    if unknown is not None:
        raise BadRow(
            "unknown_role",
            field,
            f"unknown role in {field!r}; known are {', '.join(ROLES)}",
            value=unknown,
            remedy="rename the role, or set on_bad_rows: skip",
        )


def _encodable(text: str, field: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        # Files are decoded with "surrogateescape", which keeps a byte that is not UTF-8 as U+DC80 to U+DCFF.
        from_bytes = 0xDC80 <= ord(text[error.start]) <= 0xDCFF
        raise BadRow(
            "invalid_utf8" if from_bytes else "lone_surrogate",
            field,
            f"{field!r} is not valid text at character {error.start}: "
            + ("bytes that are not UTF-8" if from_bytes else "half a surrogate pair"),
            value=text[max(0, error.start - 10) : error.start + 10],
            remedy="save the file as UTF-8, or set on_bad_rows: skip",
        ) from None


def _text_parts(content: Any) -> bool:
    return isinstance(content, list) and all(
        isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)
        for part in content
    )


def _same_kind(row: Mapping[str, Any], fields: tuple[str, ...]) -> None:
    kinds = {isinstance(row[field], str) for field in fields}
    if len(kinds) > 1:
        texts = [field for field in fields if isinstance(row[field], str)]
        raise BadRow(
            "mixed_types",
            texts[0],
            f"{', '.join(texts)} is text while the other fields are messages",
            remedy="use text or messages for all of them",
        )


def _not_empty(value: Any, field: str) -> None:
    if not value.strip() if isinstance(value, str) else all(map(_message_is_empty, value)):
        raise BadRow("empty_completion", field, f"{field!r} is empty", remedy=_SKIP)


def _is_answer(value: Any, field: str) -> None:
    """Refuse an answer that the assistant does not give, or that somebody else has the last word in."""
    if isinstance(value, str):
        return
    roles = [message.get("role") for message in value]
    if "assistant" not in roles:
        what = f"{field!r} holds no assistant turn to learn from"
        raise BadRow("no_assistant_turn", field, what, value=roles, remedy=_SKIP)
    if roles[-1] == "user":
        what = f"{field!r} ends with a user turn, which nothing answers"
        raise BadRow("answer_ends_with_user", field, what, value=roles, remedy=_SKIP)


def _message_is_empty(message: Mapping[str, Any]) -> bool:
    content = message.get("content")
    text = content if isinstance(content, str) else "".join(part["text"] for part in content or ())
    return not text.strip() and not message.get("tool_calls")


class BadRowHandler:
    """Applies ``on_bad_rows`` and keeps count.

    Args:
        policy: ``error``, ``skip`` or ``warn``.
        quarantine_path: JSON-lines file that skipped rows are appended to.

    Attributes:
        counts: Number of bad rows by reason.
        reason: Reason of the latest bad row.
        first: Place and problem of the first row that was left out; empty where none was.
    """

    def __init__(self, policy: str, quarantine_path: str | None = None) -> None:
        self.policy = policy
        self.quarantine_path = quarantine_path
        self.counts: Counter[str] = Counter()
        self.reason = ""
        self.first = ""

    def keep(self, bad: BadRow, place: str, row: Any, *, converted: bool = True) -> bool:
        """Decide about one bad row.

        Args:
            bad: What is wrong.
            place: File and line, or data set and row number.
            row: The row as it was read, for the quarantine.
            converted: Whether there is a canonical row to go on with.

        Returns:
            Whether the row stays in the data.

        Raises:
            DataError: The policy does not allow to go on.
        """
        self.reason = bad.reason
        if self.policy == "skip" or bad.reason in NEUTRAL:
            self.counts[bad.reason] += 1
            got = "" if bad.value is None else f"; got {_short(bad.value)}"
            self.first = self.first or f"{place}, field {bad.field!r}: {bad.what}{got}{_advised(bad)}"
            self.quarantine([entry(bad, place, row)])
            return False
        if self.policy == "warn" and converted and bad.reason in _TRL_GOES_ON:
            self.counts[bad.reason] += 1
            return True
        raise to_error(bad, place)

    def left_out(self) -> list[str]:
        """What was left out, by reason, and the first row of it; empty where nothing was."""
        return [f"{shorten(self.counts)} left out", f"the first is {self.first}"] if self.first else []

    def quarantine(self, entries: Iterable[Mapping[str, Any]]) -> None:
        """Append entries to the quarantine file; only the first process of a distributed run writes."""
        lines = [quarantine.line(item) for item in entries]
        if not lines or self.quarantine_path is None or os.environ.get("RANK", "0") != "0":
            return
        try:
            quarantine.append(self.quarantine_path, lines)
        except OSError as error:
            raise DataError(
                f"the quarantine file cannot be written: {error.strerror}",
                where=self.quarantine_path,
                remedy="choose another quarantine_path",
            ) from error


def _advised(bad: BadRow) -> str:
    """The remedy, where it is more than leaving the row out."""
    remedy = bad.remedy.removesuffix(", or set on_bad_rows: skip").removesuffix(" or set on_bad_rows: skip")
    return "" if not remedy or remedy.startswith(("remove the row", "set on_bad_rows")) else f" ({remedy})"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def left_out(counts: Mapping[str, int], policy: str) -> dict[str, int]:
    """Of bad rows by reason, those that a policy leaves out."""
    return {reason: count for reason, count in counts.items() if policy == "skip" or reason in NEUTRAL}


def entry(bad: BadRow, place: str, row: Any) -> Row:
    """One line of the quarantine file. ASCII-safe JSON: bad text must not make the file itself unreadable."""
    kept = bad.raw if isinstance(row, BadRow) else row
    return {"place": place, "field": bad.field, "reason": bad.reason, "what": bad.what, "row": kept}


def to_error(bad: BadRow, place: str) -> DataError:
    """The error that names the place, the field, the problem and the remedy."""
    extra = {} if bad.value is None else {"value": bad.value}
    return DataError(bad.what, where=f"{place}, field {bad.field!r}", remedy=bad.remedy or None, **extra)


def shorten(counts: Mapping[str, int]) -> str:
    """Counts as ``3 empty_completion, 1 null``."""
    return ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items(), key=lambda item: -item[1]))
