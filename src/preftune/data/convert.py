"""Raw rows of any format to checked canonical rows, and canonical rows to a data set."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from preftune.data.formats.base import BadRow, FormatSpec, Row
from preftune.data.formats.openings import answer, asked
from preftune.data.formats.turns import decode_columns
from preftune.data.marks import MARKS
from preftune.data.options import DataOptions
from preftune.data.pairing import expand_ranked, pair_unpaired, rank_rated
from preftune.data.rows import BadRowHandler, check_pair, check_sft
from preftune.data.transcripts import as_conversation
from preftune.errors import ConfigError, DataError

if TYPE_CHECKING:
    from datasets import Dataset

#: Fields of a canonical row that are text or messages.
_SIDES = ("prompt", "chosen", "rejected", "completion")


def canonical_rows(
    numbered: Iterable[tuple[str, Any]], spec: FormatSpec, handler: BadRowHandler, pairing: str = "best_worst"
) -> tuple[list[Row], list[str]]:
    """Convert and check rows.

    Args:
        numbered: ``(place, row)``; a row that could not even be read is a :class:`BadRow`.
        spec: Format of the rows.
        handler: Decides about bad rows.
        pairing: What to do with ranked and unpaired rows.

    Returns:
        Canonical rows and notes for the user.

    Raises:
        DataError: A bad row that the policy does not allow.
        ConfigError: Ranked rows cannot be left unpaired.
    """
    if spec.kind in ("ranked", "rated") and pairing == "none":
        raise ConfigError(
            f"the answers are rated ({spec.name}), and nothing says which of them are desirable",
            where="pairing",
            value=pairing,
            remedy="set pairing: best_worst or all to make pairs of them, or add a column `label` of true and false",
        )
    rows: list[Row] = []
    for place, raw in numbered:
        rows += convert_row(raw, place, spec, handler, pairing)
    if spec.kind == "rated":
        return _rated_pairs(rows, handler, pairing)
    if spec.kind != "unpaired" or pairing == "none":
        return rows, []
    pairs, num_left = pair_unpaired(rows, pairing)
    kept = [pair for pair in pairs if _keep_pair(pair, "pairs made from labelled answers", handler)]
    notes = [f"{num_left} of {len(rows)} labelled answers have no counterpart with the other label"] if num_left else []
    return kept, notes


def _rated_pairs(rows: list[Row], handler: BadRowHandler, pairing: str) -> tuple[list[Row], list[str]]:
    rows = _averaged(rows)
    ranked, num_alone = rank_rated(rows)
    pairs: list[Row] = []
    for one in ranked:
        place = "answers to one prompt"
        try:
            found = expand_ranked(one, pairing)
        except BadRow as bad:
            handler.keep(bad, place, one, converted=False)
            continue
        pairs += [pair for pair in found if _keep_pair(pair, place, handler)]
    notes = [f"{len(rows)} rated answers to {len(ranked) + num_alone} prompts make {len(pairs)} pairs"]
    if num_alone:
        notes.append(f"{num_alone} rated answers have no other answer to the same prompt to be compared with")
    return pairs, notes


def _averaged(rows: list[Row]) -> list[Row]:
    """Ratings of one answer by several people as one, their mean: two copies of an answer make no pair."""
    several: dict[str, list[Row]] = {}
    for row in rows:
        several.setdefault(repr((row["prompt"], row["completion"])), []).append(row)
    return [{**same[0], "score": sum(one["score"] for one in same) / len(same)} for same in several.values()]


def convert_row(
    raw: Any,
    place: str,
    spec: FormatSpec,
    handler: BadRowHandler,
    pairing: str = "best_worst",
    then: Callable[[Row], Row] | None = None,
) -> list[Row]:
    """Canonical rows of one raw row: none if it is bad and skipped, several if it ranks many responses.

    Args:
        raw: The row as it was read.
        place: Where it is, for messages.
        spec: Its format.
        handler: Decides about bad rows.
        pairing: What to do with ranked rows.
        then: Changes canonical rows before they are checked.

    Returns:
        The rows.

    Raises:
        DataError: A bad row that the policy does not allow.
    """
    try:
        if isinstance(raw, BadRow):
            raise raw
        if not isinstance(raw, Mapping):
            raise BadRow("not_a_mapping", "row", "the row is not an object", value=raw, remedy="write {field: value}")
        row = spec.convert(decode_columns(raw, spec.uses))
        expanded = expand_ranked(row, pairing) if spec.kind == "ranked" else [row]
        expanded = [then(one) for one in expanded] if then else expanded
    except BadRow as bad:
        handler.keep(bad, place, raw, converted=False)
        return []
    check = check_sft if spec.kind in ("sft", "unpaired", "rated") else check_pair
    kept = []
    for row in expanded:
        try:
            check(row)
        except BadRow as bad:
            if not handler.keep(bad, place, raw):
                continue
        kept.append(row)
    return kept


def _keep_pair(pair: Row, place: str, handler: BadRowHandler) -> bool:
    try:
        check_pair(pair)
    except BadRow as bad:
        return handler.keep(bad, place, pair)
    return True


def in_one_form(rows: list[Row]) -> tuple[list[Row], int]:
    """Rows of text as conversations, where others of the same data are conversations.

    Args:
        rows: Canonical rows.

    Returns:
        The rows, and how many were text. A transcript becomes its turns, any other text a question and its answer.
    """
    texts = [is_text(row) for row in rows]
    if not any(texts) or not any(map(is_conversation, rows)):
        return rows, 0
    return [as_messages(row) for row in rows], sum(texts)


def is_text(row: Row) -> bool:
    """Whether a canonical row is text, not a conversation."""
    return any(isinstance(row.get(name), str) for name in _SIDES)


def is_conversation(row: Row) -> bool:
    """Whether a canonical row, or a part of it, is a list of messages."""
    return any(isinstance(row.get(name), list) for name in (*_SIDES, "messages"))


def as_messages(row: Row) -> Row:
    """A canonical row as a conversation: a transcript becomes its turns, other text a question and its answer."""
    if not is_text(row):
        return row
    found = as_conversation(row)
    if found is not None:
        return found
    # The space that parts an answer of text from its prompt is the template's business now.
    sides = {name: row[name].strip() if isinstance(row[name], str) else row[name] for name in _SIDES if name in row}
    return row | {name: asked(side) if name == "prompt" else answer(side) for name, side in sides.items()}


def presented(row: Row, options: DataOptions) -> tuple[Row, str]:
    """A canonical row as it is given to a model with a chat template.

    Args:
        row: The row.
        options: What becomes of transcripts and of other text.

    Returns:
        The row, and what its text was: ``transcript``, ``plain``, or nothing where it is a conversation, has no
        prompt, or holds marks of a chat template already.
    """
    found = as_conversation(row)
    if found is not None:
        return (found if options.transcripts == "messages" else row), "transcript"
    prompt = row.get("prompt")
    if not isinstance(prompt, str) or not prompt.strip() or any(mark in prompt for mark in MARKS):
        return row, ""
    return (as_messages(row) if options.plain_text == "messages" else row), "plain"


def to_dataset(rows: list[Row], where: str, lost: Sequence[str] = ()) -> Dataset:
    """A data set of canonical rows.

    Args:
        rows: Canonical rows; optional fields may be absent from some of them.
        where: Name for messages.
        lost: What became of the others, for the message where no row is left.

    Returns:
        The data set. Messages whose fields differ from row to row are stored as JSON, so that Arrow does not fill the
        fields of one into another.

    Raises:
        DataError: No rows, or rows of text and of messages in one column.
    """
    from datasets import Dataset, Features, Json, List, concatenate_datasets

    if not rows:
        why = f" ({'; '.join(lost)})" if lost else ""
        remedy = "correct the rows, or check columns and format" if lost else "check the file and the split"
        raise DataError(f"no usable rows{why}", where=where, remedy=remedy)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    for column in columns:
        if len({isinstance(row[column], str) for row in rows if row.get(column) is not None}) > 1:
            raise DataError(
                f"{column!r} is text in some rows and messages in others",
                where=where,
                remedy="convert them to one form, or train on them separately",
            )
    exact = [column for column in columns if any(_has_calls(row.get(column)) for row in rows)]
    plain = {column: [row.get(column) for row in rows] for column in columns if column not in exact}
    # What tools were called with may differ from row to row, and a null in it is one that somebody wrote.
    calls = {column: [row.get(column) for row in rows] for column in exact}
    if not calls:
        return Dataset.from_dict(plain, on_mixed_types="use_json")
    kept = Dataset.from_dict(calls, features=Features({column: List(Json()) for column in exact}))
    if not plain:
        return kept
    return concatenate_datasets([Dataset.from_dict(plain, on_mixed_types="use_json"), kept], axis=1)


def _has_calls(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(turn, Mapping) and turn.get("tool_calls") for turn in value)
