"""OpenAI's preference files: input with messages, preferred_output, non_preferred_output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from preftune.data.formats.base import EXTRA_USES, FormatSpec, Row, extras, has, need
from preftune.data.formats.openings import answer, prompted
from preftune.data.formats.turns import need_messages, need_text_or_messages, parsed


def convert(row: Mapping[str, Any]) -> Row:
    """The messages of ``input`` are the prompt, its tools go to the template."""
    given = need(row, "input")
    given = parsed(given) if isinstance(given, str) else given
    inner = given if isinstance(given, Mapping) else {"messages": given}
    rest = {"tools": inner["tools"], **row} if inner.get("tools") else dict(row)
    chosen, rejected = (
        answer(need_text_or_messages(row, name)) for name in ("preferred_output", "non_preferred_output")
    )
    prompt, chosen, rejected = prompted({}, need_messages(inner, "messages"), chosen, rejected)
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **extras(rest)}


OPENAI_PREFERENCE = FormatSpec(
    name="openai_preference",
    kind="preference",
    required=("input", "preferred_output", "non_preferred_output"),
    # A question of text is one of a named pair.
    detect=lambda columns, row: (
        has(columns, "input", "preferred_output", "non_preferred_output")
        and not (isinstance(row.get("input"), str) and isinstance(parsed(row["input"]), str))
    ),
    convert=convert,
    summary="input (messages, tools), preferred_output, non_preferred_output",
    uses={
        "input": "the prompt and the tools",
        "preferred_output": "the preferred answer",
        "non_preferred_output": "the other answer",
        **EXTRA_USES,
    },
)
