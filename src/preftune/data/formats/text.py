"""SFT rows of plain text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from preftune.data.formats.base import FormatSpec, Row, has, need_text, template_extras


def convert(row: Mapping[str, Any]) -> Row:
    """``{text}`` as it stands."""
    return {"text": need_text(row, "text"), **template_extras(row)}


TEXT = FormatSpec(
    name="text",
    kind="sft",
    required=("text",),
    detect=lambda columns, row: has(columns, "text"),
    convert=convert,
    summary="text",
)
