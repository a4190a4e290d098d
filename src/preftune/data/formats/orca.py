"""Orca pairs: system, question, chosen, rejected as text."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from preftune.data.formats.base import BELOW_USES, OPENING_USES, PAIR_USES, FormatSpec, Row, extras, has
from preftune.data.formats.openings import answer, questioned
from preftune.data.formats.turns import need_text_or_messages


def detect(columns: Collection[str], row: Mapping[str, Any]) -> bool:
    """A question beside two answers of text. A number in place of one is told when the row is read."""
    return has(columns, "question", "chosen", "rejected") and isinstance(row.get("chosen"), str | int | float)


def convert(row: Mapping[str, Any]) -> Row:
    """Messages: an optional system turn and history, the question, and one assistant turn per answer."""
    answers = {name: answer(need_text_or_messages(row, name)) for name in ("chosen", "rejected")}
    return {"prompt": questioned(row, "question"), **answers, **extras(row)}


ORCA = FormatSpec(
    name="orca",
    kind="preference",
    required=("question", "chosen", "rejected"),
    detect=detect,
    convert=convert,
    summary="question, chosen, rejected as text; optional input, context, system, history",
    uses={"question": "the user turn", **BELOW_USES, **PAIR_USES, **OPENING_USES},
)
