"""ShareGPT: conversations of ``{from, value}`` turns, for preference pairs and for SFT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from preftune.data.formats.base import (
    OPENING_USES,
    PAIR_USES,
    TEMPLATE_USES,
    FormatSpec,
    Row,
    extras,
    has,
    template_extras,
)
from preftune.data.formats.turns import answer, need_messages, need_text_or_messages, opened


def convert_preference(row: Mapping[str, Any]) -> Row:
    """The conversation is the prompt; ``chosen`` and ``rejected`` are one turn each (or lists of turns, or text)."""
    answers = {name: answer(need_text_or_messages(row, name)) for name in ("chosen", "rejected")}
    return {"prompt": opened(row, need_messages(row, "conversations")), **answers, **extras(row)}


def convert_sft(row: Mapping[str, Any]) -> Row:
    """The conversation as messages."""
    return {"messages": opened(row, need_messages(row, "conversations")), **template_extras(row)}


SHAREGPT_PREFERENCE = FormatSpec(
    name="sharegpt_preference",
    kind="preference",
    required=("conversations", "chosen", "rejected"),
    detect=lambda columns, row: has(columns, "conversations", "chosen", "rejected"),
    convert=convert_preference,
    summary="conversations, chosen, rejected; turns with from and value",
    uses={"conversations": "the prompt", **PAIR_USES, **OPENING_USES},
)

SHAREGPT = FormatSpec(
    name="sharegpt",
    kind="sft",
    required=("conversations",),
    detect=lambda columns, row: has(columns, "conversations"),
    convert=convert_sft,
    summary="conversations; turns with from and value",
    uses={"conversations": "the conversation", **OPENING_USES, **TEMPLATE_USES},
)
