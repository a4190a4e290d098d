"""Resampling of whole groups, and what the intervals of :mod:`preftune.stats.intervals` are read off from it."""

from __future__ import annotations

import math

import numpy as np
import scipy

from preftune.stats.rows import Array

# Indices drawn at once: bounds the memory of the bootstrap to a few dozen megabytes.
_DRAWS_PER_CHUNK = 1 << 21
# Up to so many distinct groups (by sum and size) their counts are drawn instead of the groups themselves.
_MAX_KINDS = 256


def resample_ratio(sums: Array, sizes: Array, num_resamples: int, rng: np.random.Generator) -> Array:
    """The ratio in each bootstrap resample of whole groups, `(num_resamples,)`."""
    num_groups = len(sums)
    kinds, counts = np.unique(np.stack([sums, sizes]), axis=1, return_counts=True)
    if kinds.shape[1] <= min(_MAX_KINDS, num_groups // 4):
        # Few distinct groups (yes/no data): how often each kind is drawn is multinomial, which is the same for less.
        drawn = rng.multinomial(num_groups, counts / num_groups, size=num_resamples).astype(np.float64)
        return np.asarray((drawn @ kinds[0]) / (drawn @ kinds[1]), dtype=np.float64)
    equal_sizes = bool((sizes == sizes[0]).all())
    results = np.empty(num_resamples)
    chunk = max(1, _DRAWS_PER_CHUNK // num_groups)
    for start in range(0, num_resamples, chunk):
        stop = min(start + chunk, num_resamples)
        picks = rng.integers(num_groups, size=(stop - start, num_groups), dtype=np.uint32)
        drawn_sizes = num_groups * sizes[0] if equal_sizes else sizes[picks].sum(axis=1)
        results[start:stop] = sums[picks].sum(axis=1) / drawn_sizes
    return results


def linear_error(sums: Array, sizes: Array, ratio: float) -> float:
    """Standard error of ``sum(sums) / sum(sizes)`` over independent groups, by linearisation."""
    residuals = sums - ratio * sizes
    num_groups = len(sums)
    return float(math.sqrt(num_groups / (num_groups - 1) * float((residuals**2).sum())) / sizes.sum())


def student_ends(
    sums: Array,
    sizes: Array,
    estimate: float,
    num_resamples: int,
    rng: np.random.Generator,
    shares: tuple[float, float],
) -> tuple[Array, float, float]:
    """Resampled ratios, and the ends of the studentised interval.

    Every resample is measured in its own standard error; the quantiles of ``(ratio* - ratio) / error*`` then take the
    place of Student's t.
    """
    num_groups = len(sums)
    features = np.stack([sums, sizes, sums**2, sums * sizes, sizes**2], axis=1)
    totals = np.empty((num_resamples, 5))
    chunk = max(1, _DRAWS_PER_CHUNK // num_groups)
    for start in range(0, num_resamples, chunk):
        rows = min(start + chunk, num_resamples) - start
        picks = rng.integers(num_groups, size=(rows, num_groups)) + num_groups * np.arange(rows)[:, None]
        counts = np.bincount(picks.ravel(), minlength=rows * num_groups).reshape(rows, num_groups)
        totals[start : start + rows] = counts @ features
    resampled = totals[:, 0] / totals[:, 1]
    squares = totals[:, 2] - 2 * resampled * totals[:, 3] + resampled**2 * totals[:, 4]
    errors = np.sqrt(np.maximum(squares, 0.0) * (num_groups / (num_groups - 1))) / totals[:, 1]
    error = linear_error(sums, sizes, estimate)
    # Resamples of one group again and again have no spread: they speak for an end at infinity.
    least = 1e-6 * max(error, 1e-300)
    with np.errstate(divide="ignore", invalid="ignore"):
        scaled = np.where(errors > least, (resampled - estimate) / errors, np.sign(resampled - estimate) * np.inf)
    scaled = np.where(np.isnan(scaled), 0.0, scaled)
    # Without interpolation, which would turn two infinite neighbours into no number.
    below, above = (float(end) for end in np.quantile(scaled, shares, method="inverted_cdf"))
    student = float(scipy.stats.t.ppf(shares[1], num_groups - 1))
    above = above if math.isfinite(above) else student
    below = below if math.isfinite(below) else -student
    return resampled, estimate - above * error, estimate - below * error


def bca_shares(
    sums: Array, sizes: Array, estimate: float, resampled: Array, shares: tuple[float, float]
) -> tuple[float, float]:
    """Which quantiles of the resamples are the ends of the BCa interval."""
    spread = float(resampled.std())
    # Rounding alone can part resamples of constant data; a correction made of it would be noise.
    if spread <= 1e-12 * max(1.0, abs(estimate)):
        return shares
    # Ties count half, as in SciPy, so that discrete data are not taken for biased.
    below = float((resampled < estimate).mean() + (resampled <= estimate).mean()) / 2
    limit = 0.5 / len(resampled)
    bias = float(scipy.special.ndtri(min(max(below, limit), 1 - limit)))
    leave_one_out = (sums.sum() - sums) / (sizes.sum() - sizes)
    deviations = leave_one_out.mean() - leave_one_out
    denominator = float((deviations**2).sum() ** 1.5)
    acceleration = float((deviations**3).sum()) / (6 * denominator) if denominator > 0 else 0.0

    def corrected(share: float) -> float:
        moved = bias + float(scipy.special.ndtri(share))
        return float(scipy.stats.norm.cdf(bias + moved / (1 - acceleration * moved)))

    return corrected(shares[0]), corrected(shares[1])
