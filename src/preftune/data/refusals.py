"""Files that are not read on: what the first rows show leaves two readings, or no answer to learn."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from preftune.data.formats import NOT_USED, POINTED, FormatSpec, pointed, two_answers
from preftune.data.formats.base import Row, number_of
from preftune.data.formats.turns import ROLE_NAMES
from preftune.data.formats.two_answers import TWO_ANSWERS
from preftune.data.unused_columns import lacks_prompt, overlooked
from preftune.errors import DataError

#: So many characters at the beginning of two answers are alike by chance.
_SHARED_BY_CHANCE = 12
#: Pictures and sounds written out as text, names of such files, and of columns that hold them.
_WRITTEN_OUT = ("data:image/", "data:audio/", "data:video/")
_MEDIUM = re.compile(r".*\.(?:png|jpe?g|gif|webp|bmp|tiff?|heic|mp3|mp4|m4a|webm|wav|flac)(?:\?\S*)?$", re.IGNORECASE)
_MEDIUM_NAME = re.compile(
    r"^(?!author|channel|user|profile).*(?:image|img|picture|photo|audio|sound|speech|video|clip|screenshot|scan)"
)
#: A rating as a share of something.
_OF_PARTS = re.compile(r"-?[\d.,]+\s*(?:/\s*\d+|%)")
#: Names of columns that hold an answer, and values that say how good one is.
_ANSWER = re.compile(r"(?:model_|assistant_)?(?:response|answer|completion|output|generation)(?:_(?:text|long|\w))?")
_VERDICT = re.compile(r"true|false|[01](?:\.\d+)?")


def refuse(
    spec: FormatSpec,
    uses: Mapping[str, str],
    rows: Sequence[Mapping[str, Any]],
    read: Sequence[Row],
    where: str,
    every: Callable[[], Iterable[Any]],
) -> None:
    """Refuse a data set that cannot be read in one sense.

    Args:
        spec: Format of the rows.
        uses: What is done with every column.
        rows: The first rows as they were found.
        read: Those of them that can be read, as canonical rows.
        where: The data set, for messages.
        every: All rows, for what a sorted file would not show in its first ones.

    Raises:
        DataError: Reading on would train on something else than answers, or on the wrong ones.
    """
    _refuse_votes_from_zero(spec, rows, where, every)
    _refuse_notations(uses, rows, where)
    _refuse_names(spec, rows, where)
    _refuse_media(spec, uses, rows, where)
    _refuse_values(uses, rows, where)
    _refuse_trees(spec, uses, rows, where)
    _refuse_no_prompt(spec, uses, rows, read, where)


def _refuse_votes_from_zero(
    spec: FormatSpec, rows: Sequence[Mapping[str, Any]], where: str, every: Callable[[], Iterable[Any]]
) -> None:
    """0 is a draw in AlpacaEval's files, whose votes are 1 and 2; in files of 0 and 1 it is an answer."""
    pair = two_answers.answers_of(rows[0]) if rows and spec is TWO_ANSWERS else None
    if pair is None or (pair[0][-1], pair[1][-1]) != ("1", "2"):
        return
    # A winner under a name that is looked for first decides, whatever this column holds.
    first = ("winner", "preferred")

    def votes(some: Iterable[Any]) -> set[str]:
        some = (row for row in some if isinstance(row, Mapping) and all(row.get(name) in (None, "") for name in first))
        return {str(row["preference"]).strip().removesuffix(".0") for row in some if row.get("preference") is not None}

    said = votes(rows)
    if "0" in said and said <= {"0", "1"}:
        said |= votes(every())
    if said == {"0", "1"}:
        raise DataError(
            "'preference' counts the answers from 0, and their names from 1",
            where=f"{where}, field 'preference'",
            value=sorted(said),
            remedy=f"set `dataset_columns: {{{pair[0]}: response_0, {pair[1]}: response_1}}`; if 0 is a draw, leave"
            " these rows out",
        )


def _refuse_notations(uses: Mapping[str, str], rows: Sequence[Mapping[str, Any]], where: str) -> None:
    """Ratings such as 4/5 beside ratings such as 3 are on two scales."""
    names = [name for name, use in uses.items() if use.startswith("which answer")]
    texts = [str(row[name]) for row in rows for name in names if isinstance(row.get(name), str | int | float)]
    of_parts = [text for text in texts if _OF_PARTS.fullmatch(text.strip())]
    plain = [text for text in texts if number_of(text) is not None]
    if of_parts and plain:
        raise DataError(
            "ratings are written in two ways, and may be on two scales",
            where=where,
            value=[of_parts[0], plain[0]],
            remedy="write all of them as numbers on one scale",
        )


def _refuse_names(spec: FormatSpec, rows: Sequence[Mapping[str, Any]], where: str) -> None:
    """Names of models are few; words that differ from row to row are answers, with something about them beside them."""
    named = pointed.text_columns(rows[0]) if rows and spec is POINTED else None
    if named is None:
        return
    (better, worse), texts = named
    values = [str(row[name]) for row in rows for name in (better, worse) if row.get(name) is not None]
    if len(rows) > 3 and 2 * len(set(values)) > len(values) and any(number_of(value) is None for value in values):
        raise DataError(
            f"{better!r} and {texts[0]!r} may both be the answers",
            where=where,
            value=values[:2],
            remedy=f"leave the others out: `dataset_columns: [prompt, {better}, {worse}]` or"
            f" `dataset_columns: [prompt, {texts[0]}, {texts[1]}]`, with the name of your prompt's column",
        )


def _refuse_media(spec: FormatSpec, uses: Mapping[str, str], rows: Sequence[Mapping[str, Any]], where: str) -> None:
    """Pictures and sounds that the rows are about: files, addresses, bytes, under names that say so."""
    if spec.name == "text":
        return
    for name in (name for name, use in uses.items() if use == NOT_USED):
        held = [row[name] for row in rows if _is_medium(row.get(name), name)]
        # One picture for all rows is nobody's question.
        if 2 * len(held) > len(rows) and (len(held) < 3 or len({str(each) for each in held}) > 1):
            raise DataError(
                f"the column {name!r} holds pictures or sounds, which are not read, and the text may be about them",
                where=where,
                value=held[0] if isinstance(held[0], str | list) else sorted(held[0]),
                remedy="remove the column (or select others with `dataset_columns`) to train on the text alone",
            )


def _is_medium(value: Any, name: str) -> bool:
    if isinstance(value, list):
        return bool(value) and all(_is_medium(each, name) for each in value)
    if isinstance(value, Mapping):
        return {"bytes", "path"} <= value.keys() and any(value[key] is not None for key in ("bytes", "path"))
    text = value.strip() if isinstance(value, str) else ""
    return text.startswith(_WRITTEN_OUT) or bool(_MEDIUM_NAME.search(name.lower()) and _MEDIUM.match(text))


def _refuse_values(uses: Mapping[str, str], rows: Sequence[Mapping[str, Any]], where: str) -> None:
    """Refuse truth values and scores in ``chosen`` and ``rejected`` where a column of answers is not used."""
    beside = [
        name for name, use in uses.items() if use == NOT_USED and _ANSWER.fullmatch(name) and _is_text(rows, name)
    ]
    if not beside or not {"chosen", "rejected"} <= uses.keys():
        return
    values = [str(row[name]).strip().lower() for row in rows for name in ("chosen", "rejected")
              if row.get(name) not in (None, "")]  # fmt: skip
    if values and all(_VERDICT.fullmatch(value) for value in values):
        raise DataError(
            f"'chosen' and 'rejected' hold numbers or truth values, and {beside[0]!r} beside them is not used",
            where=where,
            value=values[:4],
            remedy="give an answer and its label as columns `completion` and `label`, without chosen and rejected; if"
            " these are the answers, leave the other column out (`dataset_columns: [prompt, chosen, rejected]`)",
        )


def _is_text(rows: Sequence[Mapping[str, Any]], name: str) -> bool:
    return any(isinstance(row.get(name), str) and " " in row[name].strip() for row in rows)


def _refuse_no_prompt(
    spec: FormatSpec,
    uses: Mapping[str, str],
    rows: Sequence[Mapping[str, Any]],
    read: Sequence[Row],
    where: str,
) -> None:
    """Answers that share no beginning have their prompt in another column, if there is one of text."""
    prompts = [row["prompt"] for row in read if isinstance(row.get("prompt"), str)]
    if not lacks_prompt(spec, uses) or not prompts or statistics.median(map(len, prompts)) > _SHARED_BY_CHANCE:
        return
    names = overlooked(spec, uses, rows)
    if names:
        raise DataError(
            "no column is called as a prompt is, and prompts would be empty, or a word that the answers share; the"
            f" columns are {', '.join(uses)}",
            where=where,
            remedy=f"set `dataset_columns: {{{names[0]}: prompt}}` if that is the prompt; otherwise keep the columns of"
            " the answers alone (`dataset_columns: [chosen, rejected]`)",
        )


def _refuse_trees(spec: FormatSpec, uses: Mapping[str, str], rows: Sequence[Mapping[str, Any]], where: str) -> None:
    """Refuse rows that are single messages, of which text alone would be learned one by one."""
    roles = {str(row.get("role")).lower() for row in rows}
    if spec.name == "text" and {"parent_id", "role"} <= uses.keys() and roles <= ROLE_NAMES.keys():
        raise DataError(
            "the rows are single messages of conversations (parent_id, role), and each would be learned on its own",
            where=where,
            remedy="put the messages of a conversation together, as a list `messages` of role and content",
        )
