"""SFT rows of a question and an answer: raw Orca, ms-swift's query and response, and the like."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from preftune.data.formats.base import BELOW_USES, OPENING_USES, TEMPLATE_USES, FormatSpec, Row, template_extras
from preftune.data.formats.openings import answer, questioned
from preftune.data.formats.turns import need_text_or_messages

QUESTIONS = ("prompt", "question", "query", "instruction", "input", "problem")
#: In the order in which they are looked for; what ``answer`` holds may be the short result of a solution.
ANSWERS = ("response", "completion", "answer", "solution", "output")
_SHORT = 24


def names(columns: Collection[str]) -> tuple[str, str] | None:
    """The columns of question and answer."""
    question = next((name for name in QUESTIONS if name in columns), None)
    found = next((name for name in ANSWERS if name in columns), None)
    return None if question is None or found is None else (question, found)


def whole_answer(row: Mapping[str, Any], found: str) -> str:
    """The column of the whole answer, where ``answer`` is a word or a number and the text that leads to it is there."""
    short = row.get(found)
    if found == "answer" and isinstance(short, str) and len(short) <= _SHORT:
        for name in ("solution", "output"):
            text = row.get(name)
            if isinstance(text, str) and " " in text.strip() and len(text) > len(short):
                return name
    return found


def detect(columns: Collection[str], row: Mapping[str, Any]) -> bool:
    """A question of text or messages, and an answer of text or messages."""
    found = names(columns)
    if found is None or {"options", "accept"} <= set(columns) or {"chosen", "rejected"} <= set(columns):
        # An annotator's choice among options, where answer says that it was accepted; or a pair with its solution.
        return False
    # A number in place of an answer is told when the row is read.
    return all(isinstance(row.get(name), str | list | int | float) for name in found)


def convert(row: Mapping[str, Any]) -> Row:
    """The question is the user turn, below an optional system turn and history; the answer the assistant's."""
    question, given = names(row) or ("question", "answer")
    given = whole_answer(row, given)
    return {
        "prompt": questioned(row, question),
        "completion": answer(need_text_or_messages(row, given)),
        **template_extras(row),
    }


QUESTION_ANSWER = FormatSpec(
    name="question_answer",
    kind="sft",
    required=(),
    detect=detect,
    convert=convert,
    summary=f"a question ({', '.join(QUESTIONS)}) and an answer ({', '.join(ANSWERS)}); optional input, context,"
    " system, history",
    uses={
        **BELOW_USES,
        **dict.fromkeys(QUESTIONS, "the user turn"),
        **dict.fromkeys(ANSWERS, "the answer"),
        "answer": "the answer, unless it is the short result of a solution or output beside it",
        **OPENING_USES,
        **TEMPLATE_USES,
    },
    either=(tuple(name for name in QUESTIONS if name != "input"), ANSWERS[:2]),
)
