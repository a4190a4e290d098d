"""TRL's preference format without a prompt column: both answers begin with the prompt."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from preftune.data.formats.base import EXTRA_USES, OPENING_USES, BadRow, FormatSpec, Row, common_prefix, extras, has
from preftune.data.formats.openings import opened, prompted, shared_turns
from preftune.data.formats.turns import need_text_or_messages

#: Names of two whole conversations, in the order in which they are looked for.
ANSWERS = (
    ("chosen", "rejected"),
    ("chosen_conversations", "rejected_conversations"),
    ("chosen_messages", "rejected_messages"),
)


def _names(columns: Collection[str]) -> tuple[str, str] | None:
    return next((pair for pair in ANSWERS if has(columns, *pair)), None)


def split_index(chosen: Any, rejected: Any) -> int:
    """Where TRL 1.16 ends the prompt of two answers (``trl.data_utils.extract_prompt``).

    The prompt is the longest common prefix, without a space that it ends with. Where one answer is a prefix of the
    other, its last element stays in the completion. The result can be -1 when nothing is shared and ``chosen`` ends
    with a space: TRL looks at the element before the first, which Python takes to be the last.
    """
    shorter = min(len(chosen), len(rejected))
    index = common_prefix(chosen, rejected)
    if index == shorter:
        return shorter - 1
    return index - 1 if chosen[index - 1] == " " else index


def convert(row: Mapping[str, Any]) -> Row:
    """Split the shared beginning off both answers, exactly where TRL does."""
    names = _names(row) or ANSWERS[0]
    chosen, rejected = (need_text_or_messages(row, field) for field in names)
    for field, value in zip(names, (chosen, rejected), strict=True):
        if len(value) == 0:
            raise BadRow(
                "empty_completion", field, f"{field!r} is empty", remedy="remove the row or set on_bad_rows: skip"
            )
    if isinstance(chosen, str) is not isinstance(rejected, str):
        raise BadRow(
            "mixed_types", names[1], "one answer is text and the other messages", remedy="use one form for both"
        )
    if not isinstance(chosen, str) and not isinstance(rejected, str):
        # Two turns are one if they say the same, whatever else is noted about them.
        index = shared_turns(chosen, rejected)
        return {"prompt": opened(row, chosen[:index]), "chosen": chosen[index:], "rejected": rejected[index:]} | extras(
            row
        )
    index = split_index(chosen, rejected)
    prompt, *answers = prompted(row, chosen[:index], chosen[index:], rejected[index:])
    return {"prompt": prompt, "chosen": answers[0], "rejected": answers[1], **extras(row)}


IMPLICIT_PREFERENCE = FormatSpec(
    name="implicit_preference",
    kind="preference",
    required=(),
    detect=lambda columns, row: _names(columns) is not None,
    convert=convert,
    summary=f"{' or '.join(', '.join(pair) for pair in ANSWERS)}; the prompt is their common beginning",
    uses={
        **dict.fromkeys((pair[0] for pair in ANSWERS), "the prompt, and the preferred answer"),
        **dict.fromkeys((pair[1] for pair in ANSWERS), "the prompt, and the other answer"),
        **EXTRA_USES,
        **OPENING_USES,
    },
    either=(tuple(pair[0] for pair in ANSWERS), tuple(pair[1] for pair in ANSWERS)),
)
