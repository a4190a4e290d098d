"""ShareGPT: conversations of ``{from, value}`` turns, for preference pairs and for SFT."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from preftune.data.formats.base import (
    OPENING_USES,
    PAIR_USES,
    TEMPLATE_USES,
    FormatSpec,
    Message,
    Row,
    extras,
    has,
    template_extras,
)
from preftune.data.formats.openings import answer, opened, unanswered
from preftune.data.formats.turns import is_exchanges, is_messages, message, need_messages, need_text_or_messages

#: Columns of a conversation. Names of other meanings count only where they hold one.
CONVERSATIONS = ("conversations", "conversation", "dialogue", "dialog", "turns", "trajectory")
CONVERSATION_USES = dict.fromkeys(CONVERSATIONS, "the conversation")


def conversation_column(columns: Collection[str], row: Mapping[str, Any]) -> str | None:
    """The column of a conversation, where there is one."""
    if CONVERSATIONS[0] in columns:
        return CONVERSATIONS[0]
    named = (name for name in CONVERSATIONS if name in columns)
    return next((name for name in named if is_messages(row.get(name)) or is_exchanges(row.get(name))), None)


def _turns(row: Mapping[str, Any]) -> list[Message]:
    return opened(row, need_messages(row, conversation_column(row, row) or CONVERSATIONS[0]))


def detect_preference(columns: Collection[str], row: Mapping[str, Any]) -> bool:
    """A conversation beside two answers, which are no whole conversations themselves."""
    if conversation_column(columns, row) is None or not has(columns, "chosen", "rejected"):
        return False
    chosen: Any = row.get("chosen")
    return not is_messages(chosen) or message(chosen[0], "chosen")["role"] not in ("user", "system")


def convert_preference(row: Mapping[str, Any]) -> Row:
    """The conversation is the prompt; ``chosen`` and ``rejected`` are one turn each (or lists of turns, or text)."""
    answers = {name: answer(need_text_or_messages(row, name)) for name in ("chosen", "rejected")}
    field = conversation_column(row, row) or CONVERSATIONS[0]
    return {"prompt": unanswered(_turns(row), field, *answers.values()), **answers, **extras(row)}


def convert_sft(row: Mapping[str, Any]) -> Row:
    """The conversation as messages."""
    return {"messages": _turns(row), **template_extras(row)}


SHAREGPT_PREFERENCE = FormatSpec(
    name="sharegpt_preference",
    kind="preference",
    required=("chosen", "rejected"),
    detect=detect_preference,
    convert=convert_preference,
    summary="conversations (conversation, dialogue), chosen, rejected; turns with from and value",
    uses={**dict.fromkeys(CONVERSATIONS, "the prompt"), **PAIR_USES, **OPENING_USES},
    either=(CONVERSATIONS,),
)

SHAREGPT = FormatSpec(
    name="sharegpt",
    kind="sft",
    required=(),
    detect=lambda columns, row: conversation_column(columns, row) is not None,
    convert=convert_sft,
    summary="conversations (conversation, dialogue); turns with from and value, or input and output",
    uses={**CONVERSATION_USES, **OPENING_USES, **TEMPLATE_USES},
    either=(CONVERSATIONS,),
)
