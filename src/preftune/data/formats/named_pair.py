"""A question and two answers under other names, such as ms-swift's query and response."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from preftune.data.formats.base import BELOW_USES, EXTRA_USES, OPENING_USES, FormatSpec, Row, extras
from preftune.data.formats.openings import answer, questioned
from preftune.data.formats.turns import is_messages, is_turn, message, need_text_or_messages

#: Names of the question and of the two answers, in the order in which they are looked for.
QUESTIONS = (
    *("prompt", "question", "instruction", "query", "input", "problem", "user_prompt", "user_input", "user_query"),
    *("user_message", "input_text", "instructions", "context", "context_messages"),
)
ANSWERS = (
    ("chosen", "rejected"),
    ("chosen_response", "rejected_response"),
    ("response", "rejected_response"),
    ("response", "rejected"),
    ("answer", "rejected"),
    ("output", "rejected"),
    ("completion", "rejected"),
    ("chosen_answer", "rejected_answer"),
    ("preferred", "dispreferred"),
    ("preferred_response", "dispreferred_response"),
    ("response_j", "response_k"),
    ("accepted", "rejected"),
    ("positive", "negative"),
    ("response_chosen", "response_rejected"),
    ("preferred_output", "non_preferred_output"),
    ("chosen_code", "rejected_code"),
    ("good_answer", "bad_answer"),
    ("good_response", "bad_response"),
    ("better_answer", "worse_answer"),
    ("better_response", "worse_response"),
    ("winner", "loser"),
)


def names(columns: Collection[str]) -> tuple[str, str, str] | None:
    """The columns of question, preferred and other answer."""
    question = next((name for name in QUESTIONS if name in columns), None)
    found = next((pair for pair in ANSWERS if pair[0] in columns and pair[1] in columns), None)
    return None if question is None or found is None else (question, *found)


def detect(columns: Collection[str], row: Mapping[str, Any]) -> bool:
    """A question of text, or of messages, beside two answers that do not repeat it."""
    found = names(columns)
    if found is None or not isinstance(row.get(found[0]), str | list | int | float):
        return False
    # A number in place of an answer is told when the row is read.
    return all(isinstance(row.get(name), str | int | float) or _is_reply(row.get(name)) for name in found[1:])


def _is_reply(value: Any) -> bool:
    if is_turn(value):
        value = [value]
    return is_messages(value) and message(value[0], "answer")["role"] == "assistant"


def convert(row: Mapping[str, Any]) -> Row:
    """Messages: an optional system turn and history, the question, and one assistant turn per answer."""
    question, better, worse = names(row) or ("prompt", *ANSWERS[0])
    chosen, rejected = (answer(need_text_or_messages(row, name)) for name in (better, worse))
    return {"prompt": questioned(row, question), "chosen": chosen, "rejected": rejected, **extras(row)}


NAMED_PAIR = FormatSpec(
    name="named_pair",
    kind="preference",
    required=(),
    detect=detect,
    convert=convert,
    summary=f"a question ({', '.join(QUESTIONS)}) and two answers ({', '.join('/'.join(pair) for pair in ANSWERS)})",
    uses={
        **BELOW_USES,
        **dict.fromkeys(QUESTIONS, "the prompt"),
        **{pair[1]: "the other answer" for pair in ANSWERS},
        **{pair[0]: "the preferred answer" for pair in ANSWERS},
        **OPENING_USES,
        **EXTRA_USES,
    },
    either=(tuple(name for name in QUESTIONS if name not in BELOW_USES),),
)
