"""Orca pairs: system, question, chosen, rejected as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from preftune.data.formats.base import FormatSpec, Row, extras, has, need_text, system_turn


def convert(row: Mapping[str, Any]) -> Row:
    """Messages: an optional system turn, the question, and one assistant turn per answer."""
    return {
        "prompt": [*system_turn(row), {"role": "user", "content": need_text(row, "question")}],
        "chosen": [{"role": "assistant", "content": need_text(row, "chosen")}],
        "rejected": [{"role": "assistant", "content": need_text(row, "rejected")}],
        **extras(row),
    }


ORCA = FormatSpec(
    name="orca",
    kind="preference",
    required=("question", "chosen", "rejected"),
    detect=lambda columns, row: has(columns, "question", "chosen", "rejected") and isinstance(row.get("chosen"), str),
    convert=convert,
    summary="question, chosen, rejected as text; optional system",
)
