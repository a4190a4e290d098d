"""One rated answer a row, several rows of one prompt: HelpSteer, and any file of prompt, response and score."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from preftune.data.formats.base import (
    BELOW_USES,
    OPENING_USES,
    TEMPLATE_USES,
    FormatSpec,
    Row,
    need_score,
    template_extras,
)
from preftune.data.formats.openings import prompted, question
from preftune.data.formats.turns import need_text_or_messages

PROMPTS = ("prompt", "question", "instruction", "query", "problem", "user_prompt")
ANSWERS = ("response", "completion", "output", "model_response", "answer")
#: What an answer is rated by, in the order in which it is looked for. HelpSteer's other ratings describe the answer.
SCORES = ("helpfulness", "score", "rating", "overall_score", "reward")


def _names(columns: Collection[str]) -> tuple[str, str, str] | None:
    found = [next((name for name in names if name in columns), None) for names in (PROMPTS, ANSWERS, SCORES)]
    return None if None in found else (str(found[0]), str(found[1]), str(found[2]))


def detect(columns: Collection[str], row: Mapping[str, Any]) -> bool:
    """Prompt, answer and score, and nothing else that would be an answer."""
    names = _names(columns)
    if names is None or {"chosen", "rejected"} & set(columns):
        return False
    return isinstance(row.get(names[1]), str | list) and isinstance(row.get(names[2]), int | float | str)


def convert(row: Mapping[str, Any]) -> Row:
    """``{prompt, completion, score}``; rows of one prompt are brought together later."""
    prompt, given, score = _names(row) or ("prompt", "response", "score")
    values = prompted(row, question(row, prompt), need_text_or_messages(row, given))
    return {
        "prompt": values[0],
        "completion": values[1],
        "score": need_score(row.get(score), score),
        **template_extras(row),
    }


RATED = FormatSpec(
    name="rated",
    kind="rated",
    required=(),
    detect=detect,
    convert=convert,
    summary="prompt, response and a score (helpfulness, score, rating); paired with other answers to the same prompt",
    uses={
        **dict.fromkeys(PROMPTS, "the prompt"),
        **dict.fromkeys(ANSWERS, "the answer"),
        **dict.fromkeys(SCORES, "which answer is better"),
        **BELOW_USES,
        **OPENING_USES,
        **TEMPLATE_USES,
    },
    either=(PROMPTS, ANSWERS, SCORES),
)
