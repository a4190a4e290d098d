"""A conversation beside two answers, or one that ends with the preferred answer, beside the other (axolotl, swift)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from preftune.data.formats.base import OPENING_USES, PAIR_USES, BadRow, FormatSpec, Row, extras, has
from preftune.data.formats.openings import answer, last_answer, opened, prompted, shared_turns, unanswered
from preftune.data.formats.turns import is_messages, message, need_messages, need_text_or_messages

REJECTED = ("rejected_response", "rejected_messages", "rejected")


def detect(columns: Collection[str], row: Mapping[str, Any]) -> bool:
    """Messages beside both answers, which are no whole conversations, or beside the rejected one alone."""
    if "messages" not in columns or "prompt" in columns:
        return False
    if any(name in columns for name in REJECTED) and "chosen" not in columns:
        return True
    messages, chosen = row.get("messages"), row.get("chosen")
    whole = isinstance(messages, list) and isinstance(chosen, list) and messages[:1] == chosen[:1]
    return has(columns, "chosen", "rejected") and not whole


def convert(row: Mapping[str, Any]) -> Row:
    """The conversation is the prompt, without its last answer where that is the preferred one."""
    messages = opened(row, need_messages(row, "messages"))
    if "chosen" in row and "rejected" in row:
        answers = [answer(need_text_or_messages(row, name)) for name in ("chosen", "rejected")]
        if all(one[0].get("role") == "assistant" for one in answers):
            messages = unanswered(messages, "messages", *answers)
        prompt, *answers = prompted({}, messages, *answers)
        return {"prompt": prompt, "chosen": answers[0], "rejected": answers[1], **extras(row)}
    field = next((name for name in REJECTED if row.get(name) is not None), REJECTED[0])
    given: Any = row.get(field)
    # ms-swift takes several rejected answers, of which the first is one like any other.
    if isinstance(given, list) and given and isinstance(given[0], str):
        row = {**row, field: given[0]}
    if field == "rejected_messages" or (is_messages(given) and message(given[0], field)["role"] != "assistant"):
        other = opened(row, need_messages(row, field))
        shared = shared_turns(messages, other)
        if not shared:
            raise BadRow(
                "no_shared_prompt",
                field,
                "the two conversations do not begin with the same turn",
                remedy="remove the row or set on_bad_rows: skip",
            )
        return {"prompt": messages[:shared], "chosen": messages[shared:], "rejected": other[shared:], **extras(row)}
    prompt, chosen = last_answer(messages, "messages")
    return {"prompt": prompt, "chosen": chosen, "rejected": answer(need_text_or_messages(row, field)), **extras(row)}


MESSAGES_PREFERENCE = FormatSpec(
    name="messages_preference",
    kind="preference",
    required=("messages",),
    detect=detect,
    convert=convert,
    summary="messages with chosen and rejected, or with rejected_response or rejected_messages",
    uses={
        "messages": "the prompt, and the preferred answer where there is no other",
        **PAIR_USES,
        **dict.fromkeys(REJECTED, "the other answer; of several the first"),
        **OPENING_USES,
    },
)
