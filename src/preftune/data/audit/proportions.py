"""Shares with intervals that know about rows of the same prompt."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from preftune.stats.intervals import proportion_interval, wilson_ends
from preftune.stats.resampling import linear_error
from preftune.stats.rows import normal_quantile, sum_by_group


@dataclass(frozen=True)
class Share:
    """A share of rows.

    Attributes:
        count: Rows that are meant.
        total: All rows.
        share: Their ratio; 0 of nothing.
        low: Lower end of the 95 % interval.
        high: Upper end.
    """

    count: int
    total: int
    share: float
    low: float
    high: float

    def fields(self) -> dict[str, Any]:
        """The fields of a finding."""
        return {"count": self.count, "share": self.share, "low": self.low, "high": self.high}

    def __str__(self) -> str:
        return f"{self.share:.1%} [{self.low:.1%}, {self.high:.1%}]"


def share_of(flags: Sequence[bool], groups: Sequence[Hashable] | None = None) -> Share:
    """A share with the 95 % interval that an evaluation of the same rows would give.

    Args:
        flags: One yes or no per row.
        groups: Prompt of each row; every row is its own by default.

    Returns:
        The share; the interval of no rows is everything.

    Source:
        :func:`~preftune.stats.intervals.proportion_interval`.
    """
    values = np.asarray(flags, dtype=np.float64)
    if not len(values):
        return Share(0, 0, 0.0, 0.0, 1.0)
    if groups is not None:
        # Rows without a prompt have none in common.
        groups = [group if group != "" else (place,) for place, group in enumerate(groups)]
    share, num_groups = float(values.mean()), len(values) if groups is None else len(set(groups))
    if num_groups < 2:
        # A single prompt shows no spread: it counts as one row.
        low, high = wilson_ends(share, num_groups, normal_quantile(0.975))
    else:
        found = proportion_interval(values, groups=groups)
        low, high = found.low, found.high
    return Share(int(values.sum()), len(values), share, low, high)


def effective_size(values: Any, groups: Sequence[Hashable]) -> float:
    """Number of independent rows that would give the share the same variance, from 1 to the number of rows."""
    num_rows, num_groups = len(values), len(set(groups))
    if num_groups == num_rows:
        return float(num_rows)
    p = float(values.mean())
    if p in (0.0, 1.0) or num_groups < 2:
        # Nothing varies, so that nothing can be estimated: the cautious answer.
        return float(num_groups)
    variance = linear_error(*sum_by_group(values, np.ones(num_rows), groups), p) ** 2
    return float(num_rows / max(1.0, variance / (p * (1 - p) / num_rows)))
