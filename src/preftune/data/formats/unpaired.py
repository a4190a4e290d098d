"""Unpaired answers with a yes or no label: prompt, completion, label."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from preftune.data.formats.base import BadRow, FormatSpec, Row, extras, has, need, need_text_or_messages

_LABELS = {"true": True, "1": True, "1.0": True, "yes": True, "false": False, "0": False, "0.0": False, "no": False}


def convert(row: Mapping[str, Any]) -> Row:
    """The row with its label as a bool; ``true``/``false``, ``yes``/``no`` and 1/0 are understood."""
    value = need(row, "label")
    label = _LABELS.get(str(value).strip().lower())
    if label is None:
        raise BadRow(
            "not_a_label", "label", "'label' is neither true nor false", value=value, remedy="use true or false"
        )
    fields = {name: need_text_or_messages(row, name) for name in ("prompt", "completion")}
    return {**fields, "label": label, **extras(row)}


UNPAIRED = FormatSpec(
    name="unpaired",
    kind="unpaired",
    required=("prompt", "completion", "label"),
    detect=lambda columns, row: has(columns, "prompt", "completion", "label"),
    convert=convert,
    summary="prompt, completion, label; paired where a prompt has both labels",
)
