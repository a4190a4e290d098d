"""Transcripts in the style of HH-RLHF: ``Human:`` and ``Assistant:`` turns after empty lines, no prompt column."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from preftune.data.formats.base import PAIR_USES, BadRow, FormatSpec, Row, common_prefix, extras, has, need_text

HUMAN = "\n\nHuman:"
ASSISTANT = "\n\nAssistant:"


def detect(columns: Collection[str], row: Mapping[str, Any]) -> bool:
    """Both answers are transcripts, and no column holds the prompt."""
    answers = (row.get("chosen"), row.get("rejected"))
    return (
        has(columns, "chosen", "rejected")
        and "prompt" not in columns
        and all(isinstance(text, str) and HUMAN in text and ASSISTANT in text for text in answers)
    )


def convert(row: Mapping[str, Any]) -> Row:
    """Split after the last ``Assistant:`` that both transcripts share.

    A common prefix of characters would put the first words that two answers happen to share into the prompt, and
    would cut through words.
    """
    chosen, rejected = need_text(row, "chosen"), need_text(row, "rejected")
    position = chosen.rfind(ASSISTANT, 0, common_prefix(chosen, rejected))
    if position < 0:
        raise BadRow(
            "no_shared_prompt",
            "rejected",
            "the two transcripts share no assistant turn to answer in",
            remedy="remove the row or set on_bad_rows: skip",
        )
    end = position + len(ASSISTANT)
    return {"prompt": chosen[:end], "chosen": chosen[end:], "rejected": rejected[end:], **extras(row)}


HH = FormatSpec(
    name="hh",
    kind="preference",
    required=("chosen", "rejected"),
    detect=detect,
    convert=convert,
    summary="chosen, rejected; whole transcripts with Human: and Assistant: turns",
    uses=PAIR_USES,
)
