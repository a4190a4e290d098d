"""Win rates with the judge's own errors taken out, by what people said of a few comparisons.

A judge's win rate is not that of people: a judge that is wrong in a fifth of all cases says 62 % where people would say
70 %. Two corrections are here, for the two kinds of labels that there may be.

*Residuals* (:func:`by_residuals`): people labelled a random part of the very comparisons. Their mean is right whatever
the judge does; the judge only makes it more exact, as far as the two agree. Nothing is assumed about the judge.

*Error rates* (:func:`by_error_rates`): people labelled other comparisons, and the judge was asked about those too. How
often it is wrong there is assumed to hold here, for answers that people would judge alike.

Source:
    Lee et al. (2025), 2511.21140, for error rates that are themselves estimates (the point estimate is Rogan and
    Gladen's, 1978); Chen et al. (2026), 2601.05420, for residuals (prediction-powered inference, of which this is the
    form with the best factor) and for why they are the more exact where both can be had.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from scipy import stats

from preftune.errors import DataError
from preftune.stats.intervals import Interval, wilson_ends
from preftune.stats.rows import Array, check_level

#: Fewer labels than this are refused, and fewer than the second draw a warning: see the table in docs/evaluation.md.
LEAST_LABELS, FEW_LABELS = 20, 50
#: Verdicts that nobody gave: one right and one wrong for answers that win and for those that lose. Without them a
#: judge that made no mistake in twenty would count as one that never makes any.
_IMAGINED = ((0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0))


def by_residuals(
    scores: Array,
    labels: Array,
    *,
    groups: Sequence[Hashable] | None = None,
    equal: np.ndarray[Any, Any] | None = None,
    level: float = 0.95,
) -> Interval:
    """Win rate of people, from their labels on some of the comparisons and the judge's scores on all.

    ``mean(h) - b (mean(f labelled) - mean(f all))``: the people's mean, moved by how far the labelled comparisons are
    unlike all of them in the judge's eyes. ``b``, the slope of people's labels on the judge's scores, makes the error
    smallest; of a judge who guesses it is about 0.

    Args:
        scores: The judge's, ``(rows,)`` in [0, 1], 1 for a win.
        labels: People's, ``(rows,)`` in [0, 1], NaN where there is none; which rows have one must be left to chance.
        groups: Prompt of each row; every row is its own by default.
        equal: Rows whose two answers are the same text, a tie to everybody; they need no label.
        level: Nominal coverage.

    Returns:
        The interval, Wilson's with the number of independent labels that the error over prompts (jackknife) stands for.

    Raises:
        DataError: Fewer than three prompts have labels.
    """
    check_level(level)
    same = np.zeros(len(scores), bool) if equal is None else np.asarray(equal, bool)
    known = np.isfinite(labels) & ~same
    index = _codes(groups, len(scores))
    h = np.where(known, labels, 0.0)
    f = np.asarray(scores, dtype=np.float64)
    columns = (same, ~same, ~same * f, known, h, known * f, h * f, known * f * f)
    sums = np.stack([np.bincount(index, weights=np.asarray(each, np.float64)) for each in columns])
    num_labelled = int((sums[3] > 0).sum())
    if num_labelled < 3:
        raise DataError("labels on three prompts are needed", where="labels", value=num_labelled, allowed="3 or more")
    mean = float(np.clip(_residual_mean(sums.sum(axis=1)), 0.0, 1.0))
    imagined = np.array([(0.0, 1.0, f, 1.0, h, f, h * f, f * f) for h, f in _IMAGINED]).T
    sums = np.concatenate([sums, imagined], axis=1)
    left_out = _residual_mean(sums.sum(axis=1)[:, None] - sums)
    num = len(left_out)
    error = math.sqrt((num - 1) / num * float(((left_out - left_out.mean()) ** 2).sum()))
    return _wilson(mean, error, num_labelled, num_labelled - 2, len(scores), level, "residuals")


def _residual_mean(sums: Array) -> Array:
    """The estimate from the sums that :func:`by_residuals` makes, for one set of rows or several."""
    same, different, f_all, known, h, f, hf, ff = sums
    known = np.maximum(known, 1e-12)
    spread = ff / known - (f / known) ** 2
    slope = np.where(spread > 1e-9, (hf / known - h * f / known**2) / np.maximum(spread, 1e-12), 0.0)
    rest = h / known - slope * (f / known - f_all / np.maximum(different, 1e-12))
    return np.asarray((0.5 * same + different * rest) / (same + different), dtype=np.float64)


def by_error_rates(
    scores: Array,
    tried: Array,
    labels: Array,
    *,
    groups: Sequence[Hashable] | None = None,
    tried_groups: Sequence[Hashable] | None = None,
    equal: np.ndarray[Any, Any] | None = None,
    level: float = 0.95,
) -> Interval | None:
    """Win rate of people, from the judge's scores here and from how it scored other comparisons that people labelled.

    The judge's mean score is ``a + b t`` where people's is t: ``a = 1 - q0`` and ``b = q0 + q1 - 1`` for a judge who is
    right with probability q1 on answers that win and q0 on those that lose, and with ties halfway. So
    ``t = (mean(f) - a) / b``. The interval holds all t that the data do not exclude (Fieller's), with the errors of
    all three estimates in it.

    Args:
        scores: The judge's here, ``(rows,)`` in [0, 1], 1 for a win.
        tried: The judge's on the labelled comparisons, ``(labels,)``.
        labels: People's on those, ``(labels,)``.
        groups: Prompt of each row here; every row is its own by default.
        tried_groups: Prompt of each labelled comparison.
        equal: Rows whose two answers are the same text, a tie to everybody.
        level: Nominal coverage.

    Returns:
        The interval; ``None`` where the judge cannot be told from one that guesses, so that no t is excluded, and where
        people gave all labelled comparisons the same label, so that only one of the judge's errors was seen.

    Raises:
        DataError: Fewer than three labelled prompts, or fewer than two prompts here.
    """
    check_level(level)
    same = np.zeros(len(scores), bool) if equal is None else np.asarray(equal, bool)
    f, h = np.asarray(tried, dtype=np.float64), np.asarray(labels, dtype=np.float64)
    if np.ptp(h) == 0:
        return None
    a, b = np.linalg.lstsq(np.stack([np.ones_like(h), h], axis=1), f, rcond=None)[0]
    index = _codes(tried_groups, len(h))
    num_tried = int(index.max()) + 1
    if num_tried < 3:
        raise DataError("labels on three prompts are needed", where="labels", value=num_tried, allowed="3 or more")
    # The labelled comparisons, with those that were imagined: coefficients and their covariance over prompts.
    h = np.concatenate([h, [pair[0] for pair in _IMAGINED]])
    f = np.concatenate([f, [pair[1] for pair in _IMAGINED]])
    index = np.concatenate([index, num_tried + np.arange(len(_IMAGINED))])
    x = np.stack([np.ones_like(h), h], axis=1)
    line = np.asarray(np.linalg.lstsq(x, f, rcond=None)[0], dtype=np.float64)
    bread = np.linalg.inv(x.T @ x)
    scatter = np.zeros((int(index.max()) + 1, 2))
    np.add.at(scatter, index, x * (f - x @ line)[:, None])
    cover = bread @ (scatter.T @ scatter) @ bread * len(scatter) / (len(scatter) - 1)
    # Here: the mean score of answers that differ, and its error over prompts.
    here, share = np.asarray(scores, dtype=np.float64)[~same], float((~same).mean())
    places = _codes(groups, len(scores))[~same]
    sums = np.bincount(places, weights=here - here.mean()) if len(here) else np.zeros(1)
    num_here = len(np.unique(places))
    if num_here < 2:
        raise DataError("two prompts are needed", where="scores", value=num_here, allowed="2 or more")
    variance = num_here / (num_here - 1) * float((sums**2).sum()) / len(here) ** 2
    ends = _fieller(float(here.mean()), variance, line, cover, _student(level, num_tried - 2))
    if ends is None or b <= 0:
        return None
    low, high = (0.5 * (1 - share) + share * min(max(end, 0.0), 1.0) for end in ends)
    mean = 0.5 * (1 - share) + share * min(max((float(here.mean()) - float(a)) / float(b), 0.0), 1.0)
    error = (high - low) / (2 * _student(level, num_tried - 2))
    return Interval(mean, min(low, mean), max(high, mean), level, error, len(scores), num_tried, "error rates")


def _fieller(mean: float, variance: float, line: Array, cover: Array, quantile: float) -> tuple[float, float] | None:
    """All t for which ``mean - a - b t`` is within `quantile` of its errors of 0; ``None`` where they have no end."""
    gap, slope, q2 = mean - float(line[0]), float(line[1]), quantile**2
    square = slope**2 - q2 * float(cover[1, 1])
    if square <= 0:
        return None
    half = slope * gap + q2 * float(cover[0, 1])
    rest = gap**2 - q2 * (variance + float(cover[0, 0]))
    root = math.sqrt(max(0.0, half**2 - square * rest))
    return (half - root) / square, (half + root) / square


def _codes(groups: Sequence[Hashable] | None, num: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Groups as numbers from 0 on; without any every row is its own."""
    if groups is None:
        return np.arange(num)
    seen: dict[Hashable, int] = {}
    return np.array([seen.setdefault(group, len(seen)) for group in groups], dtype=np.int64)


def _student(level: float, freedom: int) -> float:
    return float(stats.t.ppf(0.5 + level / 2, max(1, freedom)))


def _wilson(mean: float, error: float, num: int, freedom: int, num_values: int, level: float, method: str) -> Interval:
    """Wilson's interval with as many trials as would have this error; as many as there are where it is none."""
    trials = mean * (1 - mean) / error**2 if error > 1e-12 and 0 < mean < 1 else float(num)
    low, high = wilson_ends(mean, trials, _student(level, freedom))
    return Interval(mean, low, high, level, error, num_values, num, method)
