"""What every data format shares: its specification, the bad-row signal and helpers to read fields."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

Row: TypeAlias = dict[str, Any]
Message: TypeAlias = dict[str, Any]
Kind: TypeAlias = Literal["preference", "sft", "ranked", "unpaired", "rated"]

#: What is done with columns that nothing reads.
NOT_USED = "not used"
#: Numbers that travel with a pair untouched.
FLOAT_EXTRAS = ("margin", "weight", "ref_chosen_logps", "ref_rejected_logps")

_RENAME = "give a number; a column of another meaning needs another name (`dataset_columns: {theirs: ours}`)"

_SCORE_COLUMNS = (("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"))

#: What is done with columns that several formats share; a format's ``uses`` are made of these and its own.
TEMPLATE_USES: Mapping[str, str] = {
    "tools": "given to the chat template",
    "functions": "given to the chat template as tools",
    "chat_template_kwargs": "given to the chat template",
}
EXTRA_USES: Mapping[str, str] = {
    **TEMPLATE_USES,
    "weight": "scales the loss of the row",
    "margin": "score gap, for losses that use one",
    "ref_chosen_logps": "left aside: the reference is computed anew",
    "ref_rejected_logps": "left aside: the reference is computed anew",
    **dict.fromkeys([name for pair in _SCORE_COLUMNS for name in pair], "their difference is the score gap"),
}
PAIR_USES: Mapping[str, str] = {"chosen": "the preferred answer", "rejected": "the other answer", **EXTRA_USES}
OPENING_USES: Mapping[str, str] = {
    **dict.fromkeys(("system", "system_prompt", "system_message"), "the system turn"),
    "history": "earlier turns",
}
BELOW_USES: Mapping[str, str] = dict.fromkeys(("input", "context"), "the user turn, below the question")


class BadRow(Exception):
    """A row that cannot be used as it is. The policy in :mod:`preftune.data.rows` decides what happens next.

    Args:
        reason: Short code that rows are counted under, for example ``empty_completion``.
        field: Column the problem is in.
        what: The problem as a short sentence.
        remedy: What the user can do about it.
        value: The offending value, where it helps.
        raw: The whole line, where a row could not even be parsed.
    """

    def __init__(
        self, reason: str, field: str, what: str, *, remedy: str = "", value: Any = None, raw: str | None = None
    ) -> None:
        super().__init__(what)
        self.reason = reason
        self.field = field
        self.what = what
        self.remedy = remedy
        self.value = value
        self.raw = raw


@dataclass(frozen=True)
class FormatSpec:
    """One data format.

    Attributes:
        name: Name for ``dataset_format``.
        kind: What a converted row is: a preference pair, an SFT example, ranked responses, an answer with a label,
            or an answer with a score.
        required: Columns without which the format cannot be read.
        detect: ``(columns, first row) -> bool``.
        convert: ``row -> canonical row``; raises :class:`BadRow`.
        summary: One line for help texts.
        uses: Column -> what is done with it, for every column that the format may read.
        either: Groups of columns of which the first that is there is read, and no other.
    """

    name: str
    kind: Kind
    required: tuple[str, ...]
    detect: Callable[[Collection[str], Mapping[str, Any]], bool]
    convert: Callable[[Mapping[str, Any]], Row]
    summary: str
    uses: Mapping[str, str] = field(default_factory=dict)
    either: tuple[tuple[str, ...], ...] = ()


def has(columns: Collection[str], *names: str) -> bool:
    """Whether all ``names`` are among ``columns``."""
    return all(name in columns for name in names)


def need(row: Mapping[str, Any], field: str) -> Any:
    """The value of ``field``; a missing column and a null are bad rows."""
    if field not in row:
        raise BadRow(
            "missing_column",
            field,
            f"the field {field!r} is missing",
            remedy="add it, or rename a column with `dataset_columns: {theirs: ours}`",
        )
    value = row[field]
    if value is None:
        raise BadRow("null", field, f"{field!r} is null", remedy="fill it in or remove the row")
    return value


def need_text(row: Mapping[str, Any], field: str) -> str:
    """The value of ``field``, which must be a string."""
    value = need(row, field)
    if not isinstance(value, str):
        raise not_text(field, value)
    return value


def optional_text(row: Mapping[str, Any], field: str) -> str:
    """The value of ``field``, or an empty string where it is absent or null."""
    return need_text(row, field) if row.get(field) is not None else ""


def need_number(value: Any, field: str) -> float:
    """``value`` as a finite float; numbers written as text are accepted (CSV has nothing else)."""
    try:
        number = float(value) if not isinstance(value, bool) else math.nan
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise BadRow(
            "not_a_number",
            field,
            f"{field!r} is not a finite number",
            value=value,
            remedy=_RENAME if field in FLOAT_EXTRAS else "give a number",
        )
    return number


def number_of(value: Any) -> float | None:
    """``value`` as a finite float; ``None`` where it is none."""
    try:
        return need_number(value, "")
    except BadRow:
        return None


#: A rating as people write it: 4,5 or 4.5; 8/10; 90%; 5 stars. A comma before three digits may stand between thousands.
_RATING = re.compile(r"\s*(-?\d+(?:\.\d+|,\d{1,2})?)\s*(?:/\s*([1-9]\d*)|%|stars?|points?)?\s*", re.IGNORECASE)


def need_score(value: Any, field: str) -> float:
    """A rating as a finite float, however it is written; ratings of one file are on one scale."""
    written = _RATING.fullmatch(value) if isinstance(value, str) else None
    if written is None:
        return need_number(value, field)
    return need_number(written[1].replace(",", "."), field) / float(written[2] or 1)


def not_text(field: str, value: Any) -> BadRow:
    """The bad row that a value is which is neither text nor messages."""
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        what = f"{field!r} is a list of {len(value)} texts, where one text or a list of messages is wanted"
        remedy = "write a row for each of them, or messages with role and content"
        return BadRow("not_text", field, what, value=value, remedy=remedy)
    return BadRow(
        "not_text",
        field,
        f"{field!r} is neither text nor a list of messages",
        value=value,
        remedy="convert it to text, or name the right column with `dataset_columns: {theirs: ours}`",
    )


def template_extras(row: Mapping[str, Any]) -> Row:
    """Optional fields that a chat template is given: tools and further arguments.

    Tools become a JSON string: Arrow would otherwise merge the schemas of different tools into one.
    """
    out: Row = {}
    tools = row.get("tools")
    if tools in (None, ""):
        # What the first version of OpenAI's interface called them.
        tools = row.get("functions")
    if isinstance(tools, list) and any(isinstance(tool, str) for tool in tools):
        tools = [_parsed(tool) if isinstance(tool, str) else tool for tool in tools]
    if tools not in (None, ""):
        out["tools"] = tools if isinstance(tools, str) else json.dumps(tools, ensure_ascii=False)
        if not isinstance(_parsed(out["tools"]), list):
            raise BadRow(
                "not_a_list", "tools", "'tools' is not a list of tools", value=tools, remedy="write it as a JSON list"
            )
    kwargs = row.get("chat_template_kwargs")
    if isinstance(kwargs, str) and kwargs:
        kwargs = _parsed(kwargs)
    if kwargs not in (None, ""):
        if not isinstance(kwargs, Mapping):
            raise BadRow(
                "not_a_mapping",
                "chat_template_kwargs",
                "'chat_template_kwargs' is not a mapping",
                value=kwargs,
                remedy="write it as {name: value}",
            )
        out["chat_template_kwargs"] = dict(kwargs)
    return out


def _parsed(text: str) -> Any:
    """What JSON text holds, or the text itself where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def extras(row: Mapping[str, Any]) -> Row:
    """Optional fields of a pair or a labelled answer: those of its template, score gap, weight, reference log-probs.

    A score gap that is no number is left out: only some losses want one, and those that do say whose is missing.
    """
    out = template_extras(row)
    for name in FLOAT_EXTRAS:
        if name != "margin" and row.get(name) not in (None, ""):
            out[name] = need_number(row[name], name)
    for better, worse in _SCORE_COLUMNS:
        if not {better, worse} - row.keys():
            _enter_margin(out, row[better], row[worse])
            break
    if row.get("margin") not in (None, ""):
        _enter_margin(out, row["margin"], 0.0)
    return out


def _enter_margin(out: Row, better: Any, worse: Any) -> None:
    out.pop("margin", None)
    with suppress(BadRow):
        out["margin"] = need_number(better, "margin") - need_number(worse, "margin")


def common_prefix(first: Any, second: Any) -> int:
    """Length of the longest common prefix of two strings or two lists."""
    high = min(len(first), len(second))
    if first[:high] == second[:high]:
        return high
    # Bisection over slices: the comparison of elements runs in C. The prefix of length `low` agrees, `high` does not.
    low = 0
    while high - low > 1:
        middle = (low + high) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle
    return low
