"""Minimum detectable effects: against statsmodels' solver and simulated power."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
from scipy import integrate, special

from preftune.errors import ConfigError, DataError
from preftune.stats.power import (
    detectable_difference,
    detectable_from_error,
    detectable_paired_proportion,
    detectable_proportion,
)
from preftune.stats.significance import mcnemar


@pytest.mark.parametrize(
    ("num_pairs", "expected"),
    # statsmodels 0.14: TTestPower().solve_power(nobs=..., alpha=.05, power=.8)
    [(3, 3.264043552819638), (5, 1.6819970833232674), (30, 0.5292357045238948), (970, 0.09004264378552322)],
)
def test_difference_agrees_with_statsmodels(num_pairs: int, expected: float) -> None:
    assert detectable_difference(num_pairs, 2.0) == pytest.approx(2 * expected, rel=1e-6)


@pytest.mark.parametrize(("num_pairs", "power", "level"), [(2, 0.99, 0.95), (5, 0.95, 0.99), (5, 0.5, 0.8)])
def test_difference_has_the_power_it_says_by_quadrature(num_pairs: int, power: float, level: float) -> None:
    freedom = num_pairs - 1
    critical = scipy.stats.t.ppf(0.5 + level / 2, freedom)
    shift = detectable_difference(num_pairs, 1.0, power=power, level=level) * math.sqrt(num_pairs)

    def rejected(spread: float) -> float:
        # T = (Z + shift) / (spread / sqrt(freedom)), with spread chi-distributed: no noncentral t needed.
        limit = critical * spread / math.sqrt(freedom)
        density = scipy.stats.chi.pdf(spread, freedom)
        return float(density * (special.ndtr(shift - limit) + special.ndtr(-shift - limit)))

    assert integrate.quad(rejected, 0, np.inf, epsabs=1e-12)[0] == pytest.approx(power, abs=1e-7)


def test_a_gap_of_three_points_needs_about_970_questions() -> None:
    # Miller (2024), section 5: standard deviation 1/3 of the question-level difference.
    assert detectable_difference(969, 1 / 3) == pytest.approx(0.03, abs=1e-4)
    assert detectable_from_error(1 / 3 / math.sqrt(969)) == pytest.approx(0.03, abs=1e-4)
    assert detectable_from_error(1.0) == pytest.approx(2.8015852, abs=1e-6)


@pytest.mark.parametrize(
    ("num_first", "num_second", "baseline", "effect"),
    # statsmodels 0.14: NormalIndPower().solve_power(nobs1=..., ratio=..., alpha=.05, power=.8), Cohen's h
    [(200, 200, 0.7, 0.2801568334667266), (50, 150, 0.5, 0.45749661609852177)],
)
def test_proportion_agrees_with_statsmodels(num_first: int, num_second: int, baseline: float, effect: float) -> None:
    rise = detectable_proportion(num_first, num_second, baseline)
    effect_size = 2 * math.asin(math.sqrt(baseline + rise)) - 2 * math.asin(math.sqrt(baseline))
    assert effect_size == pytest.approx(effect, rel=1e-4)


def test_proportion_that_no_sample_of_this_size_can_show() -> None:
    assert detectable_proportion(5, 5, 0.95) == math.inf
    assert detectable_paired_proportion(10, 0.05) == math.inf


def test_paired_proportion_has_the_power_it_says() -> None:
    num_pairs, discordant = 500, 0.2
    gap = detectable_paired_proportion(num_pairs, discordant)
    rng = np.random.default_rng(4)
    outcomes = rng.multinomial(num_pairs, [(discordant + gap) / 2, (discordant - gap) / 2, 1 - discordant], size=4000)
    found = np.mean([mcnemar(int(first), int(second)).mid_p < 0.05 for first, second, _ in outcomes])
    assert found == pytest.approx(0.8, abs=0.03)


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match="power: not a useful power"):
        detectable_from_error(1.0, power=0.2)
    with pytest.raises(DataError, match="two pairs"):
        detectable_difference(1, 1.0)
    with pytest.raises(DataError, match="standard_deviation"):
        detectable_difference(5, math.nan)
    with pytest.raises(DataError, match="impossible samples"):
        detectable_proportion(0, 5, 0.5)
    with pytest.raises(DataError, match="impossible sample"):
        detectable_paired_proportion(5, 0.0)
