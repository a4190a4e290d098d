"""What the first rows of a data set show that a user should know before trusting a run.

A file may be readable and still be misread: the prompt may be in a column of an unknown name, two columns may disagree
about which answer is better, or a chat template may have been applied already. A single row does not show this. So the
first hundred rows are checked, both as they were found and as they were converted.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from preftune.data.formats import FormatSpec, decoded_or_same, texts_of
from preftune.data.formats.base import BadRow, Row, number_of
from preftune.data.formats.implicit_preference import IMPLICIT_PREFERENCE
from preftune.data.formats.ranked import RANKED, RANKS
from preftune.data.formats.ranked import SCORES as SCORE_LISTS
from preftune.data.formats.rated import RATED, SCORES
from preftune.data.formats.turns import decode_columns
from preftune.data.formats.two_answers import STRENGTHS, TWO_ANSWERS, WINNERS
from preftune.data.formats.ultrafeedback import ULTRAFEEDBACK
from preftune.data.marks import MARKS
from preftune.data.refusals import refuse
from preftune.data.transcripts import turns_of
from preftune.errors import PreftuneError

#: Placeholders for media in a text.
_PLACEHOLDERS = ("<image>", "<|image|>", "<|vision_start|>", "<image_placeholder>", "<video>", "<audio>")
#: The last mark before an answer in texts that hold prompt and answer.
_ANSWERING = re.compile(
    r"(?:\bassistant:|\bai:|\ba:|### ?response:|<\|im_start\|>assistant\n|<\|assistant\|>|\[/INST\])", re.IGNORECASE
)


def look(
    spec: FormatSpec,
    uses: Mapping[str, str],
    rows: Sequence[Mapping[str, Any]],
    where: str,
    every: Callable[[], Iterable[Any]],
) -> list[str]:
    """Findings about the first rows of a data set.

    Args:
        spec: Format of the rows.
        uses: What is done with every column.
        rows: The first rows as they were found.
        where: The data set, for messages.
        every: All rows, for what a sorted file would not show in its first ones.

    Returns:
        One finding a line.

    Raises:
        DataError: Reading on would train on something else than answers, or on the wrong ones.
    """
    read = list(_read(spec, rows))
    refuse(spec, uses, rows, [row for _, row in read], where, every)
    return [*_of_verdicts(spec, uses, rows), *_of_prompts(spec, rows, read), *_of_texts(read)]


def _read(spec: FormatSpec, rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[Mapping[str, Any], Row]]:
    """Each row with its canonical form. Rows that cannot be converted are skipped: reading the data reports them."""
    for row in rows:
        try:
            yield row, spec.convert(decode_columns(row, spec.uses))
        except (BadRow, PreftuneError):
            continue


def _of_verdicts(spec: FormatSpec, uses: Mapping[str, str], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Which answer is better may be said in two ways, and not in the same sense."""
    found = []
    if spec is TWO_ANSWERS and not any(row.get(name) is not None for row in rows for name in WINNERS):
        for name in STRENGTHS:
            values = [value for row in rows if (value := number_of(row.get(name))) is not None]
            if len(values) > 1 and min(values) >= 0 < max(values):
                found.append(
                    f"no value of {name!r} is below 0 in the first {len(values)} rows: above 0 the second answer is"
                    " taken to be the better one; if it says only how much better, add a column `winner`: a, b or tie"
                )
    if spec is RATED:
        used = next((name for name in SCORES if name in uses), None)
        others = [name for name in SCORES if name in uses and name != used]
        if others:
            found.append(
                f"answers are compared by {used!r}; {', '.join(map(repr, others))} hold ratings too and are not used"
                f" (`dataset_columns: {{{others[0]}: helpfulness}}` and leaving {used!r} out takes others)"
            )
    if spec is RANKED:
        differ = sum(_ranked_otherwise(row) for row in rows)
        if differ:
            found.append(f"scores and ranks of {differ} of the first {len(rows)} rows disagree; the scores are used")
    return found


def _ranked_otherwise(row: Mapping[str, Any]) -> bool:
    lists: list[list[Any]] = [
        next((row[name] for name in names if isinstance(row.get(name), list)), []) for names in (SCORE_LISTS, RANKS)
    ]
    scores, ranks = ([number_of(value) for value in each] for each in lists)
    if not scores or len(scores) != len(ranks):
        return False
    if None in scores or None in ranks:
        return False
    first = min(range(len(ranks)), key=lambda n: ranks[n] or 0.0)
    return scores[first] != max(score or 0.0 for score in scores)


def _of_prompts(
    spec: FormatSpec, rows: Sequence[Mapping[str, Any]], read: Sequence[tuple[Mapping[str, Any], Row]]
) -> list[str]:
    """Prompts that are empty, cut out of the wrong place, or lost beside a conversation."""
    found = []
    empty = sum(_is_empty(row["prompt"]) for _, row in read if "prompt" in row)
    if empty:
        found.append(
            f"the prompt of {empty} of the first {len(read)} rows is empty; remove these rows, or name the column of"
            " the prompt with `dataset_columns: {theirs: prompt}`"
        )
    if spec is IMPLICIT_PREFERENCE:
        inside = [row["prompt"] for _, row in read if isinstance(row["prompt"], str) and _ends_within(row["prompt"])]
        if 2 * len(inside) > len(read):
            found.append(
                f"answers begin alike, and their shared words are taken as a part of the prompt ({inside[0][-40:]!r}),"
                " as in TRL; give the prompt in a column of its own to keep the answers whole"
            )
    if spec is ULTRAFEEDBACK:
        lost = [raw["prompt"] for raw, row in read if not _within(raw["prompt"], row["prompt"])]
        if lost:
            found.append(
                f"the column 'prompt' of {len(lost)} of the first {len(read)} rows holds text that is in no turn of the"
                f" conversations, and is not used ({lost[0][:40]!r})"
            )
    kinds = [bool(turns_of(row["prompt"])) for _, row in read if isinstance(row.get("prompt"), str)]
    if any(kinds) and not all(kinds):
        found.append(
            f"{sum(kinds)} of the first {len(kinds)} prompts are transcripts (Human: ... Assistant: ...) and the others"
            " are not: with transcripts: messages they are given to the model in two different forms"
        )
    return found


def _is_empty(prompt: Any) -> bool:
    if isinstance(prompt, str):
        # What tables of texts write where there is nothing.
        return prompt.strip().lower() in ("", "nan", "none", "null", "n/a", "#n/a", "-")
    return not any(text.strip() for text in texts_of(prompt))


def _ends_within(prompt: str) -> bool:
    """Whether a shared beginning goes on after the mark of an answer."""
    marks = list(_ANSWERING.finditer(prompt))
    return bool(marks) and bool(prompt[marks[-1].end() :].strip())


def _within(text: Any, turns: Any) -> bool:
    said = "\n".join(texts_of(turns))
    return not isinstance(text, str) or text.strip() in said or not text.strip()


def _of_texts(read: Sequence[tuple[Mapping[str, Any], Row]]) -> list[str]:
    """What prompts and answers hold that the model would not be shown so in use."""
    found = []
    marked, twice, repeated, empty, tools = 0, 0, 0, 0, 0
    held: Counter[str] = Counter()
    for raw, row in read:
        sides = [row[name] for name in ("prompt", "chosen", "rejected", "completion", "messages") if name in row]
        texts = [text for side in sides for text in texts_of(side)]
        chat = any(isinstance(side, list) for side in sides)
        marked += chat and any(mark in text for text in texts for mark in MARKS)
        twice += _asks_twice(row)
        repeated += _repeats_question(row)
        empty += any(
            turn.get("role") == "assistant" and _is_empty(turn.get("content")) and not turn.get("tool_calls")
            for side in sides if isinstance(side, list) for turn in side
        )  # fmt: skip
        tools += not chat and decoded_or_same(raw.get("tools")) not in (None, "", [], "[]")
        held.update(mark for mark in _PLACEHOLDERS if any(mark in text for text in texts))
    of = f"of the first {len(read)} rows"
    if 2 * marked > len(read):
        found.append(
            f"{marked} {of} hold marks of a chat template ({', '.join(_marks_in(read))}), and the model's own is"
            " applied once more; leave the marks out, or give prompt and answers as text in the columns prompt, chosen,"
            " rejected"
        )
    if 2 * repeated > len(read):
        found.append(
            f"the answers of {repeated} {of} begin with the question once more, which is trained on as a part of the"
            " answer: remove it from the answers"
        )
    if twice:
        found.append(f"{twice} {of} ask the same question twice in a row: a history or context ends with it already")
    if empty:
        found.append(f"an answer within {empty} {of} is empty")
    if tools:
        found.append(f"the tools of {tools} {of} are not used: prompt and answers are text; give them as messages")
    often = [mark for mark, count in held.items() if 2 * count > len(read)]
    if often:
        found.append(
            f"{', '.join(often)} in the text stands for something that the model is not given; it reads the mark"
        )
    return found


def _marks_in(read: Sequence[tuple[Mapping[str, Any], Row]]) -> list[str]:
    said = "\n".join(text for _, row in read for value in row.values() for text in texts_of(value))
    return [mark for mark in MARKS if mark in said][:3]


def _asks_twice(row: Row) -> bool:
    turns = row.get("prompt")
    if not isinstance(turns, list) or len(turns) < 2 or turns[-1].get("role") != "user":
        return False
    asked = [str(turn.get("content")).strip() for turn in turns[-2:] if turn.get("role") == "user"]
    return len(asked) == 2 and asked[0] == asked[1] != ""


def _repeats_question(row: Row) -> bool:
    """Whether answers of messages hold the question again, at their beginning or within a template."""
    turns = row.get("prompt")
    if not isinstance(turns, list) or not turns or turns[-1].get("role") != "user":
        return False
    asked = "".join(texts_of(turns[-1].get("content"))).strip()
    answers = [row[name] for name in ("chosen", "rejected", "completion") if isinstance(row.get(name), list)]
    said = ["".join(texts_of(answer[0].get("content"))) for answer in answers if answer]
    # An answer may well begin with a short greeting, or go on with a sentence.
    ends = ("\n", "\r") if len(asked) < 40 else ("\n", "\r", " ")
    rests = [text.lstrip()[len(asked) :] for text in said if text.lstrip().startswith(asked)]
    return bool(asked) and bool(said) and len(rests) == len(said) and all(rest.startswith(ends) for rest in rests)
