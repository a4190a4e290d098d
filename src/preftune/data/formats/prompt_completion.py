"""SFT rows of a prompt and its completion, as text or as messages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from preftune.data.formats.base import FormatSpec, Row, has, need_text_or_messages, template_extras


def convert(row: Mapping[str, Any]) -> Row:
    """``{prompt, completion}`` as it stands."""
    fields = {name: need_text_or_messages(row, name) for name in ("prompt", "completion")}
    return {**fields, **template_extras(row)}


PROMPT_COMPLETION = FormatSpec(
    name="prompt_completion",
    kind="sft",
    required=("prompt", "completion"),
    detect=lambda columns, row: has(columns, "prompt", "completion"),
    convert=convert,
    summary="prompt, completion; each text or messages",
)
