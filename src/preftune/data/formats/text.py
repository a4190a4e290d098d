"""SFT rows of plain text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from preftune.data.formats.base import TEMPLATE_USES, FormatSpec, Row, has, need, need_text, template_extras
from preftune.data.formats.turns import is_messages, need_messages


def convert(row: Mapping[str, Any]) -> Row:
    """``{text}`` as it stands; a conversation that was stored as text is a conversation."""
    if is_messages(need(row, "text")):
        return {"messages": need_messages(row, "text"), **template_extras(row)}
    return {"text": need_text(row, "text"), **template_extras(row)}


TEXT = FormatSpec(
    name="text",
    kind="sft",
    required=("text",),
    detect=lambda columns, row: has(columns, "text"),
    convert=convert,
    summary="text",
    uses={"text": "the text", **TEMPLATE_USES},
)
