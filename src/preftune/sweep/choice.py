"""The sweet spot: which cell to take, when several are as good as the best.

The cell with the best held-out mean is the best *estimate*, not the best cell. Every other cell is compared with it
pair by pair on the same held-out pairs, and the p-values are adjusted after Holm (1979) over all comparisons: cells
that survive are *tied with the best*. Among the tied ones the choice is that of the one-standard-error rule (Breiman,
Friedman, Olshen and Stone 1984, section 3.4.3): the most conservative cell whose mean is within one standard error of
the best, the standard error being that of the paired difference. Conservative is, in this order, a higher beta, a lower
learning rate, fewer epochs. A cell that is merely not distinguishable is not enough: with few held-out pairs every cell
is, and the most conservative of all has learned nothing. The preference gain charges a policy for its distance from
the reference already; there the best mean is taken as it is.

Held-out pairs show whether a policy prefers what was preferred, not what it writes itself. Where trials were sampled,
those that have left the reference (`scores.left_reference`) come after those that have not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from preftune.stats.intervals import paired_difference
from preftune.stats.significance import holm, mcnemar
from preftune.sweep.scores import GAIN, PAIRED, Array, HeldOut

LEVEL = 0.05
_FLIPS = 9_999
#: Settings in the order in which they count, and whether more of it is more conservative.
CONSERVATIVE = (("beta", True), ("learning_rate", False), ("num_train_epochs", False), ("max_steps", False))


@dataclass(frozen=True)
class Candidate:
    """A complete trial.

    Attributes:
        number: Its number.
        params: Its settings among those searched.
        mean: Its mean of the metric.
        held: Its held-out pairs, where they are known.
        left: Whether its samples are far from anything that the reference writes.
    """

    number: int
    params: Mapping[str, Any]
    mean: float
    held: HeldOut | None
    left: bool = False


@dataclass(frozen=True)
class Comparison:
    """A trial against the best one.

    Attributes:
        difference: Mean of (this - best) over the held-out pairs; ``None`` where the pairs are not the same.
        standard_error: Of that difference.
        p_value: Of the paired test.
        adjusted_p: The same after Holm.
        tied: Whether it cannot be told from the best; ``None`` where the two cannot be compared.
    """

    difference: float | None
    standard_error: float | None
    p_value: float | None
    adjusted_p: float | None
    tied: bool | None


@dataclass(frozen=True)
class Choice:
    """The outcome of a sweep.

    Attributes:
        best: Number of the trial with the best mean.
        sweet_spot: Number of the trial to take.
        left: Numbers of trials that are passed over because they have left the reference.
        comparisons: Per trial its comparison with the best.
        reason: Why this one, in words.
    """

    best: int
    sweet_spot: int
    left: tuple[int, ...]
    comparisons: dict[int, Comparison]
    reason: str


def paired_p(first: Array, second: Array, groups: np.ndarray[Any, Any], seed: int) -> float:
    """Two-sided p-value of equal means on the same pairs.

    Yes/no values with one pair per prompt take McNemar's mid-p test. Otherwise whole prompts have the sign of their
    summed difference flipped, which leaves its distribution as it is where the two do not differ (Fisher's
    randomisation test); p = (1 + exceedances) / (1 + flips).

    Args:
        first: ``(pairs,)``.
        second: ``(pairs,)``, the same pairs.
        groups: Prompt of each pair, ``(pairs,)``.
        seed: Of the flips.
    """
    difference = second - first
    sums = np.bincount(np.unique(groups, return_inverse=True)[1], weights=difference)
    if len(sums) == len(difference) and np.isin(difference, (-1.0, 0.0, 1.0)).all():
        return mcnemar(int((difference < 0).sum()), int((difference > 0).sum())).mid_p
    sums = sums[sums != 0]
    if not len(sums):
        return 1.0
    signs = np.random.default_rng([seed, 7]).integers(0, 2, size=(_FLIPS, len(sums)), dtype=np.int8) * 2 - 1
    # A hair of tolerance: sums in another order may differ in the last bit.
    exceeding = int((np.abs(signs @ sums) >= abs(sums.sum()) * (1 - 1e-12)).sum())
    return (1 + exceeding) / (1 + _FLIPS)


def choose(candidates: Sequence[Candidate], metric: str, direction: str, seed: int) -> Choice | None:
    """Compare all complete trials with the best, and pick one.

    Args:
        candidates: Complete trials.
        metric: The deciding metric.
        direction: ``maximize`` or ``minimize``.
        seed: Of tests and bootstrap.

    Returns:
        The choice; ``None`` where no trial is complete.
    """
    usable = [each for each in candidates if math.isfinite(each.mean)]
    if not usable:
        return None
    sign = 1.0 if direction == "maximize" else -1.0
    eligible = [each for each in usable if not each.left] or usable
    left = tuple(each.number for each in usable if each.left)
    # Of equal means the conservative one counts as the best.
    best = min(eligible, key=lambda each: (-sign * each.mean, *_caution(each)))
    comparisons = _compare(eligible, best, metric, seed)
    sweet = best
    if metric != GAIN:
        sweet = min((each for each in eligible if _within_one_error(comparisons[each.number], sign)), key=_caution)
    reason = _reason(best, sweet, comparisons, metric) + _left_behind(left, len(eligible) == len(usable))
    return Choice(best.number, sweet.number, left, comparisons, reason)


def _compare(candidates: Sequence[Candidate], best: Candidate, metric: str, seed: int) -> dict[int, Comparison]:
    found = {best.number: Comparison(0.0, 0.0, 1.0, 1.0, True)}
    raw: dict[int, tuple[float, float, float]] = {}
    for each in candidates:
        if each.number == best.number:
            continue
        paired = _same_pairs(each, best, metric)
        if paired is None:
            found[each.number] = Comparison(None, None, None, None, None)
            continue
        mine, its, groups = paired
        interval = paired_difference(its, mine, groups=groups.tolist(), num_resamples=2000, seed=seed)
        raw[each.number] = (interval.mean, interval.standard_error, paired_p(its, mine, groups, seed))
    adjusted: list[float] = holm([p for _, _, p in raw.values()]).tolist() if raw else []
    for (number, (difference, error, p)), corrected in zip(raw.items(), adjusted, strict=True):
        found[number] = Comparison(difference, error, p, float(corrected), bool(corrected >= LEVEL))
    return found


def _same_pairs(each: Candidate, best: Candidate, metric: str) -> tuple[Array, Array, np.ndarray[Any, Any]] | None:
    if metric not in PAIRED or each.held is None or best.held is None or each.held.digest != best.held.digest:
        return None
    if len(np.unique(best.held.prompts)) < 2:
        return None
    return each.held.values(metric), best.held.values(metric), best.held.prompts


def _within_one_error(comparison: Comparison, sign: float) -> bool:
    if not comparison.tied or comparison.difference is None or comparison.standard_error is None:
        return False
    return -sign * comparison.difference <= comparison.standard_error


def _caution(each: Candidate) -> tuple[float, ...]:
    """Smaller is more conservative."""
    order = []
    for name, more in CONSERVATIVE:
        value = each.params.get(name)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            order.append(-value if more else value)
        else:
            order.append(0.0)
    return (*order, each.number)


def _reason(best: Candidate, sweet: Candidate, comparisons: Mapping[int, Comparison], metric: str) -> str:
    tied = sum(bool(each.tied) for each in comparisons.values()) - 1
    unknown = sum(each.tied is None for each in comparisons.values())
    text = f"trial {best.number} has the best {metric}"
    if tied:
        text += f"; {tied} other trial{'s' * (tied > 1)} cannot be told from it (paired tests, Holm, 5 %)"
    elif len(comparisons) - 1 > unknown:
        text += "; every other trial that can be compared is told from it (paired tests, Holm, 5 %)"
    if unknown:
        text += f"; {unknown} could not be compared with it pair by pair"
    if sweet.number != best.number:
        text += f"; trial {sweet.number} is the most conservative one within one standard error of it"
    return text


def _left_behind(left: Sequence[int], all_of_them: bool) -> str:
    if not left:
        return ""
    if all_of_them:
        return "; the samples of all trials are far from what the reference writes, so that no figure speaks for any"
    who = f"trials {', '.join(map(str, left))} have" if len(left) > 1 else f"trial {left[0]} has"
    return f"; {who} left what the reference writes, and cannot be the sweet spot"
