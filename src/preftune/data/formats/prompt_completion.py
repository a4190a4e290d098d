"""SFT rows of a prompt and its completion, as text or as messages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from preftune.data.formats.base import OPENING_USES, TEMPLATE_USES, FormatSpec, Row, has, template_extras
from preftune.data.formats.openings import prompted
from preftune.data.formats.turns import need_text_or_messages


def convert(row: Mapping[str, Any]) -> Row:
    """``{prompt, completion}`` as it stands, after ``system`` and ``history`` where there are such columns."""
    fields = ("prompt", "completion")
    values = prompted(row, *(need_text_or_messages(row, name) for name in fields))
    return {**dict(zip(fields, values, strict=True)), **template_extras(row)}


PROMPT_COMPLETION = FormatSpec(
    name="prompt_completion",
    kind="sft",
    required=("prompt", "completion"),
    detect=lambda columns, row: has(columns, "prompt", "completion"),
    convert=convert,
    summary="prompt, completion; each text or messages; optional system, history",
    uses={"prompt": "the prompt", "completion": "the answer", **OPENING_USES, **TEMPLATE_USES},
)
