"""Ranked or rated responses: one prompt, n answers, a score or rank for each."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from preftune.data.formats.base import (
    BELOW_USES,
    EXTRA_USES,
    OPENING_USES,
    BadRow,
    FormatSpec,
    Row,
    extras,
    need,
    need_number,
    need_score,
)
from preftune.data.formats.openings import answer, prompted, question
from preftune.data.formats.turns import is_messages, need_text_or_messages, parsed
from preftune.errors import DataError

PROMPTS = ("prompt", "question", "instruction", "query", "context")
RESPONSES = ("responses", "completions", "answers", "candidates", "generations", "outputs", "output")
SCORES = ("scores", "ratings", "rewards")
RANKS = ("ranks", "ranking", "rank")
#: What an entry of such a list calls its text.
TEXT_KEYS = ("response", "answer", "text", "content", "completion", "output")
_SCORE_KEYS = ("score", "overall_score", "rating", "reward", "pm_score")


def _first(names: tuple[str, ...], available: Collection[str]) -> str | None:
    return next((name for name in names if name in available), None)


def detect(columns: Collection[str], row: Mapping[str, Any]) -> bool:
    """A prompt beside a list of responses that carry scores or ranks."""
    responses = _first(RESPONSES, columns)
    if _first(PROMPTS, columns) is None or responses is None or not isinstance(_listed(row.get(responses)), list):
        return False
    if _first(SCORES + RANKS, columns):
        return True
    first = next(iter(_listed(row[responses])), None)
    return isinstance(first, Mapping) and _first((*_SCORE_KEYS, "rank"), first) is not None


def _listed(value: Any) -> Any:
    """A list that CSV holds as text, as a list."""
    return parsed(value) if isinstance(value, str) and value.lstrip()[:1] == "[" else value


def convert(row: Mapping[str, Any]) -> Row:
    """``{prompt, responses, scores}`` with higher scores better; a rank counts from 1, the best, and is negated."""
    prompt_name = _first(PROMPTS, row) or "prompt"
    field = _first(RESPONSES, row) or "responses"
    items = _listed(need(row, field))
    if not isinstance(items, list) or len(items) < 2:
        raise BadRow(
            "too_few_responses", field, f"{field!r} must list two or more responses", remedy="remove the row or add one"
        )
    if isinstance(items[0], Mapping) and not is_messages(items):
        read = [_read_item(item, field) for item in items]
        # Judges leave answers without a score; the others can still be compared.
        rated = [(text, score) for text, score in read if score is not None]
        responses, scores = zip(*(rated if len(rated) > 1 else map(_need_scored, read)), strict=True)
    else:
        scored = zip(items, _read_scores(row, len(items)), strict=True)
        responses, scores = zip(*((item, score) for item, score in scored if score is not None), strict=True)
    texts = [need_text_or_messages({field: text}, field) for text in responses]
    if any(isinstance(text, str) for text in texts):
        (prompt,) = prompted(row, question(row, prompt_name))
        texts = texts if isinstance(prompt, str) else list(map(answer, texts))
    else:
        prompt, *texts = prompted(row, question(row, prompt_name), *texts)
    return {"prompt": prompt, "responses": texts, "scores": list(scores), **extras(row)}


def _need_scored(item: tuple[Any, float | None]) -> tuple[Any, float]:
    return item[0], need_number("N/A" if item[1] is None else item[1], "score")


def _read_item(item: Any, field: str) -> tuple[Any, float | None]:
    text = _first(TEXT_KEYS, item) if isinstance(item, Mapping) else None
    score = _first((*_SCORE_KEYS, "rank"), item) if isinstance(item, Mapping) else None
    if text is None or score is None:
        raise BadRow(
            "malformed_response",
            field,
            f"an entry of {field!r} has no text or no score",
            value=item,
            remedy=f"give each entry one of {', '.join(TEXT_KEYS)} and one of {', '.join(_SCORE_KEYS)} or rank",
        )
    if _is_missing(item[score]):
        return item[text], None
    number = need_score(item[score], score)
    return item[text], -number if score == "rank" else number


def _read_scores(row: Mapping[str, Any], count: int) -> tuple[float | None, ...]:
    """One score per response; ``None`` where a judge gave none, unless that leaves nothing to compare."""
    field = _first(SCORES, row) or _first(RANKS, row) or "scores"
    values = _listed(need(row, field))
    if not isinstance(values, list) or len(values) != count:
        raise BadRow(
            "scores_do_not_match",
            field,
            f"{field!r} must list one number per response",
            value=values,
            remedy=f"give {count} numbers",
        )
    sign = -1.0 if field in RANKS else 1.0
    if field == "ranking" and any(str(value).strip() in ("0", "0.0") for value in values):
        raise DataError(
            "'ranking' counts from 0: ranks of the answers, or their order?",
            where="field 'ranking'",
            value=values,
            remedy="write ranks from 1, the best, in a column `ranks`, or scores, higher is better",
        )
    found = tuple(None if _is_missing(value) else sign * need_score(value, field) for value in values)
    if sum(value is not None for value in found) < 2:
        raise BadRow("not_a_number", field, f"{field!r} holds fewer than two numbers", value=values, remedy="give them")
    return found


def _is_missing(value: Any) -> bool:
    return value is None or str(value).strip().lower() in ("", "n/a", "none", "nan", "null")


RANKED = FormatSpec(
    name="ranked",
    kind="ranked",
    required=(),
    detect=detect,
    convert=convert,
    summary="prompt, responses and their scores or ranks; made into best-worst or all pairs",
    uses={
        **dict.fromkeys(PROMPTS, "the prompt"),
        **dict.fromkeys(RESPONSES, "the answers"),
        **dict.fromkeys((*SCORES, *RANKS), "which answers are better"),
        **BELOW_USES,
        **OPENING_USES,
        **EXTRA_USES,
    },
    either=(tuple(name for name in PROMPTS if name not in BELOW_USES), RESPONSES, (*SCORES, *RANKS)),
)
