"""Minimum detectable effects: how small a true difference an evaluation of this size would still have found.

Print one beside every difference: a result that is not significant says little where the detectable effect is large.
"""

from __future__ import annotations

import math

import numpy as np
import scipy

from preftune.errors import ConfigError, DataError
from preftune.stats.rows import check_level, normal_quantile


def detectable_difference(
    num_pairs: int, standard_deviation: float, *, power: float = 0.8, level: float = 0.95
) -> float:
    """Smallest true mean difference that a two-sided paired t-test finds with the given power.

    For many pairs this is ``(z_{1-alpha/2} + z_power) * standard_deviation / sqrt(num_pairs)``; for few, the quantiles
    of the noncentral t distribution replace the normal ones, which matters for a handful of seeds.

    Args:
        num_pairs: Independent pairs (or groups of them).
        standard_deviation: Of the differences.
        power: Chance of finding it.
        level: One minus the two-sided significance level.

    Returns:
        The difference, in the unit of `standard_deviation`.

    Raises:
        DataError: Fewer than two pairs, or a negative deviation.

    Source:
        Cohen (1988), Statistical Power Analysis, section 2.3; for evaluations Miller (2024), arXiv:2411.00640, sec. 5.
    """
    _check(power, level)
    if num_pairs < 2:
        raise DataError("a spread needs two pairs at least", where="num_pairs", value=num_pairs, allowed="2 or more")
    if not standard_deviation >= 0:
        raise DataError("not a standard deviation", where="standard_deviation", value=standard_deviation)
    freedom = num_pairs - 1
    critical = float(scipy.stats.t.ppf(0.5 + level / 2, freedom))

    def shortfall(shift: float) -> float:
        # SciPy returns NaN for the far tail where it is too small to compute, that is 0.
        wrong_side = float(np.nan_to_num(scipy.stats.nct.cdf(-critical, freedom, shift)))
        return power - float(scipy.stats.nct.sf(critical, freedom, shift)) - wrong_side

    upper = critical + 1.0
    while shortfall(upper) > 0:
        upper *= 2
    shift = float(scipy.optimize.brentq(shortfall, 0.0, upper, xtol=1e-10))
    return shift * standard_deviation / math.sqrt(num_pairs)


def detectable_from_error(standard_error: float, *, power: float = 0.8, level: float = 0.95) -> float:
    """Smallest true difference found with the given power, from the standard error of the difference.

    ``(z_{1-alpha/2} + z_power) * standard_error``: 2.80 standard errors for 95 % and power 0.8. With the error of a
    clustered bootstrap it holds for clustered data.

    Args:
        standard_error: Of the difference.
        power: Chance of finding it.
        level: One minus the two-sided significance level.

    Returns:
        The difference, in the unit of `standard_error`.
    """
    _check(power, level)
    return (normal_quantile(0.5 + level / 2) + normal_quantile(power)) * standard_error


def detectable_proportion(
    num_first: int, num_second: int, baseline: float, *, power: float = 0.8, level: float = 0.95
) -> float:
    """Smallest rise of a proportion above `baseline` that two independent samples show with the given power.

    In the arcsine scale ``h = (z_{1-alpha/2} + z_power) * sqrt(1/n1 + 1/n2)``, carried back to a proportion.

    Args:
        num_first: Trials of the first sample.
        num_second: Trials of the second sample.
        baseline: True proportion of the first.
        power: Chance of finding the rise.
        level: One minus the two-sided significance level.

    Returns:
        The rise; infinite where even a proportion of 1 would not be found.

    Raises:
        DataError: Sizes or baseline out of range.

    Source:
        Cohen (1988), Statistical Power Analysis, section 6.2.
    """
    _check(power, level)
    if num_first < 1 or num_second < 1 or not 0 <= baseline <= 1:
        raise DataError(
            "impossible samples",
            where="num_first, num_second, baseline",
            value=(num_first, num_second, baseline),
            allowed="sizes of 1 or more, a proportion",
        )
    step = detectable_from_error(math.sqrt(1 / num_first + 1 / num_second), power=power, level=level)
    angle = math.asin(math.sqrt(baseline)) + step / 2
    return math.inf if angle > math.pi / 2 else math.sin(angle) ** 2 - baseline


def detectable_paired_proportion(
    num_pairs: int, discordant_share: float, *, power: float = 0.8, level: float = 0.95
) -> float:
    """Smallest difference of two proportions on the same rows that McNemar's test finds with the given power.

    Solves ``d * sqrt(n) = z_{1-alpha/2} * sqrt(s) + z_power * sqrt(s - d^2)`` for the difference d, with s the share of
    discordant pairs.

    Args:
        num_pairs: Rows judged under both conditions.
        discordant_share: Share of rows on which the two disagree.
        power: Chance of finding the difference.
        level: One minus the two-sided significance level.

    Returns:
        The difference; infinite where it would exceed the discordant share, which it cannot.

    Raises:
        DataError: Size or share out of range.

    Source:
        Connor (1987), Biometrics 43, 207-211.
    """
    _check(power, level)
    if num_pairs < 1 or not 0 < discordant_share <= 1:
        raise DataError(
            "impossible sample",
            where="num_pairs, discordant_share",
            value=(num_pairs, discordant_share),
            allowed="1 or more pairs, a share above 0 and up to 1",
        )
    z_level, z_power = normal_quantile(0.5 + level / 2), normal_quantile(power)

    def shortfall(difference: float) -> float:
        spread = math.sqrt(max(0.0, discordant_share - difference**2))
        return z_level * math.sqrt(discordant_share) + z_power * spread - difference * math.sqrt(num_pairs)

    # The difference is at most the discordant share: then every discordant row speaks for one side.
    if shortfall(discordant_share) > 0:
        return math.inf
    return float(scipy.optimize.brentq(shortfall, 0.0, discordant_share, xtol=1e-12))


def _check(power: float, level: float) -> None:
    check_level(level)
    if not 0.5 <= power < 1:
        raise ConfigError("not a useful power", where="power", value=power, allowed="0.5 up to 1, such as 0.8")
