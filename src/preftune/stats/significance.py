"""Tests of paired outcomes, and of several claims at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy

from preftune.errors import DataError
from preftune.stats.rows import Array


@dataclass(frozen=True)
class McNemarResult:
    """Two-sided McNemar test on paired yes/no outcomes.

    Attributes:
        only_first: Pairs that only the first got right.
        only_second: Pairs that only the second got right.
        exact_p: Exact conditional p-value (guaranteed level, conservative).
        mid_p: Mid-p value (close to the nominal level; the better default).
    """

    only_first: int
    only_second: int
    exact_p: float
    mid_p: float


def mcnemar(only_first: int, only_second: int) -> McNemarResult:
    """McNemar's test from the two discordant counts.

    Args:
        only_first: Pairs that only the first got right.
        only_second: Pairs that only the second got right.

    Returns:
        Exact and mid-p values; both 1 where nothing is discordant.

    Raises:
        DataError: A count is negative.

    Source:
        Fagerland, Lydersen & Laake (2013), BMC Med. Res. Methodol. 13:91, exact conditional and mid-p test.
    """
    if only_first < 0 or only_second < 0:
        raise DataError("negative count", where="only_first, only_second", value=(only_first, only_second))
    total, fewer = only_first + only_second, min(only_first, only_second)
    if total == 0:
        return McNemarResult(only_first, only_second, 1.0, 1.0)
    below = float(scipy.stats.binom.cdf(fewer, total, 0.5))
    point = float(scipy.stats.binom.pmf(fewer, total, 0.5))
    if only_first == only_second:
        return McNemarResult(only_first, only_second, 1.0, 1.0 - point / 2)
    return McNemarResult(only_first, only_second, min(1.0, 2 * below), min(1.0, 2 * below - point))


def holm(p_values: Sequence[float] | Array) -> Array:
    """Holm's step-down adjustment: controls the chance of any false claim among several tests.

    Args:
        p_values: `(tests,)` in [0, 1].

    Returns:
        Adjusted p-values in the given order; compare them with the wanted level directly.

    Raises:
        DataError: A value outside [0, 1].

    Source:
        Holm (1979), Scand. J. Stat. 6, 65-70.
    """
    given = np.asarray(p_values, dtype=np.float64)
    if given.ndim != 1 or not ((given >= 0) & (given <= 1)).all():
        raise DataError("not a list of p-values", where="p_values", value=given.tolist(), allowed="numbers in [0, 1]")
    order = np.argsort(given, kind="stable")
    steps = given[order] * np.arange(len(given), 0, -1)
    adjusted = np.empty_like(given)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return adjusted
