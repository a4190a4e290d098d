"""Data formats: one specification per file, the table of all of them, and detection."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from types import MappingProxyType
from typing import Any

from preftune.data.formats.alpaca import ALPACA, ALPACA_PREFERENCE
from preftune.data.formats.base import EXTRA_USES, NOT_USED, TEMPLATE_USES, BadRow, FormatSpec, Kind, Message, Row
from preftune.data.formats.hh import HH
from preftune.data.formats.implicit_preference import IMPLICIT_PREFERENCE
from preftune.data.formats.labelled_alpaca import LABELLED_ALPACA
from preftune.data.formats.labelled_messages import LABELLED_MESSAGES
from preftune.data.formats.messages import MESSAGES
from preftune.data.formats.messages_preference import MESSAGES_PREFERENCE
from preftune.data.formats.named_pair import NAMED_PAIR
from preftune.data.formats.openai_preference import OPENAI_PREFERENCE
from preftune.data.formats.orca import ORCA
from preftune.data.formats.pointed import pointed_format
from preftune.data.formats.preference import PREFERENCE
from preftune.data.formats.prompt_completion import PROMPT_COMPLETION
from preftune.data.formats.question_answer import QUESTION_ANSWER
from preftune.data.formats.ranked import RANKED
from preftune.data.formats.rated import RATED
from preftune.data.formats.sharegpt import SHAREGPT, SHAREGPT_PREFERENCE
from preftune.data.formats.text import TEXT
from preftune.data.formats.turns import ROLE_KEYS, decode_columns, decoded
from preftune.data.formats.two_answers import TWO_ANSWERS
from preftune.data.formats.ultrafeedback import ULTRAFEEDBACK
from preftune.data.formats.unpaired import UNPAIRED
from preftune.errors import ConfigError, DataError

__all__ = [
    "FORMATS",
    "NOT_USED",
    "POINTED",
    "BadRow",
    "FormatSpec",
    "Kind",
    "Message",
    "Row",
    "check_format_name",
    "column_uses",
    "decoded_or_same",
    "detect",
    "resolve",
    "texts_of",
]

POINTED = pointed_format(lambda columns, row: detect(columns, row))

# The order is the order of detection: a format comes before any whose columns it contains.
_IN_ORDER = (
    POINTED,
    ULTRAFEEDBACK,
    PREFERENCE,
    OPENAI_PREFERENCE,
    ORCA,
    ALPACA_PREFERENCE,
    SHAREGPT_PREFERENCE,
    MESSAGES_PREFERENCE,
    NAMED_PAIR,
    HH,
    IMPLICIT_PREFERENCE,
    TWO_ANSWERS,
    RANKED,
    UNPAIRED,
    LABELLED_MESSAGES,
    LABELLED_ALPACA,
    RATED,
    PROMPT_COMPLETION,
    SHAREGPT,
    MESSAGES,
    ALPACA,
    QUESTION_ANSWER,
    TEXT,
)

# For supervised fine-tuning TRL's own columns go first: a row may hold a conversation beside a pair, or a text beside
# the fields that it was made of.
_SFT_FIRST = (PROMPT_COMPLETION, MESSAGES, SHAREGPT, TEXT, ALPACA, QUESTION_ANSWER)
_FOR_SFT = (*_SFT_FIRST, *(spec for spec in _IN_ORDER if spec not in _SFT_FIRST))

FORMATS: Mapping[str, FormatSpec] = MappingProxyType({spec.name: spec for spec in _IN_ORDER})


def check_format_name(name: str) -> None:
    """Refuse a format name that is not in the table.

    Raises:
        ConfigError: With the nearest name.
    """
    if name != "auto" and name not in FORMATS:
        near = difflib.get_close_matches(name, FORMATS, n=1)
        raise ConfigError(
            "unknown data format",
            where="dataset_format",
            value=name,
            allowed=", ".join(["auto", *FORMATS]),
            remedy=f"did you mean {near[0]!r}?" if near else None,
        )


def column_uses(spec: FormatSpec, columns: Collection[str], *, for_sft: bool = False) -> dict[str, str]:
    """What is done with every column of a data set.

    Args:
        spec: Format of the rows.
        columns: Names of the columns.
        for_sft: The rows are examples of supervised fine-tuning, where numbers of a pair have no meaning.

    Returns:
        Column -> what is done with it.
    """
    without = {*EXTRA_USES} - {*TEMPLATE_USES} if for_sft else set()
    if for_sft and "rejected" in spec.uses:
        without |= {"rejected"}
    for group in spec.either:
        without |= {*[name for name in group if name in columns][1:]}
    return {name: NOT_USED if name in without else spec.uses.get(name, NOT_USED) for name in columns}


def decoded_or_same(value: Any) -> Any:
    """A conversation that is stored as text as what it was; all else, broken text too, unchanged."""
    with suppress(BadRow):
        return decoded(value, "")
    return value


def texts_of(value: Any) -> Iterator[str]:
    """All text in a value, but for the names of who says it."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if key not in ROLE_KEYS:
                yield from texts_of(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from texts_of(item)


def detect(
    columns: Collection[str],
    first_row: Mapping[str, Any],
    *,
    for_sft: bool = False,
    implicit_prompt: str = "transcript",
) -> FormatSpec | None:
    """The first format of the table that recognises the columns and the first row.

    Args:
        columns: Names of the columns.
        first_row: The first row.
        for_sft: Prefer what supervised fine-tuning reads where the columns hold a pair as well.
        implicit_prompt: ``common_prefix`` leaves transcripts without a prompt column to TRL's rule.

    Returns:
        The format, or ``None``.
    """
    with suppress(BadRow):  # said again, with its place, when the row is read
        first_row = decode_columns(first_row)
    skip = (HH,) if implicit_prompt == "common_prefix" else ()
    order = _FOR_SFT if for_sft else _IN_ORDER
    return next((spec for spec in order if spec not in skip and spec.detect(columns, first_row)), None)


def resolve(
    name: str,
    columns: Collection[str],
    first_row: Mapping[str, Any],
    *,
    where: str,
    for_sft: bool = False,
    implicit_prompt: str = "transcript",
) -> FormatSpec:
    """The format to read a data set with.

    Args:
        name: ``auto`` or a name from :data:`FORMATS`.
        columns: Names of the columns.
        first_row: The first row.
        where: The data set, for messages.
        for_sft: See :func:`detect`.
        implicit_prompt: See :func:`detect`.

    Returns:
        The format.

    Raises:
        ConfigError: ``name`` is unknown.
        DataError: Nothing recognises the columns, or the named format lacks a column.
    """
    check_format_name(name)
    if name != "auto":
        spec = FORMATS[name]
        missing = [column for column in spec.required if column not in columns]
        if missing:
            raise DataError(
                f"the format {name!r} needs the columns {', '.join(spec.required)}; missing: {', '.join(missing)}",
                where=where,
                value=sorted(columns),
                remedy="rename columns with `dataset_columns: {theirs: ours}`, or set dataset_format: auto",
            )
        return spec
    found = detect(columns, first_row, for_sft=for_sft, implicit_prompt=implicit_prompt)
    if found is None or found is IMPLICIT_PREFERENCE:
        lowered = {_plain(name): name for name in columns}
        row = {_plain(key): value for key, value in first_row.items()}
        other = detect(lowered, row, for_sft=for_sft, implicit_prompt=implicit_prompt)
        uses = {} if other is None else other.uses
        renamed = ", ".join(f"{theirs}: {ours}" for ours, theirs in lowered.items() if ours != theirs and ours in uses)
        if found is not None and (not renamed or other is found):
            return found
        raise DataError(
            f"the columns match no known data format: {', '.join(sorted(columns))}"
            if found is None
            else "no column is called as a prompt is, and one is but for its capitals or spaces",
            where=where,
            allowed="prompt, chosen, rejected; messages; prompt, completion; and the formats of docs/compatibility.md",
            remedy=f"set `dataset_columns: {{{renamed}}}`"
            if renamed
            else "rename columns with `dataset_columns: {theirs: ours}`, where theirs may be nested (data.prompt)",
        )
    return found


def _plain(name: str) -> str:
    """A name without capitals, and with underscores for spaces."""
    return re.sub(r"[\s-]+", "_", name.strip().lower())
