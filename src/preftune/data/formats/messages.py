"""SFT rows of one conversation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from preftune.data.formats.base import OPENING_USES, TEMPLATE_USES, FormatSpec, Row, has, template_extras
from preftune.data.formats.openings import opened
from preftune.data.formats.turns import need_messages


def convert(row: Mapping[str, Any]) -> Row:
    """``{messages}`` as it stands, after ``system`` and ``history`` where there are such columns."""
    return {"messages": opened(row, need_messages(row, "messages")), **template_extras(row)}


MESSAGES = FormatSpec(
    name="messages",
    kind="sft",
    required=("messages",),
    detect=lambda columns, row: has(columns, "messages"),
    convert=convert,
    summary="messages with role and content; optional system",
    uses={"messages": "the conversation", **OPENING_USES, **TEMPLATE_USES},
)
