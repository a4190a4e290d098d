"""The few estimates that guards need, each with a standard error that respects pairs of one prompt."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from preftune.stats.resampling import linear_error
from preftune.stats.rows import Array

#: Two-sided 95 % and 99.9 % of the normal distribution. Guards look at many windows of a run, so that most of them
#: take the wider one.
Z95, Z999 = 1.959963984540054, 3.2905267314918945


@dataclass(frozen=True)
class Estimate:
    """A mean and its standard error.

    Attributes:
        mean: The estimate.
        error: Its standard error; NaN where it cannot be had.
        num: Values.
    """

    mean: float
    error: float
    num: int

    def low(self, z: float = Z999) -> float:
        """Lower end of the interval."""
        return self.mean - z * self.error

    def high(self, z: float = Z999) -> float:
        """Upper end of the interval."""
        return self.mean + z * self.error

    def evidence(self, name: str, z: float = Z999) -> dict[str, float]:
        """The estimate with its interval, for an alarm."""
        return {name: self.mean, f"{name}_low": self.low(z), f"{name}_high": self.high(z)}


def clustered(values: Array, groups: npt.NDArray[Any] | None = None) -> Estimate:
    """Mean of ``(P,)`` values, with a cluster-robust standard error.

    error^2 = G / (G - 1) * sum_g (sum_{i in g} (x_i - mean))^2 / P^2 over G groups; with one value per group that is
    the usual s^2 / P. NaN values are left out.

    Args:
        values: The values.
        groups: Group of each value; by default each is its own.
    """
    known = np.isfinite(values)
    values = values[known]
    num = len(values)
    if not num:
        return Estimate(math.nan, math.nan, 0)
    mean = float(values.mean())
    sums: npt.NDArray[Any] = values
    sizes: npt.NDArray[Any] = np.ones(num)
    if groups is not None:
        _, places = np.unique(groups[known], return_inverse=True)
        sums, sizes = np.bincount(places, weights=values), np.bincount(places, weights=np.ones(num))
    return Estimate(mean, linear_error(sums, sizes, mean) if len(sums) > 1 else math.nan, num)


def separation_influence(margins: Array) -> tuple[float, Array]:
    """Standardised margin ``d = mean / standard deviation`` and each pair's influence on it.

    d tells how well margins rank pairs, as their sign does, with less noise: for normal margins the accuracy is
    Phi(d). Influence (delta method): ``z_i - d (z_i^2 - 1) / 2`` with ``z_i = (x_i - mean) / sd``; the standard error
    of a difference of two d on the same pairs is that of the mean difference of influences.
    """
    spread = float(margins.std())
    if spread <= 0:
        return 0.0, np.zeros_like(margins)
    scaled = (margins - margins.mean()) / spread
    d = float(margins.mean()) / spread
    return d, scaled - d * (scaled**2 - 1) / 2


def r_squared(x: Array, y: Array) -> tuple[float, float, float]:
    """R^2 and slope of y on x, and the lower end of the 95 % interval of R^2.

    The interval is Fisher's for the correlation (atanh r +- 1.96 / sqrt(P - 3)), squared; 0 where it contains 0.
    """
    if len(x) < 4 or float(x.std()) == 0 or float(y.std()) == 0:
        return 0.0, 0.0, 0.0
    r = float(np.corrcoef(x, y)[0, 1])
    slope = r * float(y.std()) / float(x.std())
    bounded = min(max(abs(r), 0.0), 1 - 1e-12)
    low = math.tanh(max(math.atanh(bounded) - Z95 / math.sqrt(len(x) - 3), 0.0))
    return r * r, slope, low * low


def t_interval(values: Array) -> Estimate:
    """Mean of a small sample; the error is widened so that ``1.96 * error`` is Student's interval."""
    from scipy.stats import t

    plain = clustered(values)
    if plain.num < 2:
        return plain
    return Estimate(plain.mean, plain.error * float(t.ppf(0.975, plain.num - 1)) / Z95, plain.num)
