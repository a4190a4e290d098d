"""ShareGPT: conversations of ``{from, value}`` turns, for preference pairs and for SFT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from preftune.data.formats.base import (
    BadRow,
    FormatSpec,
    Message,
    Row,
    extras,
    has,
    need_messages,
    system_turn,
    template_extras,
)


def _conversation(row: Mapping[str, Any]) -> list[Message]:
    turns = need_messages(row, "conversations")
    system = system_turn(row)
    if system and turns[0]["role"] == "system":
        raise BadRow(
            "two_system_turns",
            "system",
            "the row has a system column and a system turn",
            remedy="keep one of the two",
        )
    return system + turns


def convert_preference(row: Mapping[str, Any]) -> Row:
    """The conversation is the prompt; ``chosen`` and ``rejected`` are one turn each (or lists of turns)."""
    return {
        "prompt": _conversation(row),
        "chosen": need_messages(row, "chosen"),
        "rejected": need_messages(row, "rejected"),
        **extras(row),
    }


def convert_sft(row: Mapping[str, Any]) -> Row:
    """The conversation as messages."""
    return {"messages": _conversation(row), **template_extras(row)}


SHAREGPT_PREFERENCE = FormatSpec(
    name="sharegpt_preference",
    kind="preference",
    required=("conversations", "chosen", "rejected"),
    detect=lambda columns, row: has(columns, "conversations", "chosen", "rejected"),
    convert=convert_preference,
    summary="conversations, chosen, rejected; turns with from and value",
)

SHAREGPT = FormatSpec(
    name="sharegpt",
    kind="sft",
    required=("conversations",),
    detect=lambda columns, row: has(columns, "conversations"),
    convert=convert_sft,
    summary="conversations; turns with from and value",
)
