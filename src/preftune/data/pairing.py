"""From ranked responses and from unpaired labelled answers to preference pairs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from itertools import combinations, product
from typing import Any, Literal

from preftune.data.formats.base import BadRow, Row

Pairing = Literal["best_worst", "all", "none"]
PAIRINGS = ("best_worst", "all", "none")


def expand_ranked(row: Mapping[str, Any], pairing: str) -> list[Row]:
    """Pairs of one row of ranked responses.

    Args:
        row: ``{prompt, responses, scores}``, higher scores better, and optional extras.
        pairing: ``best_worst`` makes one pair; ``all`` makes every pair whose scores differ.

    Returns:
        Canonical pairs; ``margin`` is the difference of the two scores.

    Raises:
        BadRow: All scores are equal, so nothing is preferred.
    """
    scores, responses = row["scores"], row["responses"]
    if pairing == "all":
        ordered = sorted(range(len(scores)), key=lambda i: -scores[i])
        chosen_rejected = [(i, j) for i, j in combinations(ordered, 2) if scores[i] > scores[j]]
    else:
        best, worst = scores.index(max(scores)), scores.index(min(scores))
        chosen_rejected = [(best, worst)] if scores[best] > scores[worst] else []
    if not chosen_rejected:
        raise BadRow(
            "no_preference",
            "scores",
            "all responses have the same score",
            value=scores,
            remedy="remove the row or set on_bad_rows: skip",
        )
    rest = {key: value for key, value in row.items() if key not in ("prompt", "responses", "scores")}
    return [
        {
            "prompt": row["prompt"],
            "chosen": responses[i],
            "rejected": responses[j],
            **rest,
            "margin": scores[i] - scores[j],
        }
        for i, j in chosen_rejected
    ]


def _same_prompt(row: Mapping[str, Any]) -> str:
    return json.dumps([row["prompt"], row.get("tools"), row.get("chat_template_kwargs")], sort_keys=True, default=repr)


def rank_rated(rows: Iterable[Mapping[str, Any]]) -> tuple[list[Row], int]:
    """Bring rated answers to the same prompt together.

    Args:
        rows: ``{prompt, completion, score}`` rows in any order.

    Returns:
        ``{prompt, responses, scores}`` in the order in which prompts first appear, and the number of prompts with a
        single answer, which make no pair.
    """
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(_same_prompt(row), []).append(row)
    out: list[Row] = []
    for some in groups.values():
        if len(some) > 1:
            rest = {key: value for key, value in some[0].items() if key not in ("completion", "score")}
            out.append({**rest, "responses": [r["completion"] for r in some], "scores": [r["score"] for r in some]})
    return out, len(groups) - len(out)


def pair_unpaired(rows: Iterable[Mapping[str, Any]], pairing: str) -> tuple[list[Row], int]:
    """Pair labelled answers wherever one prompt has both labels.

    Args:
        rows: ``{prompt, completion, label}`` rows in any order.
        pairing: ``best_worst`` uses every answer at most once (first good with first bad, and so on); ``all`` makes
            every combination of a good and a bad answer.

    Returns:
        The pairs, in the order in which their prompts first appear, and the number of rows left without a partner.
    """
    groups: dict[str, tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]] = {}
    num_rows = 0
    for row in rows:
        num_rows += 1
        groups.setdefault(_same_prompt(row), ([], []))[0 if row["label"] else 1].append(row)
    pairs: list[Row] = []
    num_used = 0
    for good, bad in groups.values():
        matched = product(good, bad) if pairing == "all" else zip(good, bad, strict=False)
        pairs += [_pair(one, other) for one, other in matched]
        if pairing == "all":
            num_used += len(good) + len(bad) if good and bad else 0
        else:
            num_used += 2 * min(len(good), len(bad))
    return pairs, num_rows - num_used


def _pair(good: Mapping[str, Any], bad: Mapping[str, Any]) -> Row:
    rest = {key: value for key, value in good.items() if key not in ("prompt", "completion", "label")}
    return {"prompt": good["prompt"], "chosen": good["completion"], "rejected": bad["completion"], **rest}
