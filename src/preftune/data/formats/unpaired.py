"""Unpaired answers with a yes or no label: prompt, completion, label."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from preftune.data.formats.base import EXTRA_USES, OPENING_USES, BadRow, FormatSpec, Row, extras, has, need
from preftune.data.formats.openings import prompted
from preftune.data.formats.turns import need_text_or_messages

_YES = (
    *("true", "1", "1.0", "+1", "yes", "y", "t", "desirable", "chosen", "accepted", "thumbs_up", "thumbs up", "up"),
    *("like", "liked", "good", "positive", "pos", "correct", "right", "👍"),
    *("helpful", "safe", "accept", "approved"),
)
_NO = (
    *("false", "0", "0.0", "-1", "-1.0", "no", "n", "f", "undesirable", "rejected", "thumbs_down", "thumbs down"),
    *("down", "dislike", "disliked", "bad", "negative", "neg", "incorrect", "wrong", "👎"),
    *("not_helpful", "not helpful", "unhelpful", "unsafe", "reject", "not_approved"),
)
#: Names of columns whose truth means that something is wrong, or nothing about the answer.
_FAULTS = re.compile(
    r"toxic|harm|flag|redact|unsafe|bad|reject|spam|hate|offens|error|wrong|incorrect|fail|delet|hid|undes|unhelp|not_"
    r"|dislik|downvot|violat|mislead|broken|bug|low_|halluc|fabric|false|nsfw|jailb|block|refus|issue|problem|trunc|dup"
    r"|abus|bias|unsupp|ungr|irrel|poor|worse"
)
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
    """The label of a row; ``true``/``false``, ``yes``/``no``, 1/0, 1/-1, ``good``/``bad`` and the like are understood.

    Raises:
        BadRow: It is none of these, or two columns contradict each other.
    """
    found = {name: truth for name in LABELS if (truth := _truth(row.get(name))) is not None}
    if len(set(found.values())) > 1:
        raise BadRow(
            "labels_disagree",
            list(found)[1],
            f"{' and '.join(map(repr, found))} say the opposite of each other",
            value={name: row[name] for name in found},
            remedy="leave the one out that is no label (`dataset_columns` names those to read)",
        )
    if found:
        return next(iter(found.values()))
    name = next((name for name in LABELS if row.get(name) is not None), None)
    if name is None:
        name = next((name for name in LABELS if name in row), "label")
    value = need(row, name)
    raise BadRow("not_a_label", name, f"{name!r} is neither true nor false", value=value, remedy="use true or false")


def label_remedy(example: Mapping[str, Any]) -> str:
    """What to do about a missing label: columns that may be one are named, and never one whose truth is a fault."""
    wrong = [name for name in LABELS if name in example]
    if wrong:
        return f"{wrong[0]!r} holds {example.get(wrong[0])!r}: write true or false"
    likely = [name for name, value in example.items() if isinstance(value, bool)]
    likely += [name for name in example if "label" in name.lower() and name not in likely]
    good = [name for name in likely if not _FAULTS.search(name.lower())]
    if good:
        others = f"; {', '.join(map(repr, good[1:]))} may be meant as well" if good[1:] else ""
        return (
            f"`dataset_columns: {{{good[0]}: label}}` reads the column {good[0]!r} as the label, where true has to mean"
            f" that the answer is good{others}"
        )
    if likely:
        return f"{likely[0]!r} is true where something is wrong: write a column `label`, true where the answer is good"
    return "name the column with `dataset_columns: {theirs: label}`, or use `preftune sft`"


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
