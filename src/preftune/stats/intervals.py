"""Intervals and tests for evaluation results; detectable effects are in `preftune.stats.power`.

Rows that share a prompt are not independent. Wherever `groups` is taken, whole groups are resampled, so that the
interval answers for new prompts, not for new completions of the same ones.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import scipy

from preftune.errors import ConfigError, DataError
from preftune.stats.resampling import bca_shares, linear_error, resample_ratio, student_ends
from preftune.stats.rows import Array, check_level, finite_rows, normal_quantile, sum_by_group

# Where nothing varies the estimate itself solves the equation of the interval's ends; the ends are further out.
_ASIDE = 1e-9

Method = Literal["percentile", "bca", "student"]


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval.

    Attributes:
        mean: The estimate.
        low: Lower end.
        high: Upper end.
        level: Nominal coverage, for example 0.95.
        standard_error: Standard deviation of the estimate over resamples (0 where nothing varies).
        num_values: Rows behind the estimate.
        num_groups: Independent groups behind it.
        method: How the interval was made.
    """

    mean: float
    low: float
    high: float
    level: float
    standard_error: float
    num_values: int
    num_groups: int
    method: str

    def as_dict(self) -> dict[str, float]:
        """The three numbers that result files carry: mean, low, high."""
        return {"mean": self.mean, "low": self.low, "high": self.high}


def bootstrap_mean(
    values: Sequence[float] | Array,
    *,
    groups: Sequence[Hashable] | None = None,
    level: float = 0.95,
    num_resamples: int = 4000,
    method: Method = "bca",
    seed: int = 0,
) -> Interval:
    """Bootstrap interval of a mean over rows.

    Args:
        values: One number per row, `(rows,)`.
        groups: One group id per row, such as the prompt; every row is its own group by default.
        level: Nominal coverage.
        num_resamples: Bootstrap resamples.
        method: "bca" (bias-corrected and accelerated), "percentile", or "student" (studentised), which keeps its
            promise down to the fewest groups; see docs/evaluation.md for how often each covers.
        seed: Of the resampling.

    Returns:
        The interval.

    Raises:
        ConfigError: A setting is out of range.
        DataError: Too few rows or groups, or a value that is not finite.

    Source:
        Efron & Tibshirani (1993), An Introduction to the Bootstrap, sections 12.5 (studentised), 13.3 (percentile) and
        14.3 (BCa); acceleration from the jackknife over groups, eq. 14.15.
    """
    rows = finite_rows("values", values)
    return bootstrap_ratio(
        rows,
        np.ones_like(rows),
        groups=groups,
        level=level,
        num_resamples=num_resamples,
        method=method,
        seed=seed,
    )


def bootstrap_ratio(
    numerators: Sequence[float] | Array,
    denominators: Sequence[float] | Array,
    *,
    groups: Sequence[Hashable] | None = None,
    level: float = 0.95,
    num_resamples: int = 4000,
    method: Method = "bca",
    seed: int = 0,
) -> Interval:
    """Bootstrap interval of ``sum(numerators) / sum(denominators)``, for example a mean per token.

    Args:
        numerators: `(rows,)`.
        denominators: `(rows,)`, positive.
        groups: One group id per row; every row is its own group by default.
        level: Nominal coverage.
        num_resamples: Bootstrap resamples.
        method: "bca", "percentile" or "student", see `bootstrap_mean`.
        seed: Of the resampling.

    Returns:
        The interval.

    Raises:
        ConfigError: A setting is out of range.
        DataError: Too few rows or groups, lengths differ, a value is not finite or a denominator not positive.
    """
    check_level(level)
    if method not in ("percentile", "bca", "student"):
        raise ConfigError("unknown interval", where="method", value=method, allowed="percentile, bca, student")
    if num_resamples < 100:
        raise ConfigError("too few resamples", where="num_resamples", value=num_resamples, allowed="100 or more")
    top, bottom = finite_rows("numerators", numerators), finite_rows("denominators", denominators)
    if len(top) != len(bottom):
        raise DataError("lengths differ", where="denominators", value=len(bottom), allowed=f"{len(top)} values")
    if (bottom <= 0).any():
        raise DataError("not positive", where="denominators", value=float(bottom.min()), allowed="above 0")
    sums, sizes = sum_by_group(top, bottom, groups)
    estimate = float(sums.sum() / sizes.sum())
    rng, tail = np.random.default_rng(seed), (1 - level) / 2
    shares = (tail, 1 - tail)
    if method == "student":
        resampled, low, high = student_ends(sums, sizes, estimate, num_resamples, rng, shares)
    else:
        resampled = resample_ratio(sums, sizes, num_resamples, rng)
        if method == "bca":
            shares = bca_shares(sums, sizes, estimate, resampled, shares)
        low, high = (float(end) for end in np.quantile(resampled, shares))
    return Interval(
        mean=estimate,
        low=low,
        high=high,
        level=level,
        standard_error=float(resampled.std(ddof=1)),
        num_values=len(top),
        num_groups=len(sums),
        method=f"bootstrap ({method})",
    )


def paired_difference(
    first: Sequence[float] | Array,
    second: Sequence[float] | Array,
    *,
    groups: Sequence[Hashable] | None = None,
    level: float = 0.95,
    num_resamples: int = 4000,
    method: Method = "bca",
    seed: int = 0,
) -> Interval:
    """Bootstrap interval of ``mean(second - first)`` over rows measured under both conditions.

    Args:
        first: `(rows,)`, for example rewards before training.
        second: `(rows,)`, the same rows afterwards.
        groups: One group id per row; every row is its own group by default.
        level: Nominal coverage.
        num_resamples: Bootstrap resamples.
        method: "bca", "percentile" or "student", see `bootstrap_mean`.
        seed: Of the resampling.

    Returns:
        The interval of the mean difference.

    Raises:
        DataError: The rows do not match, or see `bootstrap_mean`.
    """
    before, after = finite_rows("first", first), finite_rows("second", second)
    if len(before) != len(after):
        raise DataError("paired rows differ in number", where="second", value=len(after), allowed=f"{len(before)} rows")
    return bootstrap_mean(
        after - before, groups=groups, level=level, num_resamples=num_resamples, method=method, seed=seed
    )


def wilson_interval(num_successes: int, num_trials: int, *, level: float = 0.95) -> Interval:
    """Wilson's score interval of a proportion over independent trials.

    Args:
        num_successes: Trials that succeeded.
        num_trials: All trials.
        level: Nominal coverage.

    Returns:
        The interval; it stays within [0, 1] and has width at 0 and 1 too.

    Raises:
        DataError: Counts that cannot be.

    Source:
        Wilson (1927), J. Am. Stat. Assoc. 22, 209-212.
    """
    check_level(level)
    if num_trials < 1 or not 0 <= num_successes <= num_trials:
        raise DataError(
            "impossible counts",
            where="num_successes, num_trials",
            value=(num_successes, num_trials),
            allowed="0 <= successes <= trials, trials >= 1",
        )
    share = num_successes / num_trials
    low, high = wilson_ends(share, num_trials, normal_quantile(0.5 + level / 2))
    return Interval(
        mean=share,
        low=low,
        high=high,
        level=level,
        standard_error=math.sqrt(share * (1 - share) / num_trials),
        num_values=num_trials,
        num_groups=num_trials,
        method="wilson",
    )


def wilson_ends(share: float, number: float, quantile: float) -> tuple[float, float]:
    """Ends of Wilson's interval.

    Args:
        share: Observed proportion.
        number: Independent trials behind it; an effective number need not be whole.
        quantile: Of the normal distribution, or of Student's.

    Returns:
        Lower and upper end, within [0, 1].
    """
    weight = quantile**2 / number
    centre = (share + weight / 2) / (1 + weight)
    half = quantile / (1 + weight) * math.sqrt(share * (1 - share) / number + weight / (4 * number))
    # Exact at the borders, where rounding would leave something like 1e-17.
    return 0.0 if share == 0 else max(0.0, centre - half), 1.0 if share == 1 else min(1.0, centre + half)


def proportion_interval(
    values: Sequence[float] | Array, *, groups: Sequence[Hashable] | None = None, level: float = 0.95
) -> Interval:
    """Wilson's interval of a mean of outcomes in [0, 1], for rows in groups.

    The rows count as many independent ones as explain the spread between groups, ``n = p (1 - p) / se^2`` with the
    linearised standard error over groups, and Student's quantile with ``groups - 1`` degrees of freedom stands for the
    normal one. Where all outcomes are alike nothing can be read off the spread, and every group counts as one row.
    Rows of yes and no that are all their own group get Wilson's interval itself.

    Args:
        values: One outcome per row, `(rows,)`, in [0, 1]: yes and no, or a half for a tie.
        groups: One group id per row; every row is its own group by default.
        level: Nominal coverage.

    Returns:
        The interval, within [0, 1].

    Raises:
        DataError: Too few rows or groups, or a value outside [0, 1].

    Source:
        Wilson (1927) with the effective sample size of Korn & Graubard (1998), Survey Methodology 24, 193-201.
    """
    check_level(level)
    rows = finite_rows("values", values)
    if ((rows < 0) | (rows > 1)).any():
        raise DataError("not an outcome", where="values", value=float(rows[(rows < 0) | (rows > 1)][0]), allowed="0..1")
    sums, sizes = sum_by_group(rows, np.ones_like(rows), groups)
    if (sizes == 1).all() and np.isin(rows, (0.0, 1.0)).all():
        # Independent yes and no: nothing has to be estimated about the spread.
        return wilson_interval(int(rows.sum()), len(rows), level=level)
    share = float(sums.sum() / sizes.sum())
    error = float(linear_error(sums, sizes, share))
    quantile = float(scipy.stats.t.ppf(0.5 + level / 2, len(sums) - 1))
    spread = share * (1 - share)
    low, high = wilson_ends(share, _effective_number(spread, error, len(sums)), quantile)
    return Interval(
        mean=share,
        low=low,
        high=high,
        level=level,
        standard_error=error,
        num_values=len(rows),
        num_groups=len(sums),
        method="wilson over groups",
    )


def paired_proportion_interval(
    differences: Sequence[float] | Array, *, groups: Sequence[Hashable] | None = None, level: float = 0.95
) -> Interval:
    """Tango's score interval of the difference of two proportions on the same rows, for rows in groups.

    At a difference of 0 its statistic is McNemar's. Groups are treated as in :func:`proportion_interval`: the rows
    count as many independent ones as explain the spread between groups, or one per group where nothing spreads.

    Args:
        differences: One per row, `(rows,)`: 1 where only the second is right, -1 where only the first is, else 0.
        groups: One group id per row; every row is its own group by default.
        level: Nominal coverage.

    Returns:
        The interval, within [-1, 1]; it has width where no row differs, or all do, too.

    Raises:
        DataError: Too few rows or groups, or another value.

    Source:
        Tango (1998), Statistics in Medicine 17, 891-908, eqs. 6 and 7; effective sample size as above.
    """
    check_level(level)
    rows = finite_rows("differences", differences)
    if not np.isin(rows, (-1.0, 0.0, 1.0)).all():
        strange = float(rows[~np.isin(rows, (-1.0, 0.0, 1.0))][0])
        raise DataError("no difference of two outcomes", where="differences", value=strange, allowed="-1, 0, 1")
    sums, sizes = sum_by_group(rows, np.ones_like(rows), groups)
    mean = float(rows.mean())
    error = linear_error(sums, sizes, mean)
    quantile, number = normal_quantile(0.5 + level / 2), float(len(rows))
    if (sizes > 1).any():
        quantile = float(scipy.stats.t.ppf(0.5 + level / 2, len(sums) - 1))
        number = _effective_number(float(rows.var()), error, len(sums))
    better, worse = float((rows > 0).mean()), float((rows < 0).mean())

    def excess(true: float) -> float:
        # The likelihood's share of the rarer change, given the true difference, solves a quadratic equation.
        half = (2 - better + worse) * true - better - worse
        nuisance = (math.sqrt(max(0.0, half**2 + 8 * worse * true * (1 - true))) - half) / 4
        variance = max(0.0, 2 * nuisance + true * (1 - true)) / number
        return abs(mean - true) - quantile * math.sqrt(variance)

    return Interval(
        mean=mean,
        # At a border that the data reach there is nothing beyond.
        low=-1.0 if excess(-1.0) <= 0 else float(scipy.optimize.brentq(excess, -1.0, mean - _ASIDE, xtol=1e-12)),
        high=1.0 if excess(1.0) <= 0 else float(scipy.optimize.brentq(excess, mean + _ASIDE, 1.0, xtol=1e-12)),
        level=level,
        standard_error=error,
        num_values=len(rows),
        num_groups=len(sums),
        method="tango",
    )


def _effective_number(spread: float, error: float, num_groups: int) -> float:
    """Independent rows of variance `spread` whose mean has the standard error `error`; all alike, a row per group."""
    return spread / error**2 if error > 1e-12 and spread > 1e-12 else float(num_groups)
