"""A conversation that ends with the answer to be judged, and a yes or no label (LLaMA-Factory, ms-swift)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from preftune.data.formats.base import EXTRA_USES, OPENING_USES, FormatSpec, Row, extras
from preftune.data.formats.openings import last_answer, opened
from preftune.data.formats.sharegpt import CONVERSATIONS, conversation_column
from preftune.data.formats.turns import need_messages
from preftune.data.formats.unpaired import LABEL_USES, LABELS, label_column, label_of


def _field(columns: Collection[str], row: Mapping[str, Any]) -> str | None:
    return "messages" if "messages" in columns else conversation_column(columns, row)


def detect(columns: Collection[str], row: Mapping[str, Any]) -> bool:
    """A conversation beside a label that is true or false."""
    return _field(columns, row) is not None and label_column(columns, row) is not None


def convert(row: Mapping[str, Any]) -> Row:
    """The last assistant turn is the completion, everything before it the prompt."""
    field = _field(row, row) or CONVERSATIONS[0]
    prompt, completion = last_answer(opened(row, need_messages(row, field)), field)
    return {"prompt": prompt, "completion": completion, "label": label_of(row), **extras(row)}


LABELLED_MESSAGES = FormatSpec(
    name="labelled_messages",
    kind="unpaired",
    required=(),
    detect=detect,
    convert=convert,
    summary="messages or conversations, and label or kto_tag; the last assistant turn is judged",
    uses={
        **dict.fromkeys(("messages", *CONVERSATIONS), "the prompt, and the answer at its end"),
        **LABEL_USES,
        **OPENING_USES,
        **EXTRA_USES,
    },
    either=(("messages", *CONVERSATIONS), LABELS),
)
