"""People's verdicts on comparisons: a file to fill in, a file to read, and the win rate corrected by them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from preftune.errors import DataError, SetupError
from preftune.evaluation.corrected import FEW_LABELS, LEAST_LABELS, by_error_rates, by_residuals
from preftune.evaluation.metrics import Groups, Summary
from preftune.files import parse_json
from preftune.ownership import put_text
from preftune.stats.rows import Array

#: Comparisons of an evaluation, in random order and with the sides shuffled, for people to judge.
TO_LABEL = "to_label.jsonl"
_POINTS = {"first": 1.0, "tie": 0.5, "second": 0.0}
_TEXTS = ("prompt", "first", "second")

#: What tells the scores of further comparisons: prompts, first and second answers; NaN where there is none.
Scores = Callable[[Sequence[str], Sequence[str], Sequence[str]], Array]


@dataclass(frozen=True)
class Label:
    """What people said of one comparison.

    Attributes:
        prompt: The request.
        first: One answer.
        second: The other.
        score: 1 where the first is better, 0 where the second is, 0.5 for a tie; the mean where several people said.
    """

    prompt: str
    first: str
    second: str
    score: float

    @property
    def key(self) -> tuple[str, str, str]:
        """The texts without the white space around them."""
        return self.prompt.strip(), self.first.strip(), self.second.strip()


def read_labels(path: str) -> list[Label]:
    """Read JSON lines with ``prompt``, ``first``, ``second`` and ``label``; lines whose label is null are left out.

    A comparison that stands there several times, with the answers in either order, counts once, with the mean of what
    was said. Equal answers are left out: they are a tie.

    Args:
        path: The file.

    Raises:
        DataError: It cannot be read, a line is something else, or there are too few labels.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise DataError(f"cannot be read ({why})", where="judge_labels", value=path) from error
    said: dict[tuple[str, str, str], list[float]] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        label = _label(line, f"{path}, line {number}")
        if label is None or label.key[1] == label.key[2]:
            continue
        prompt, first, second = label.key
        if (prompt, second, first) in said:
            said[prompt, second, first].append(1 - label.score)
        else:
            said.setdefault(label.key, []).append(label.score)
    found = [Label(*key, float(np.mean(scores))) for key, scores in said.items()]
    if len(found) < LEAST_LABELS:
        raise DataError(
            "too few comparisons with a label to correct a judge by",
            where="judge_labels",
            value=len(found),
            allowed=f"{LEAST_LABELS} or more",
            remedy=f"label more of {TO_LABEL}, from the top",
        )
    return found


def _label(line: str, where: str) -> Label | None:
    try:
        row = parse_json(line)
    except ValueError as error:
        raise DataError("not JSON", where=where, remedy="one object a line") from error
    if not isinstance(row, dict) or not all(isinstance(row.get(name), str) for name in _TEXTS):
        raise DataError("a text is missing", where=where, allowed="prompt, first and second, and a label")
    if row.get("label") is None:
        return None
    if row["label"] not in _POINTS:
        raise DataError("not a label", where=where, value=row["label"], allowed="first, second, tie or null")
    return Label(row["prompt"], row["first"], row["second"], _POINTS[row["label"]])


def write_to_label(
    folder: str, prompts: Sequence[str], answers: Sequence[str], opponents: Sequence[str], seed: int
) -> Path:
    """Write the comparisons for people to judge: in random order, so that any number from the top is a random part.

    Which side is the model's is random too, and is not told; equal answers are left out. A file that has labels in it
    is left as it is.

    Args:
        folder: Where :data:`TO_LABEL` goes.
        prompts: The requests.
        answers: The model's.
        opponents: The others.
        seed: Of order and sides.

    Returns:
        The file.

    Raises:
        SetupError: It cannot be written.
    """
    path = Path(folder) / TO_LABEL
    rng = np.random.default_rng([seed, 11])
    rows = []
    for number in rng.permutation(len(prompts)).tolist():
        texts = [answers[number], opponents[number]]
        if rng.random() < 0.5:
            texts.reverse()
        if texts[0].strip() != texts[1].strip():
            rows.append({"prompt": prompts[number], "first": texts[0], "second": texts[1], "label": None})
    try:
        if path.exists() and _has_labels(path):
            return path
        # ASCII: models write halves of characters.
        return put_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    except OSError as error:
        why = f"cannot write ({error.strerror})"
        raise SetupError(why, where=str(path), remedy="free some space, or set another out") from error


def _has_labels(path: Path) -> bool:
    try:
        return any(_label(line, TO_LABEL) for line in path.read_text(encoding="utf-8").split("\n") if line.strip())
    except (UnicodeDecodeError, DataError):
        # Somebody is working on it.
        return True


def correct(
    labels: Sequence[Label],
    keys: Sequence[tuple[str, str, str]],
    scores: Array,
    groups: Groups,
    judged: Scores,
    summary: Summary,
) -> tuple[dict[str, Any] | None, list[str]]:
    """The win rate that people would have given, with the interval that then holds.

    Where all labels are on comparisons of this evaluation, by :func:`~preftune.evaluation.corrected.by_residuals`; with
    any others among them, by :func:`~preftune.evaluation.corrected.by_error_rates`.

    Args:
        labels: People's.
        keys: Prompt, answer of the model and opponent's of every comparison, stripped.
        scores: The judge's on them, 1 for a win of the model.
        groups: Prompt of each comparison.
        judged: Scores comparisons that people labelled.
        summary: Settings of the intervals.

    Returns:
        ``mean``, ``low``, ``high``, ``n``, ``labels``, ``method`` and ``agreement``, the share of labelled comparisons
        in which judge and people prefer the same answer (ties of people left out, ties of the judge half), or ``None``
        where nothing can be corrected; and notes.
    """
    places: dict[tuple[str, str, str], list[int]] = {}
    for number, key in enumerate(keys):
        places.setdefault(key, []).append(number)
    people = np.full(len(keys), np.nan)
    missed = 0
    for label in labels:
        prompt, first, second = label.key
        here, turned = places.get((prompt, first, second), []), places.get((prompt, second, first), [])
        people[here], people[turned] = label.score, 1 - label.score
        missed += not here and not turned
    equal = np.array([first == second for _, first, second in keys])
    if missed:
        tried = judged(*([getattr(each, name) for each in labels] for name in _TEXTS))
        read = np.isfinite(tried)
        told = np.array([each.score for each in labels])[read]
        tried, asked = tried[read], [each.key[0] for each, ok in zip(labels, read, strict=True) if ok]
    else:
        read = np.isfinite(people)
        told, tried = people[read], scores[read]
        asked = [key[0] for key, ok in zip(keys, read, strict=True) if ok]
    if len(told) < LEAST_LABELS:
        return None, [f"the judge's verdicts on {len(told)} labelled comparisons could be read: too few to correct by"]
    agreement = summary.outcome(_agreeing(tried, told), [each for each, t in zip(asked, told, strict=True) if t != 0.5])
    notes = (
        [] if len(told) >= FEW_LABELS else [f"only {len(told)} human labels: intervals are wide, and on the safe side"]
    )
    chance = not agreement["low"] > 0.5
    settings: dict[str, Any] = {"groups": groups, "equal": equal, "level": summary.level}
    if missed:
        found = by_error_rates(scores, tried, told, tried_groups=asked, **settings)
        if found is None:
            return None, [*notes, _no_better(agreement, "the win rate cannot be corrected by these labels")]
    else:
        found = by_residuals(scores, people, **settings)
    if chance:
        notes.append(_no_better(agreement, "the corrected win rate rests on the labels alone"))
    record: dict[str, Any] = {**found.as_dict(), "n": len(scores), "labels": len(told), "method": found.method}
    return record | {"agreement": agreement}, notes


def _agreeing(judge: Array, people: Array) -> Array:
    """1 where both prefer the same answer, half for a tie of the judge; without the ties of people."""
    decided = people != 0.5
    return np.asarray(0.5 + 0.5 * np.sign(judge[decided] - 0.5) * np.sign(people[decided] - 0.5), dtype=np.float64)


def _no_better(agreement: dict[str, float], so: str) -> str:
    share = f"{100 * agreement['mean']:.0f} % of" if agreement["n"] else "none of"
    return (
        f"the judge is not shown to be better than chance: it agrees with {share} {agreement['n']:g} human labels that "
        f"prefer an answer; {so}"
    )
