"""Columns ``chosen`` and ``rejected`` that name the answers, which stand in columns of their own."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from preftune.data.formats import named_pair, two_answers
from preftune.data.formats.base import BELOW_USES, EXTRA_USES, OPENING_USES, BadRow, FormatSpec, Row
from preftune.data.formats.ranked import RESPONSES
from preftune.errors import DataError

#: Columns that name the better and the worse answer, in the order in which they are looked for.
POINTERS = (("chosen", "rejected"), ("preferred", "dispreferred"), ("accepted", "rejected"))
#: Endings of columns that hold the texts where ``chosen`` and ``rejected`` hold names of models, or scores.
_ENDINGS = ("response", "text", "answer", "completion", "output")
_IDS = ("id", "response_id", "answer_id", "name", "model", "model_name")
_TEXTS = ("text", "response", "answer", "content", "completion")
#: No name of an answer is longer.
_LONGEST = 60


def _pointers(columns: Collection[str], row: Mapping[str, Any]) -> tuple[str, str] | None:
    """The two columns that may name answers: words, numbers or truth values."""
    for pair in POINTERS:
        if pair[0] in columns and pair[1] in columns and all(_is_short(row.get(name)) for name in pair):
            return pair
    return None


def _is_short(value: Any) -> bool:
    return isinstance(value, int | float) or (isinstance(value, str) and 0 < len(value) <= _LONGEST)


def _named_texts(columns: Collection[str], row: Mapping[str, Any], pointers: tuple[str, str]) -> tuple[str, str] | None:
    """Columns such as ``chosen_response`` and ``rejected_response``, whose texts are not those of the pointers."""
    for ending in _ENDINGS:
        pair = (f"{pointers[0]}_{ending}", f"{pointers[1]}_{ending}")
        texts = [row.get(name) for name in pair]
        if pair[0] in columns and all(isinstance(text, str) and text for text in texts):
            said = [str(row[name]).strip() for name in pointers]
            if not any(str(text).strip() in one or one in str(text) for text, one in zip(texts, said, strict=True)):
                return pair
    return None


def _answers(columns: Collection[str]) -> tuple[str, str] | None:
    return next((pair for pair in two_answers.ANSWERS if pair[0] in columns and pair[1] in columns), None)


def _points(row: Mapping[str, Any], pointers: tuple[str, str], pair: tuple[str, str]) -> float:
    """Above 0 where the first of two answers is named as the better one.

    Raises:
        BadRow: The columns do not name one answer each.
        DataError: They count in a way that leaves two readings.
    """
    texts = [str(row.get(name)).strip() for name in pair]
    gaps = []
    for name in pointers:
        said = str(row.get(name)).strip()
        # The whole answer once more names it too.
        gap = 1.0 if said == texts[0] else -1.0 if said == texts[1] else two_answers.named(row, name, pair)
        gaps.append(gap)
    if gaps[0] * gaps[1] >= 0:
        what = f"{pointers[0]!r} and {pointers[1]!r} do not name one answer each"
        values = [row.get(name) for name in pointers]
        raise BadRow("not_a_label", pointers[0], what, value=values, remedy="name the better and the other answer")
    return gaps[0]


def _listed(columns: Collection[str], row: Mapping[str, Any]) -> str | None:
    """A column of answers that have names."""
    for name in RESPONSES:
        items = row.get(name) if name in columns else None
        if isinstance(items, list) and items and all(isinstance(item, Mapping) for item in items):
            return name
    return None


def _texts_by_name(items: Any) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for item in items if isinstance(items, list) else []:
        text = next((item[key] for key in _TEXTS if key in item), None) if isinstance(item, Mapping) else None
        out |= {str(item[key]): text for key in _IDS if text is not None and item.get(key) is not None}
    return out


def _resolved(columns: Collection[str], row: Mapping[str, Any]) -> Row | None:
    """The row with a question and its two answers under names that are known; ``None`` where nothing is pointed at.

    Raises:
        BadRow: See :func:`_points`.
    """
    pointers = _pointers(columns, row)
    if pointers is None or not any(name in columns for name in named_pair.QUESTIONS):
        return None
    rest = {key: value for key, value in row.items() if key not in pointers}
    texts = _named_texts(columns, row, pointers)
    if texts is not None:
        return {**rest, "chosen": row[texts[0]], "rejected": row[texts[1]]}
    pair = _answers(columns)
    if pair is not None:
        better, worse = pair if _points(row, pointers, pair) > 0 else pair[::-1]
        return {**rest, "chosen": row[better], "rejected": row[worse]}
    listed = _listed(columns, row)
    if listed is not None:
        by_name = _texts_by_name(row[listed])
        found = [by_name.get(str(row[name])) for name in pointers]
        if None not in found:
            return {**rest, "chosen": found[0], "rejected": found[1]}
        what = f"{pointers[0]!r} and {pointers[1]!r} name no answers of {listed!r}"
        values = [row[name] for name in pointers]
        raise BadRow("not_a_label", pointers[0], what, value=values, remedy=f"use the names {', '.join(by_name)}")
    return None


def detect(columns: Collection[str], row: Mapping[str, Any]) -> bool:
    """Two short values that name answers which stand elsewhere in the row."""
    try:
        return _resolved(columns, row) is not None
    except (BadRow, DataError):
        return False


def convert(row: Mapping[str, Any]) -> Row:
    """As a question and two answers, after the answers were looked up."""
    found = _resolved(row, row)
    if found is None:
        pointers = POINTERS[0]
        what = f"{pointers[0]!r} and {pointers[1]!r} name no answers"
        values = [row.get(name) for name in pointers]
        raise BadRow("not_a_label", pointers[0], what, value=values, remedy="name the better and the other answer")
    return named_pair.convert(found)


POINTED = FormatSpec(
    name="pointed",
    kind="preference",
    required=(),
    detect=detect,
    convert=convert,
    summary="two answers in columns of their own, and chosen and rejected that name them (a column, model, id or"
    " number)",
    uses={
        **BELOW_USES,
        **dict.fromkeys(named_pair.QUESTIONS, "the prompt"),
        **dict.fromkeys((name for pair in POINTERS for name in pair), "which answer is better"),
        **dict.fromkeys((name for pair in two_answers.ANSWERS for name in pair), "one of the two answers"),
        **dict.fromkeys((f"{name}_{end}" for name in ("chosen", "preferred", "accepted") for end in _ENDINGS),
                        "the preferred answer"),
        **dict.fromkeys((f"{name}_{end}" for name in ("rejected", "dispreferred") for end in _ENDINGS),
                        "the other answer"),
        **dict.fromkeys(RESPONSES, "the answers, by name"),
        **dict.fromkeys(("model_a", "model_b"), "which answer one named so gave"),
        **OPENING_USES,
        **EXTRA_USES,
    },
    either=(tuple(name for name in named_pair.QUESTIONS if name not in BELOW_USES),),
)  # fmt: skip
