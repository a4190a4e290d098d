"""Alpaca: instruction, input and output, or chosen and rejected in place of the output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from preftune.data.formats.base import (
    BadRow,
    FormatSpec,
    Message,
    Row,
    extras,
    has,
    need_text,
    optional_text,
    system_turn,
    template_extras,
)


def _prompt(row: Mapping[str, Any]) -> list[Message]:
    question = "\n".join(part for part in (need_text(row, "instruction"), optional_text(row, "input")) if part)
    turns = system_turn(row)
    for turn in row.get("history") or ():
        if not isinstance(turn, list | tuple) or len(turn) != 2 or not all(isinstance(text, str) for text in turn):
            raise BadRow(
                "malformed_message",
                "history",
                "'history' must hold [question, answer] pairs",
                value=turn,
                remedy="write history as [[question, answer], ...]",
            )
        turns += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    return [*turns, {"role": "user", "content": question}]


def _answer(row: Mapping[str, Any], field: str) -> list[Message]:
    return [{"role": "assistant", "content": need_text(row, field)}]


def convert_preference(row: Mapping[str, Any]) -> Row:
    """Instruction and input are the user turn, below an optional system turn and history."""
    answers = {"chosen": _answer(row, "chosen"), "rejected": _answer(row, "rejected")}
    return {"prompt": _prompt(row), **answers, **extras(row)}


def convert_sft(row: Mapping[str, Any]) -> Row:
    """Instruction and input are the user turn, the output is the assistant turn."""
    return {"prompt": _prompt(row), "completion": _answer(row, "output"), **template_extras(row)}


ALPACA_PREFERENCE = FormatSpec(
    name="alpaca_preference",
    kind="preference",
    required=("instruction", "chosen", "rejected"),
    detect=lambda columns, row: (
        has(columns, "instruction", "chosen", "rejected") and isinstance(row.get("chosen"), str)
    ),
    convert=convert_preference,
    summary="instruction, chosen, rejected; optional input, system, history",
)

ALPACA = FormatSpec(
    name="alpaca",
    kind="sft",
    required=("instruction", "output"),
    detect=lambda columns, row: has(columns, "instruction", "output"),
    convert=convert_sft,
    summary="instruction, output; optional input, system, history",
)
