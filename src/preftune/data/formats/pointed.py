"""Pairs whose columns ``chosen`` and ``rejected`` name the answers instead of holding them."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from preftune.data.formats import two_answers
from preftune.data.formats.base import EXTRA_USES, OPENING_USES, BadRow, FormatSpec, Row
from preftune.data.formats.named_pair import QUESTIONS
from preftune.data.formats.ranked import RESPONSES, TEXT_KEYS
from preftune.data.formats.turns import parsed
from preftune.errors import DataError

_NAMED = "pointed"
#: Columns that name the better and the worse answer, in the order in which they are looked for.
POINTERS = (("chosen", "rejected"), ("preferred", "dispreferred"), ("accepted", "rejected"))
#: Columns that hold the texts where the pointers hold names of models, letters or scores.
_TEXT_WORDS = ("response", "text", "answer", "completion", "output", "content")
#: A name of a column, a model or an answer; no answer of several words.
_NAME = re.compile(r"[\w.:@/-]{1,60}")
_NUMBER = re.compile(r"[+-]?\d+(?:\.\d+)?|true|false|[a-zA-Z]", re.IGNORECASE)
#: One of several answers, by its letter or number.
_ENDED = re.compile(r"(?:response|answer|completion|output|candidate|reply)[_ ]?([a-zA-Z]|\d)")
_IDS = ("id", "response_id", "answer_id", "name", "model", "model_name", "generator")


def _pointers(columns: Collection[str], row: Mapping[str, Any]) -> tuple[str, str] | None:
    """The two columns whose values may be names."""
    for pair in POINTERS:
        if pair[0] in columns and pair[1] in columns and all(_NAME.fullmatch(_word(row.get(one))) for one in pair):
            return pair
    return None


def _word(value: Any) -> str:
    return str(value).strip() if isinstance(value, str | int | float) else ""


def _text_columns(columns: Collection[str], pointers: tuple[str, str]) -> tuple[str, str] | None:
    """Columns such as ``chosen_response`` and ``rejected_response``."""
    better, worse = pointers
    names = [(f"{better}_{word}", f"{worse}_{word}") for word in _TEXT_WORDS]
    names += [(f"{word}_{better}", f"{word}_{worse}") for word in _TEXT_WORDS]
    return next((pair for pair in names if pair[0] in columns and pair[1] in columns), None)


def _are_about(row: Mapping[str, Any], pointers: tuple[str, str], texts: tuple[str, str]) -> bool:
    """Whether the pointers of a row are about the texts, and no answers with a longer form beside them."""
    pairs = [(_word(row.get(name)), row.get(text)) for name, text in zip(pointers, texts, strict=True)]
    if not all(isinstance(text, str) and text.strip() for _, text in pairs):
        return False
    if all(_NUMBER.fullmatch(name) for name, _ in pairs):
        return True
    return all(len(str(text)) > len(name) and name not in str(text) for name, text in pairs)


def _pair(columns: Collection[str]) -> tuple[str, str] | None:
    """Two answers, where there is no third: of more, letters may be the choices of a question."""
    for first, second in two_answers.ANSWERS:
        if first in columns and second in columns:
            third = second[:-1] + chr(ord(second[-1]) + 1)
            return None if third in columns else (first, second)
    return None


def _are_choices(row: Mapping[str, Any], pair: tuple[str, str]) -> bool:
    """Whether a question lists its two answers, so that their letters are what is to be answered."""
    asked = next((row[name] for name in QUESTIONS if isinstance(row.get(name), str)), "")
    return all(str(row.get(name)).strip() in asked for name in pair)


def text_columns(columns: Collection[str]) -> tuple[tuple[str, str], tuple[str, str]] | None:
    """The columns that name answers, and those of the texts where the texts have such columns of their own."""
    for pointers in POINTERS:
        texts = _text_columns(columns, pointers) if {*pointers} <= {*columns} else None
        if texts is not None:
            return pointers, texts
    return None


def _better(row: Mapping[str, Any], pointers: tuple[str, str], pair: tuple[str, str]) -> str:
    """The column of the better answer.

    Raises:
        BadRow: The pointers do not name one answer each.
        DataError: They count in a way that leaves two readings.
    """
    gaps = [two_answers.named(row, name, pair) for name in pointers]
    if gaps[0] * gaps[1] >= 0:
        raise _names_none(row, pointers)
    return pair[0] if gaps[0] > 0 else pair[1]


def _names_none(row: Mapping[str, Any], pointers: tuple[str, str]) -> BadRow:
    what = f"{pointers[0]!r} and {pointers[1]!r} do not name one answer each"
    values = [row.get(name) for name in pointers]
    return BadRow("not_a_label", pointers[0], what, value=values, remedy="name the better and the other answer")


def _texts_by_name(row: Mapping[str, Any]) -> dict[str, Any]:
    """Answers of a row by the name that each has: an id or model in a list, a key, or their own column."""
    out: dict[str, Any] = {}
    for name in RESPONSES:
        items = row.get(name)
        items = parsed(items) if isinstance(items, str) and items.lstrip()[:1] in ("[", "{") else items
        if isinstance(items, Mapping):
            out |= {str(key): text for key, text in items.items() if isinstance(text, str)}
        for item in items if isinstance(items, list) else []:
            text = next((item[key] for key in TEXT_KEYS if key in item), None) if isinstance(item, Mapping) else None
            out |= {str(item[key]): text for key in _IDS if text is not None and item.get(key) is not None}
    if out:
        return out
    columns = {key: value for key, value in row.items() if isinstance(value, str | list) and value}
    endings = {found[1].lower(): columns[key] for key in columns if (found := _ENDED.fullmatch(key))}
    # One letter alone may be a choice of the question, and is what is to be answered then.
    return {key: value for key, value in (endings | columns).items() if len(key) > 1 or key in endings}


def _resolved(columns: Collection[str], row: Mapping[str, Any], *, sure: bool) -> Row | None:
    """The row as one of another format, with the answers in place of their names; ``None`` where nothing is named.

    Args:
        columns: Names of the columns.
        row: The row.
        sure: The file is known to be of this format.

    Raises:
        BadRow: Names of no answer.
    """
    pointers = _pointers(columns, row)
    if pointers is None:
        return None
    rest = {key: value for key, value in row.items() if key not in pointers}
    texts = _text_columns(columns, pointers)
    if texts is not None:
        found = sure or _are_about(row, pointers, texts)
        return {**rest, "chosen": row[texts[0]], "rejected": row[texts[1]]} if found else None
    pair = _pair(columns)
    if pair is not None:
        if not sure and _are_choices(row, pair):
            return None
        better = _better(row, pointers, pair)
        without = {key: value for key, value in rest.items() if key not in two_answers.WINNERS}
        voted = {**without, "winner": better}
        if two_answers.detect(voted, voted):
            return voted
        worse = pair[1] if better == pair[0] else pair[0]
        return {**rest, "chosen": row[better], "rejected": row[worse]}
    by_name = _texts_by_name(rest)
    answers = [by_name.get(_word(row[name])) for name in pointers]
    if None in answers:
        if sure:
            raise _names_none(row, pointers)
        return None
    return {**rest, "chosen": answers[0], "rejected": answers[1]}


_USES: Mapping[str, str] = {
    **dict.fromkeys((*QUESTIONS, "messages", "conversations"), "the prompt"),
    **dict.fromkeys((name for pair in POINTERS for name in pair), "which answer is better"),
    **dict.fromkeys((name for pair in two_answers.ANSWERS for name in pair), "one of the two answers"),
    **{f"{name}_{word}": "the preferred answer" for name, _ in POINTERS for word in _TEXT_WORDS},
    **{f"{word}_{name}": "the preferred answer" for name, _ in POINTERS for word in _TEXT_WORDS},
    **{f"{name}_{word}": "the other answer" for _, name in POINTERS for word in _TEXT_WORDS},
    **{f"{word}_{name}": "the other answer" for _, name in POINTERS for word in _TEXT_WORDS},
    **dict.fromkeys(RESPONSES, "the answers, by name"),
    **dict.fromkeys(("model_a", "model_b"), "which answer one named so gave"),
    **OPENING_USES,
    **EXTRA_USES,
}


def pointed_format(recognise: Callable[[Collection[str], Mapping[str, Any]], FormatSpec | None]) -> FormatSpec:
    """The format, made with what recognises the others: a row is one of them once its answers are looked up.

    Args:
        recognise: Columns and a row -> the format of rows whose answers stand where they are expected.
    """

    def other_of(row: Mapping[str, Any]) -> FormatSpec | None:
        other = recognise(list(row), row)
        return other if other is not None and other.kind == "preference" and other.name != _NAMED else None

    def detect(columns: Collection[str], row: Mapping[str, Any]) -> bool:
        try:
            found = _resolved(columns, row, sure=False)
        except (BadRow, DataError):
            return False
        return found is not None and other_of(found) is not None

    def convert(row: Mapping[str, Any]) -> Row:
        found = _resolved(row, row, sure=True)
        other = None if found is None else other_of(found)
        if found is None or other is None:
            raise _names_none(row, next((pair for pair in POINTERS if pair[0] in row and pair[1] in row), POINTERS[0]))
        return other.convert(found)

    return FormatSpec(
        name=_NAMED,
        kind="preference",
        required=(),
        detect=detect,
        convert=convert,
        summary="two answers in columns of their own, and chosen and rejected that name them (a column, model, id or"
        " number)",
        uses=_USES,
    )
