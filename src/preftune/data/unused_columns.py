"""Columns that nothing reads although they hold a part of the conversation."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from preftune.data.formats import NOT_USED, FormatSpec, decoded_or_same, texts_of
from preftune.data.formats.implicit_preference import IMPLICIT_PREFERENCE
from preftune.data.formats.turns import is_messages

#: Names of columns that hold a part of a conversation, or of what is asked.
_TELLING = frozenset(
    [
        *(
            "system",
            "system_prompt",
            "system_message",
            "history",
            "prompt",
            "question",
            "query",
            "instruction",
            "input",
        ),
        *("context", "messages", "conversation", "conversations", "dialogue", "tools", "functions", "documents"),
        *("document", "passage", "passages", "article", "paragraph", "story", "background", "facts", "schema", "code"),
        *("choices", "options", "persona", "character", "profile", "thinking", "reasoning", "output", "response"),
    ]
)
#: A prompt or a step under another name, and a further answer beside those that are compared.
_TELLING_TOO = re.compile(
    r".*_prompt|prompt_.*|sys_.*|.*_steps|(?:response|answer|completion|output|candidate)_?(?:\d|[a-z])|.*_question"
)
#: Columns of long text that are about the answers, and no part of what is asked.
_ABOUT = re.compile(
    r"feedback|critique|rationale|reason|expla|comment|justif|annot|note|judg|review|evaluat|principle|meta|url|path"
    r"|source|html|model|respon|answer|complet|output|generat|candidate|chosen|rejected|raw|log|trace|hash|id$|license"
)
#: Text of this length, other in every row, was written for the row.
_LONG = 120


def overlooked(spec: FormatSpec, uses: Mapping[str, str], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Columns that nothing reads although they hold a part of the conversation that no other column has.

    Args:
        spec: Format of the rows. Where no column is the prompt, any text may be.
        uses: What is done with every column.
        rows: The first rows as they were found.

    Returns:
        Names of such columns.
    """
    used = [name for name, use in uses.items() if use != NOT_USED]
    said = ["\n".join(text for name in used for text in texts_of(row.get(name))) for row in rows]
    without = spec is IMPLICIT_PREFERENCE and any(isinstance(row.get("chosen"), str) for row in rows)
    found = []
    for name, use in uses.items():
        # Of a pair, supervised fine-tuning leaves the other answer out on purpose.
        if use != NOT_USED or "rejected" in name:
            continue
        new = [_new_text(row.get(name), others) for row, others in zip(rows, said, strict=True)]
        held = [text for text in new if text]
        plain = name.lower().strip()
        telling = plain in _TELLING or _TELLING_TOO.fullmatch(plain) is not None
        telling = telling or any(is_messages(decoded_or_same(row.get(name))) for row in rows)
        # A source or a model that many rows share asks nothing.
        varied = len(held) < 4 or len(set(held)) > len(held) // 2
        telling = telling or (without and varied and any(map(_is_prose, held)))
        if held and (telling or _is_written(plain, held, len(rows))):
            found.append(name)
    return found


def _new_text(value: Any, others: str) -> str:
    """What a value says that the columns in use do not."""
    texts = [text.strip() for text in texts_of(decoded_or_same(value))]
    return "\n".join(text for text in texts if text and text not in others)


def _is_prose(text: str) -> bool:
    """Several words, or letters of a script that is written without spaces."""
    return " " in text.strip() or any(ord(char) > 0x2E80 and char.isalpha() for char in text)


def _is_written(name: str, texts: Sequence[str], num_rows: int) -> bool:
    """Whether a column holds long texts that differ from row to row, and not notes about the answers."""
    long = [text for text in texts if len(text) >= _LONG and " " in text]
    return 2 * len(long) > num_rows and len(set(long)) > len(long) // 2 and _ABOUT.search(name) is None
