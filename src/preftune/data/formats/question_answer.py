"""SFT rows of a question and an answer: raw Orca, ms-swift's query and response, and the like."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from preftune.data.formats.base import OPENING_USES, TEMPLATE_USES, FormatSpec, Row, template_extras
from preftune.data.formats.turns import answer, asked, need_text_or_messages, opening

QUESTIONS = ("prompt", "question", "query", "instruction", "input", "problem")
ANSWERS = ("response", "answer", "output", "solution")


def names(columns: Collection[str]) -> tuple[str, str] | None:
    """The columns of question and answer."""
    question = next((name for name in QUESTIONS if name in columns), None)
    found = next((name for name in ANSWERS if name in columns), None)
    return None if question is None or found is None else (question, found)


def detect(columns: Collection[str], row: Mapping[str, Any]) -> bool:
    """A question of text or messages, and an answer of text or messages."""
    found = names(columns)
    return found is not None and all(isinstance(row.get(name), str | list) for name in found)


def convert(row: Mapping[str, Any]) -> Row:
    """The question is the user turn, below an optional system turn and history; the answer the assistant's."""
    question, given = names(row) or ("question", "answer")
    prompt = [*opening(row), *asked(need_text_or_messages(row, question))]
    return {"prompt": prompt, "completion": answer(need_text_or_messages(row, given)), **template_extras(row)}


QUESTION_ANSWER = FormatSpec(
    name="question_answer",
    kind="sft",
    required=(),
    detect=detect,
    convert=convert,
    summary=f"a question ({', '.join(QUESTIONS)}) and an answer ({', '.join(ANSWERS)}); optional system, history",
    uses={
        **dict.fromkeys(QUESTIONS, "the user turn"),
        **dict.fromkeys(ANSWERS, "the answer"),
        **OPENING_USES,
        **TEMPLATE_USES,
    },
)
