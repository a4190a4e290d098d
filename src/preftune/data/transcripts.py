"""Transcripts (``Human: ... Assistant: ...`` in one text) as conversations, for models that have a chat template."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from preftune.data.formats.base import Message, Row

_ROLES = {"human": "user", "user": "user", "assistant": "assistant", "system": "system"}
_LABEL = r"(#{1,4}[ \t]*)?(Human|User|Assistant|System):"
# Turns stand after empty lines; in files that have none, after line ends.
_APART = re.compile(rf"(?:\A\s*|\n[ \t]*\n\s*){_LABEL}")
# Where a mark stands before the label (### Human:), even without a line end.
_CLOSE = re.compile(rf"(?:\A\s*|\n\s*|(?=#)){_LABEL}")
_BEGIN = re.compile(rf"\s*{_LABEL}")


def turns_of(text: str) -> list[Message]:
    """Turns of a transcript, empty ones included; none where the text does not begin with a label."""
    begin = _BEGIN.match(text)
    if begin is None:
        return []
    labels = _alike(begin, _APART.finditer(text))
    if len(labels) < 2:
        labels = _alike(begin, _CLOSE.finditer(text))
    ends = [*(label.start() for label in labels[1:]), len(text)]
    return [
        {"role": _ROLES[label.group(2).lower()], "content": text[label.end() : end].strip()}
        for label, end in zip(labels, ends, strict=True)
    ]


def _alike(begin: re.Match[str], labels: Iterable[re.Match[str]]) -> list[re.Match[str]]:
    """Labels of the kind that the transcript begins with: other words before a colon are what somebody says."""
    first = begin.group(2)
    asks = ("Human", "User") if first in ("Assistant", "System") else (first,)
    kept: list[re.Match[str]] = []
    for label in labels:
        own = label.group(2) in (*asks, "Assistant") or (label.group(2) == "System" and not kept)
        if own and (label.group(1) or "").strip() == (begin.group(1) or "").strip():
            asks = (label.group(2),) if label.group(2) in ("Human", "User") else asks
            kept.append(label)
    return kept


def as_conversation(row: Mapping[str, object]) -> Row | None:
    """A canonical row of text as messages, where its text is a transcript; ``None`` where it is none.

    Args:
        row: ``prompt`` with ``chosen`` and ``rejected`` or with ``completion``; or ``text``.

    Returns:
        The row with messages. Turns of one speaker in a row are joined, and empty ones left out.
    """
    text = row.get("text")
    if isinstance(text, str):
        turns = turns_of(text)
        if not any(turn["role"] == "assistant" for turn in turns) or turns[0]["role"] == "assistant":
            return None
        rest = {key: value for key, value in row.items() if key != "text"}
        return {"messages": joined(turns), **rest}
    prompt = row.get("prompt")
    if not isinstance(prompt, str):
        return None
    before = turns_of(prompt)
    # The prompt opens the turn that answers, or ends within what both answers begin with.
    if before and before[-1]["role"] == "assistant":
        before = before[:-1]
    if not before or before[-1]["role"] != "user" or before[0]["role"] == "assistant":
        return None
    out: Row = {**row, "prompt": joined(before)}
    for field in ("chosen", "rejected", "completion"):
        answer = row.get(field)
        if isinstance(answer, str):
            # An answer that holds the whole transcript once more.
            turns = turns_of(prompt + answer.removeprefix(prompt))[len(before) :]
            if not turns or turns[0]["role"] != "assistant":
                return None
            out[field] = joined(turns) or [{"role": "assistant", "content": ""}]
    return out


def joined(turns: list[Message]) -> list[Message]:
    """Turns without empty ones, and those of one speaker in a row as one: many templates insist on taking turns."""
    out: list[Message] = []
    for turn in turns:
        if not turn["content"]:
            continue
        if out and out[-1]["role"] == turn["role"]:
            out[-1] = {**turn, "content": f"{out[-1]['content']}\n\n{turn['content']}"}
        else:
            out.append(turn)
    return out
