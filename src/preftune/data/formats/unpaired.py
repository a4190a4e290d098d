"""Unpaired answers with a yes or no label: prompt, completion, label."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from preftune.data.formats.base import EXTRA_USES, OPENING_USES, BadRow, FormatSpec, Row, extras, has, need
from preftune.data.formats.openings import prompted
from preftune.data.formats.turns import need_text_or_messages

_YES = ("true", "1", "1.0", "+1", "yes", "desirable", "chosen", "accepted", "thumbs_up", "up", "like", "liked")
_NO = ("false", "0", "0.0", "-1", "-1.0", "no", "undesirable", "rejected", "thumbs_down", "down", "dislike", "disliked")
_LABELS = {**dict.fromkeys(_YES, True), **dict.fromkeys(_NO, False)}
#: Columns that say whether an answer is desirable, in the order in which they are looked for.
LABELS = ("label", "kto_tag", "desirable")
LABEL_USES = dict.fromkeys(LABELS, "whether the answer is desirable")


def label_column(columns: Collection[str], row: Mapping[str, Any]) -> str | None:
    """The column that says whether an answer is desirable, where one of that name holds true or false."""
    return next((name for name in LABELS if name in columns and _truth(row.get(name)) is not None), None)


def _truth(value: Any) -> bool | None:
    return _LABELS.get(str(value).strip().lower())


def label_of(row: Mapping[str, Any]) -> bool:
    """The label of a row; ``true``/``false``, ``yes``/``no``, 1/0, 1/-1 and ``desirable`` are understood.

    Raises:
        BadRow: It is none of these.
    """
    name = label_column(row, row) or next((name for name in LABELS if name in row), "label")
    value = need(row, name)
    label = _truth(value)
    if label is None:
        raise BadRow(
            "not_a_label", name, f"{name!r} is neither true nor false", value=value, remedy="use true or false"
        )
    return label


def convert(row: Mapping[str, Any]) -> Row:
    """The row with its label as a bool."""
    label = label_of(row)
    fields = ("prompt", "completion")
    values = prompted(row, *(need_text_or_messages(row, name) for name in fields))
    return {**dict(zip(fields, values, strict=True)), "label": label, **extras(row)}


UNPAIRED = FormatSpec(
    name="unpaired",
    kind="unpaired",
    required=("prompt", "completion"),
    detect=lambda columns, row: (
        has(columns, "prompt", "completion") and ("label" in columns or label_column(columns, row) is not None)
    ),
    convert=convert,
    summary="prompt, completion, label (or kto_tag); paired where a prompt has both labels",
    uses={"prompt": "the prompt", "completion": "the answer", **LABEL_USES, **OPENING_USES, **EXTRA_USES},
    either=(LABELS,),
)
