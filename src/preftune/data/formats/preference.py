"""TRL's preference format with an explicit prompt, as text or as messages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from preftune.data.formats.base import OPENING_USES, PAIR_USES, FormatSpec, Row, extras, has
from preftune.data.formats.openings import prompted
from preftune.data.formats.turns import need_text_or_messages


def convert(row: Mapping[str, Any]) -> Row:
    """``{prompt, chosen, rejected}`` as it stands, after ``system`` and ``history`` where there are such columns."""
    fields = ("prompt", "chosen", "rejected")
    values = prompted(row, *(need_text_or_messages(row, field) for field in fields))
    return {**dict(zip(fields, values, strict=True)), **extras(row)}


PREFERENCE = FormatSpec(
    name="preference",
    kind="preference",
    required=("prompt", "chosen", "rejected"),
    detect=lambda columns, row: has(columns, "prompt", "chosen", "rejected"),
    convert=convert,
    summary="prompt, chosen, rejected; each text or messages; optional system, history",
    uses={"prompt": "the prompt", **PAIR_USES, **OPENING_USES},
)
