"""TRL's preference format with an explicit prompt, as text or as messages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from preftune.data.formats.base import FormatSpec, Row, extras, has, need_text_or_messages


def convert(row: Mapping[str, Any]) -> Row:
    """``{prompt, chosen, rejected}`` as it stands; ``from``/``value`` messages are translated."""
    pair = {field: need_text_or_messages(row, field) for field in ("prompt", "chosen", "rejected")}
    return {**pair, **extras(row)}


PREFERENCE = FormatSpec(
    name="preference",
    kind="preference",
    required=("prompt", "chosen", "rejected"),
    detect=lambda columns, row: has(columns, "prompt", "chosen", "rejected"),
    convert=convert,
    summary="prompt, chosen, rejected; each text or messages",
)
