"""Columns that nothing reads although they hold a part of the conversation."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from preftune.data.formats import NOT_USED, POINTED, FormatSpec, decoded_or_same, texts_of
from preftune.data.formats.implicit_preference import IMPLICIT_PREFERENCE
from preftune.data.formats.turns import ROLE_KEYS, ROLE_NAMES, is_messages

#: Names of columns that hold a part of a conversation, or of what is asked.
_TELLING = frozenset(
    [
        *("system", "system_prompt", "system_message", "sys_prompt", "history", "prompt", "question", "query"),
        *("instruction", "input", "context", "messages", "conversation", "conversations", "dialogue"),
        *("tools", "functions", "documents", "document", "passage", "passages", "article", "paragraph"),
        *("background", "facts", "choices", "options", "persona", "character", "initial_reason_steps"),
        *("starter_code", "retrieved_docs"),
    ]
)
#: Of supervised examples, what the answer would be without.
_OF_EXAMPLES = frozenset(["thinking", "reasoning", "output", "response", "completion"])
#: Columns that are about the answers or the row, and no part of what is asked.
_ABOUT = re.compile(
    r"feedback|critique|rationale|reason|expla|comment|justif|annot|note|(?:^|_)log|judg|review|eval|principle|meta|url"
    r"|path|source|html|model|respon|answer|complet|output|generat|candidate|chosen|rejected|raw|original|trace|hash"
    r"|_?id$|license|categor|topic|type|label|score|rating|date|time|lang|name|author|tag|split|truth|solution|rubric"
    r"|test|worker|created|user|sha|key|seed|repo|commit|file|expected"
)
#: A place in a prompt that another column fills, and columns that may be asked about.
_PLACE = re.compile(r"\{\{? ?(\w+) ?\}?\}")
_SUBJECT = re.compile(r"review|text|topic|comment|html|sentence|^source$")


def lacks_prompt(spec: FormatSpec, uses: Mapping[str, str]) -> bool:
    """Whether no column is the prompt, so that it can only be the common beginning of the answers."""
    return spec in (IMPLICIT_PREFERENCE, POINTED) and "the prompt" not in uses.values()


def overlooked(spec: FormatSpec, uses: Mapping[str, str], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Columns that nothing reads although they hold a part of the conversation that no other column has.

    Args:
        spec: Format of the rows. Where no column is the prompt, or all prompts are one text, any text may be a part.
        uses: What is done with every column.
        rows: The first rows as they were found.

    Returns:
        Names of such columns.
    """
    used = [name for name, use in uses.items() if use != NOT_USED]
    said = ["\n".join(text for name in used for text in texts_of(row.get(name))) for row in rows]
    without = lacks_prompt(spec, uses) and any(isinstance(row.get("chosen"), str) for row in rows)
    asks_alike = _asks_alike(uses, rows)
    names = _TELLING | _OF_EXAMPLES if spec.kind == "sft" else _TELLING
    found: list[str] = []
    about: list[str] = []
    for name in (name for name, use in uses.items() if use == NOT_USED):
        new = [_new_text(row.get(name), others) for row, others in zip(rows, said, strict=True)]
        held = [text for text in new if text]
        plain = name.lower().strip()
        prose = 2 * sum(map(_is_prose, held)) > len(held)
        # A source or a model that many rows share asks nothing.
        varied = len(held) < 4 or len(set(held)) > len(held) // 2
        telling = plain in names and (prose or _is_tools(plain, rows[0].get(name)))
        talks = any(_is_conversation(row.get(name)) for row in rows)
        asks = (without or (asks_alike and len(held) > 2)) and varied and prose
        # Of a pair, supervised fine-tuning leaves the other answer out on purpose.
        if held and (telling or talks or asks) and "rejected" not in name:
            (found if telling or _ABOUT.search(plain) is None else about).append(name)
    # A review or a source may be what is asked about, where nothing else can be.
    return found or [name for name in about if asks_alike and _SUBJECT.search(name.lower())]


def _asks_alike(uses: Mapping[str, str], rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether all prompts are one text, or have places that something is to be put into."""
    names = [name for name, use in uses.items() if use in ("the prompt", "the user turn") and name != "input"]
    asked = [row[name] for row in rows for name in names if isinstance(row.get(name), str)]
    if len(asked) < 3:
        return False
    places = [{*_PLACE.findall(text)} & uses.keys() for text in asked]
    return len(set(asked)) == 1 or all(places)


def _is_tools(name: str, value: Any) -> bool:
    return name in ("tools", "functions") and bool(decoded_or_same(value))


def _is_conversation(value: Any) -> bool:
    """Whether a value is turns of the user and the model, and not what others said about them."""
    turns = decoded_or_same(value)
    if not is_messages(turns):
        return False
    roles = [str(next((turn[key] for key in ROLE_KEYS if key in turn), "")).lower() for turn in turns]
    return all(role in ROLE_NAMES for role in roles)


def _new_text(value: Any, others: str) -> str:
    """What a value says that the columns in use do not."""
    texts = [text.strip() for text in texts_of(decoded_or_same(value))]
    return "\n".join(text for text in texts if text and text not in others)


def _is_prose(text: str) -> bool:
    """Several words, or letters of a script that is written without spaces."""
    return " " in text.strip() or any(ord(char) > 0x2E80 and char.isalpha() for char in text)


def told_of(overlooked: Sequence[str], columns: Collection[str]) -> list[str]:
    """The finding about columns that hold a part of the conversation and are not used; none where there are none.

    Args:
        overlooked: Their names, from :func:`overlooked`.
        columns: All columns of the data.
    """
    if not overlooked:
        return []
    remedy = "name them with `dataset_columns: {theirs: ours}`"
    if "prompt" in columns and {*overlooked} <= {"input", "context"}:
        # TRL's own columns are read as they stand; those of other formats have text below their question.
        remedy = "`dataset_columns: {prompt: question}` puts their text below the prompt"
    names = ", ".join(map(repr, overlooked))
    return [f"not used, although they hold a part of the conversation: {names}; {remedy}, or remove them"]
