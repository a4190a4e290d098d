"""UltraFeedback-binarized: a text prompt, two whole conversations and their scores."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from preftune.data.formats.base import OPENING_USES, PAIR_USES, BadRow, FormatSpec, Row, extras, has
from preftune.data.formats.openings import opened, shared_turns
from preftune.data.formats.turns import is_messages, need_messages


def detect(columns: Collection[str], row: Mapping[str, Any]) -> bool:
    """The prompt is text although the answers are conversations."""
    return (
        has(columns, "prompt", "chosen", "rejected")
        and isinstance(row.get("prompt"), str)
        and is_messages(row.get("chosen"))
    )


def convert(row: Mapping[str, Any]) -> Row:
    """The turns that both conversations share are the prompt; the score gap becomes the margin.

    The ``prompt`` column repeats the first user turn and is used only where the conversations do not hold it.
    """
    chosen, rejected = need_messages(row, "chosen"), need_messages(row, "rejected")
    shared = shared_turns(chosen, rejected)
    prompt = chosen[:shared]
    if all(turn["role"] == "system" for turn in prompt):
        text = row.get("prompt")
        if not isinstance(text, str) or chosen[shared]["role"] != "assistant":
            raise BadRow(
                "no_shared_prompt",
                "rejected",
                "the two conversations do not begin with the same turn",
                remedy="remove the row or set on_bad_rows: skip",
            )
        prompt = [*prompt, {"role": "user", "content": text}]
    return {"prompt": opened(row, prompt), "chosen": chosen[shared:], "rejected": rejected[shared:], **extras(row)}


ULTRAFEEDBACK = FormatSpec(
    name="ultrafeedback",
    kind="preference",
    required=("prompt", "chosen", "rejected"),
    detect=detect,
    convert=convert,
    summary="prompt as text, chosen and rejected as whole conversations, score_chosen, score_rejected",
    uses={"prompt": "repeats the first turn; used where the answers lack it", **PAIR_USES, **OPENING_USES},
)
