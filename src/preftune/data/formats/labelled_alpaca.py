"""Alpaca's instruction and output with a yes or no label, and other names of question and answer."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from preftune.data.formats.alpaca import INSTRUCTION_USES
from preftune.data.formats.base import EXTRA_USES, FormatSpec, Row, extras
from preftune.data.formats.openings import answer, questioned
from preftune.data.formats.question_answer import ANSWERS, QUESTIONS, names, whole_answer
from preftune.data.formats.turns import need_text_or_messages
from preftune.data.formats.unpaired import LABEL_USES, LABELS, label_column, label_of


def _names(columns: Collection[str]) -> tuple[str, str] | None:
    if "instruction" in columns and "output" in columns:
        return "instruction", "output"
    return names(columns)


def detect(columns: Collection[str], row: Mapping[str, Any]) -> bool:
    """Question and answer beside a label that is true or false."""
    return _names(columns) is not None and label_column(columns, row) is not None


def convert(row: Mapping[str, Any]) -> Row:
    """The question is the user turn, below an optional system turn and history."""
    question, given = _names(row) or ("instruction", "output")
    given = whole_answer(row, given)
    completion = answer(need_text_or_messages(row, given))
    return {"prompt": questioned(row, question), "completion": completion, "label": label_of(row), **extras(row)}


LABELLED_ALPACA = FormatSpec(
    name="labelled_alpaca",
    kind="unpaired",
    required=(),
    detect=detect,
    convert=convert,
    summary="instruction and output (or query and response, ...), and label or kto_tag",
    uses={
        **dict.fromkeys(QUESTIONS, "the user turn"),
        **dict.fromkeys(ANSWERS, "the answer"),
        **INSTRUCTION_USES,
        **LABEL_USES,
        **EXTRA_USES,
    },
    either=(tuple(name for name in QUESTIONS if name != "input"), ANSWERS[:2], LABELS),
)
