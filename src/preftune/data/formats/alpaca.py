"""Alpaca: instruction, input and output, or chosen and rejected in place of the output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from preftune.data.formats.base import (
    OPENING_USES,
    PAIR_USES,
    TEMPLATE_USES,
    FormatSpec,
    Message,
    Row,
    extras,
    has,
    need_text,
    optional_text,
    template_extras,
)
from preftune.data.formats.turns import answer, need_text_or_messages, opening

INSTRUCTION_USES = {
    "instruction": "the user turn",
    "input": "the user turn, below the instruction",
    **OPENING_USES,
}


def instruction_prompt(row: Mapping[str, Any]) -> list[Message]:
    """Instruction and input as a user turn, below an optional system turn and history."""
    question = "\n".join(part for part in (need_text(row, "instruction"), optional_text(row, "input")) if part)
    return [*opening(row), {"role": "user", "content": question}]


def convert_preference(row: Mapping[str, Any]) -> Row:
    """Instruction and input are the user turn, below an optional system turn and history."""
    answers = {name: answer(need_text_or_messages(row, name)) for name in ("chosen", "rejected")}
    return {"prompt": instruction_prompt(row), **answers, **extras(row)}


def convert_sft(row: Mapping[str, Any]) -> Row:
    """Instruction and input are the user turn, the output is the assistant turn."""
    completion = answer(need_text_or_messages(row, "output"))
    return {"prompt": instruction_prompt(row), "completion": completion, **template_extras(row)}


ALPACA_PREFERENCE = FormatSpec(
    name="alpaca_preference",
    kind="preference",
    required=("instruction", "chosen", "rejected"),
    detect=lambda columns, row: (
        has(columns, "instruction", "chosen", "rejected") and isinstance(row.get("chosen"), str)
    ),
    convert=convert_preference,
    summary="instruction, chosen, rejected; optional input, system, history",
    uses={**INSTRUCTION_USES, **PAIR_USES},
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
