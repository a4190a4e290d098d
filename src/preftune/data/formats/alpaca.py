"""Alpaca: instruction, input and output, or chosen and rejected in place of the output."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from preftune.data.formats.base import (
    BELOW_USES,
    OPENING_USES,
    PAIR_USES,
    TEMPLATE_USES,
    BadRow,
    FormatSpec,
    Message,
    Row,
    extras,
    has,
    template_extras,
)
from preftune.data.formats.openings import answer, is_two_texts, questioned
from preftune.data.formats.ranked import RANKS, SCORES
from preftune.data.formats.turns import need_text_or_messages
from preftune.errors import DataError

#: Columns that may say which of two answers is better.
_VERDICTS = ("label", "winner", "preferred", "preference", "choice")
INSTRUCTION_USES = {
    "instruction": "the user turn",
    **BELOW_USES,
    **OPENING_USES,
}


def instruction_prompt(row: Mapping[str, Any]) -> list[Message]:
    """Instruction and input as a user turn, below an optional system turn and history."""
    return questioned(row, "instruction")


def detect_preference(columns: Collection[str], row: Mapping[str, Any]) -> bool:
    """An instruction beside two answers of text, in columns of their own or as a list."""
    if not has(columns, "instruction"):
        return False
    if has(columns, "chosen", "rejected"):
        return isinstance(row.get("chosen"), str | int | float)
    # Numbers beside the two answers say themselves which is better.
    return is_two_texts(row.get("output")) and not any(name in columns for name in (*SCORES, *RANKS))


def convert_preference(row: Mapping[str, Any]) -> Row:
    """Instruction and input are the user turn, below an optional system turn and history."""
    if "output" in row and "chosen" not in row:
        # LLaMA-Factory's first form: two outputs, the better one first.
        if not is_two_texts(row["output"]):
            what = "'output' does not hold two answers, the better one first"
            raise BadRow("too_few_responses", "output", what, value=row["output"], remedy="remove the row")
        verdict = next((name for name in _VERDICTS if row.get(name) is not None), None)
        if verdict is not None:
            raise DataError(
                f"'output' holds two answers, and {verdict!r} beside it may say which is better",
                where=f"field {verdict!r}",
                value=row[verdict],
                remedy="write the answers into columns `chosen` and `rejected`, or leave the column out if the first"
                " answer is the better one",
            )
        row = {**row, "chosen": row["output"][0], "rejected": row["output"][1]}
    answers = {name: answer(need_text_or_messages(row, name)) for name in ("chosen", "rejected")}
    return {"prompt": instruction_prompt(row), **answers, **extras(row)}


def convert_sft(row: Mapping[str, Any]) -> Row:
    """Instruction and input are the user turn, the output is the assistant turn."""
    completion = answer(need_text_or_messages(row, "output"))
    return {"prompt": instruction_prompt(row), "completion": completion, **template_extras(row)}


ALPACA_PREFERENCE = FormatSpec(
    name="alpaca_preference",
    kind="preference",
    required=("instruction",),
    detect=detect_preference,
    convert=convert_preference,
    summary="instruction, chosen, rejected, or an output of two answers; optional input, context, system, history",
    uses={**INSTRUCTION_USES, "output": "both answers, the better one first", **PAIR_USES},
)

ALPACA = FormatSpec(
    name="alpaca",
    kind="sft",
    required=("instruction", "output"),
    detect=lambda columns, row: has(columns, "instruction", "output"),
    convert=convert_sft,
    summary="instruction, output; optional input, system, history",
    uses={**INSTRUCTION_USES, "output": "the answer", **TEMPLATE_USES},
)
