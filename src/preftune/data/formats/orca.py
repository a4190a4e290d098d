"""Orca pairs: system, question, chosen, rejected as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from preftune.data.formats.base import OPENING_USES, PAIR_USES, FormatSpec, Row, extras, has, need_text
from preftune.data.formats.openings import answer, opening
from preftune.data.formats.turns import need_text_or_messages


def convert(row: Mapping[str, Any]) -> Row:
    """Messages: an optional system turn and history, the question, and one assistant turn per answer."""
    question = {"role": "user", "content": need_text(row, "question")}
    answers = {name: answer(need_text_or_messages(row, name)) for name in ("chosen", "rejected")}
    return {"prompt": [*opening(row), question], **answers, **extras(row)}


ORCA = FormatSpec(
    name="orca",
    kind="preference",
    required=("question", "chosen", "rejected"),
    detect=lambda columns, row: has(columns, "question", "chosen", "rejected") and isinstance(row.get("chosen"), str),
    convert=convert,
    summary="question, chosen, rejected as text; optional system, history",
    uses={"question": "the user turn", **PAIR_USES, **OPENING_USES},
)
