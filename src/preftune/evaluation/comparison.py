"""Two checkpoints on the same pairs: what differs, how surely, and how small a difference would have been found."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from preftune.evaluation.metrics import Groups, Summary, ranked_right
from preftune.stats.power import detectable_difference, detectable_paired_proportion
from preftune.stats.rows import Array
from preftune.stats.significance import mcnemar


def compare(rewards: Array, other: Array, groups: Groups, summary: Summary, *, power: float = 0.8) -> dict[str, Any]:
    """Paired comparison of two checkpoints' rewards; differences are the model's minus the other's.

    Args:
        rewards: ``(pairs, 2)``, the model's rewards of chosen and rejected.
        other: The other checkpoint's, of the same pairs.
        groups: Prompt of each pair.
        summary: Settings of the intervals.
        power: Chance of finding a difference as small as the detectable one.

    Returns:
        ``accuracy`` and ``margin``, each with both sides, the ``difference`` with its interval clustered by prompt, and
        ``detectable``, the smallest true difference that this many prompts would have shown at that power, ``None``
        where the differences have no spread to tell it from;
        ``mcnemar`` with both discordant counts, exact and mid-p values, and its own detectable difference, for which
        every pair counts as independent; and ``conclusion``, a sentence.
    """
    ours, theirs = ranked_right(rewards), ranked_right(other)
    margins, other_margins = rewards[:, 0] - rewards[:, 1], other[:, 0] - other[:, 1]
    only_model = int(((ours == 1) & (theirs == 0)).sum())
    only_other = int(((ours == 0) & (theirs == 1)).sum())
    test = mcnemar(only_model, only_other)
    discordant = (only_model + only_other) / len(ours)
    detectable = None
    if discordant:
        found = detectable_paired_proportion(len(ours), discordant, power=power, level=summary.level)
        detectable = found if math.isfinite(found) else None
    accuracy = _side_by_side(ours, theirs, groups, summary, power, outcome=True)
    result = {
        "num_pairs": len(ours),
        "num_prompts": len(ours) if groups is None else len(set(groups)),
        "power": power,
        "accuracy": accuracy,
        "margin": _side_by_side(margins, other_margins, groups, summary, power, outcome=False),
        "mcnemar": {
            "only_model": only_model,
            "only_other": only_other,
            "exact_p": test.exact_p,
            "mid_p": test.mid_p,
            "detectable": detectable,
        },
    }
    result["conclusion"] = _conclusion(accuracy, discordant, agrees=test.mid_p < 1 - summary.level)
    return result


def _side_by_side(
    ours: Array, theirs: Array, groups: Groups, summary: Summary, power: float, *, outcome: bool
) -> dict[str, Any]:
    make = summary.outcome if outcome else summary.number
    difference = (summary.change if outcome else summary.number)(ours - theirs, groups)
    detectable = None
    if math.isfinite(difference["low"]):
        num_groups = len(ours) if groups is None else len(set(groups))
        # One number per prompt: its deviation is that of the mean, scaled back.
        deviation = _error(ours - theirs, groups) * math.sqrt(num_groups)
        if deviation > 1e-12 * max(1.0, abs(difference["mean"])):
            detectable = detectable_difference(num_groups, deviation, power=power, level=summary.level)
    return {
        "model": make(ours, groups),
        "other": make(theirs, groups),
        "difference": difference,
        "detectable": detectable,
    }


def _error(values: Array, groups: Groups) -> float:
    """Standard error of the mean over prompts, linearised: exact where Monte Carlo would scatter."""
    if groups is None:
        return float(values.std(ddof=1) / math.sqrt(len(values)))
    codes: dict[Any, int] = {}
    index = np.array([codes.setdefault(group, len(codes)) for group in groups])
    residuals = np.bincount(index, weights=values - values.mean())
    num_groups = len(residuals)
    return float(math.sqrt(num_groups / (num_groups - 1) * float((residuals**2).sum())) / len(values))


def _conclusion(accuracy: dict[str, Any], discordant: float, *, agrees: bool) -> str:
    difference, detectable = accuracy["difference"], accuracy["detectable"]
    if not discordant:
        return "both rank every pair alike"
    if not math.isfinite(difference["low"]):
        return "one prompt alone allows no conclusion"
    if (difference["low"] > 0 or difference["high"] < 0) and not agrees:
        return "no difference is shown: the interval excludes 0, but McNemar's test does not agree"
    if difference["low"] > 0 or difference["high"] < 0:
        better = "the model" if difference["mean"] > 0 else "the other checkpoint"
        return f"{better} ranks more pairs right: the interval of the difference excludes 0"
    if detectable is None:
        return "no difference is shown"
    return (
        f"no difference is shown; a true one below {100 * detectable:.1f} points would most likely not have been found"
    )
