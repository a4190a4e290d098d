"""SFT rows of one conversation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from preftune.data.formats.base import FormatSpec, Row, has, need_messages, template_extras


def convert(row: Mapping[str, Any]) -> Row:
    """``{messages}`` as it stands."""
    return {"messages": need_messages(row, "messages"), **template_extras(row)}


MESSAGES = FormatSpec(
    name="messages",
    kind="sft",
    required=("messages",),
    detect=lambda columns, row: has(columns, "messages"),
    convert=convert,
    summary="messages with role and content",
)
