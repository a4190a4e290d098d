"""Intervals and tests: against SciPy and statsmodels, hand values, and coverage in simulation."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.stats

from preftune.errors import ConfigError, DataError
from preftune.stats.intervals import (
    Interval,
    Method,
    bootstrap_mean,
    bootstrap_ratio,
    paired_difference,
    wilson_interval,
)
from preftune.stats.significance import holm, mcnemar

Rows = tuple[np.ndarray[Any, np.dtype[np.float64]], list[int] | None]
Draw = Callable[[np.random.Generator], Rows]


def close_to_interval(ours: Interval, low: float, high: float, share: float = 0.04) -> bool:
    """Both ends within a share of the width: two Monte Carlo estimates never agree exactly."""
    width = high - low
    return abs(ours.low - low) < share * width and abs(ours.high - high) < share * width


@pytest.mark.parametrize(("method", "scipy_name"), [("percentile", "percentile"), ("bca", "BCa")])
def test_agrees_with_scipy_on_skewed_rows(method: Method, scipy_name: str) -> None:
    values = np.random.default_rng(3).lognormal(size=40)
    ours = bootstrap_mean(values, method=method, num_resamples=40_000)
    theirs = scipy.stats.bootstrap((values,), np.mean, n_resamples=40_000, method=scipy_name, rng=1)
    assert close_to_interval(ours, theirs.confidence_interval.low, theirs.confidence_interval.high)
    assert ours.standard_error == pytest.approx(theirs.standard_error, rel=0.03)
    assert ours.mean == pytest.approx(values.mean(), abs=1e-12)


def test_bca_differs_from_percentile_on_skewed_rows() -> None:
    values = np.random.default_rng(3).lognormal(size=40)
    plain, corrected = (bootstrap_mean(values, method=method) for method in ("percentile", "bca"))
    assert corrected.low > plain.low
    assert corrected.high > plain.high + 0.05 * (plain.high - plain.low)


@pytest.mark.parametrize(("method", "scipy_name"), [("percentile", "percentile"), ("bca", "BCa")])
def test_clusters_agree_with_scipy_resampling_their_sums(method: Method, scipy_name: str) -> None:
    rng = np.random.default_rng(5)
    sizes = rng.integers(1, 9, size=50)
    groups = np.repeat(np.arange(50), sizes)
    values = rng.gamma(2.0, size=50)[groups] + rng.normal(size=len(groups))
    shuffle = rng.permutation(len(groups))
    ours = bootstrap_mean(
        values[shuffle], groups=[f"p{group}" for group in groups[shuffle]], method=method, num_resamples=40_000
    )
    sums = np.array([values[groups == group].sum() for group in range(50)])
    theirs = scipy.stats.bootstrap(
        (sums, sizes.astype(float)),
        lambda top, bottom, axis: top.sum(axis=axis) / bottom.sum(axis=axis),
        paired=True,
        vectorized=True,
        n_resamples=40_000,
        method=scipy_name,
        rng=1,
    )
    assert close_to_interval(ours, theirs.confidence_interval.low, theirs.confidence_interval.high)
    assert (ours.num_values, ours.num_groups) == (len(groups), 50)


def test_yes_no_data_take_the_short_cut_with_the_same_distribution() -> None:
    values = np.array([1.0] * 70 + [0.0] * 30)
    ours = bootstrap_mean(values, method="percentile", num_resamples=40_000)
    # Resampled means of 100 yes/no rows are binomial: the exact quantiles are known.
    low, high = scipy.stats.binom.ppf([0.025, 0.975], 100, 0.7) / 100
    assert ours.low == pytest.approx(low, abs=0.0101)
    assert ours.high == pytest.approx(high, abs=0.0101)
    assert ours.standard_error == pytest.approx(math.sqrt(0.7 * 0.3 / 100), rel=0.02)


def coverage(draw: Draw, true_mean: float, method: Method, num_simulations: int = 2500) -> float:
    hits = 0
    for simulation in range(num_simulations):
        values, groups = draw(np.random.default_rng([77, simulation]))
        found = bootstrap_mean(values, groups=groups, num_resamples=600, method=method, seed=simulation)
        hits += found.low <= true_mean <= found.high
    return hits / num_simulations


@pytest.mark.thin(1)
@pytest.mark.parametrize("method", ["percentile", "bca"])
def test_covers_independent_rows(method: Method) -> None:
    assert coverage(lambda rng: (rng.exponential(size=200), None), 1.0, method=method) == pytest.approx(0.95, abs=0.02)


@pytest.mark.thin(1)
@pytest.mark.parametrize("method", ["percentile", "bca"])
def test_covers_proportions(method: Method) -> None:
    def draw(rng: np.random.Generator) -> Rows:
        return (rng.random(300) < 0.8).astype(float), None

    assert coverage(draw, 0.8, method=method) == pytest.approx(0.95, abs=0.02)


def clustered_rows(rng: np.random.Generator) -> Rows:
    groups = np.repeat(np.arange(80), rng.integers(1, 7, size=80))
    return 0.5 + rng.normal(size=80)[groups] + 0.5 * rng.normal(size=len(groups)), groups.tolist()


@pytest.mark.thin(1)
@pytest.mark.parametrize("method", ["percentile", "bca"])
def test_covers_clustered_rows(method: Method) -> None:
    assert coverage(clustered_rows, 0.5, method=method) == pytest.approx(0.95, abs=0.02)


def test_without_groups_clustered_rows_are_not_covered() -> None:
    blind = coverage(lambda rng: (clustered_rows(rng)[0], None), 0.5, "percentile", num_simulations=500)
    assert blind < 0.85


def test_wilson_covers() -> None:
    rng = np.random.default_rng(9)
    draws = rng.binomial(400, 0.9, size=20_000)
    found = {count: wilson_interval(count, 400) for count in set(draws.tolist())}
    hits = np.mean([found[count].low <= 0.9 <= found[count].high for count in draws.tolist()])
    assert hits == pytest.approx(0.95, abs=0.02)


@pytest.mark.parametrize(
    ("successes", "trials", "level"), [(37, 50, 0.95), (0, 20, 0.95), (20, 20, 0.9), (490, 500, 0.99)]
)
def test_wilson_agrees_with_scipy(successes: int, trials: int, level: float) -> None:
    ours = wilson_interval(successes, trials, level=level)
    theirs = scipy.stats.binomtest(successes, trials).proportion_ci(level, method="wilson")
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


def test_wilson_agrees_with_statsmodels() -> None:
    # statsmodels 0.14 proportion_confint(37, 50, method="wilson")
    found = wilson_interval(37, 50)
    assert (found.low, found.high) == pytest.approx((0.6044684273515116, 0.841284725064476), abs=1e-12)
    assert wilson_interval(0, 20).low == 0.0
    assert wilson_interval(20, 20).high == 1.0


@pytest.mark.parametrize(("first", "second"), [(6, 17), (17, 6), (0, 5), (1, 1), (40, 61), (500, 420)])
def test_mcnemar_agrees_with_the_binomial_test(first: int, second: int) -> None:
    found = mcnemar(first, second)
    assert found.exact_p == pytest.approx(scipy.stats.binomtest(first, first + second).pvalue, rel=1e-10)
    # Mid-p by its definition: outcomes rarer than the observed count fully, equally rare ones by half.
    weights = scipy.stats.binom.pmf(np.arange(first + second + 1), first + second, 0.5)
    seen = weights[first]
    mid = weights[weights < seen * (1 - 1e-9)].sum() + 0.5 * weights[np.isclose(weights, seen, rtol=1e-9)].sum()
    assert found.mid_p == pytest.approx(mid, rel=1e-9)


def test_mcnemar_published_and_degenerate_values() -> None:
    # statsmodels 0.14 mcnemar([[10, 6], [17, 9]], exact=True)
    assert mcnemar(6, 17).exact_p == pytest.approx(0.03468966484069824, rel=1e-12)
    # Fagerland et al. (2013), airway hyper-responsiveness: counts 1 and 7 give exact .0703 and mid-p .0391.
    assert mcnemar(1, 7).exact_p == pytest.approx(0.0703, abs=5e-5)
    assert mcnemar(1, 7).mid_p == pytest.approx(0.0391, abs=5e-5)
    assert mcnemar(0, 0) == mcnemar(0, 0).__class__(0, 0, 1.0, 1.0)
    with pytest.raises(DataError, match="negative"):
        mcnemar(-1, 3)


def test_holm() -> None:
    # By hand: sorted .005*5, .01*4, .03*3, .04*2 lifted to .09, .5; statsmodels multipletests gives the same.
    assert holm([0.01, 0.04, 0.03, 0.005, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.025, 0.5], abs=1e-15)
    assert holm([0.9, 0.8]) == pytest.approx([1.0, 1.0])
    assert len(holm([])) == 0
    with pytest.raises(DataError, match=r"\[0, 1\]"):
        holm([0.2, 1.2])


def test_paired_difference_is_the_bootstrap_of_differences() -> None:
    rng = np.random.default_rng(2)
    level = rng.normal(size=60)
    first, second = level + rng.normal(scale=0.1, size=60), level + 0.2 + rng.normal(scale=0.1, size=60)
    found = paired_difference(first, second)
    assert found.mean == pytest.approx((second - first).mean())
    assert 0 < found.low < 0.2 < found.high
    # The common part cancels: unpaired, the spread of `level` would hide the difference.
    assert found.standard_error == pytest.approx((second - first).std(ddof=1) / math.sqrt(60), rel=0.05)
    with pytest.raises(DataError, match="differ in number"):
        paired_difference([1.0, 2.0], [1.0])


def test_ratio_weights_rows_by_their_denominator() -> None:
    found = bootstrap_ratio([2.0, 9.0, 4.0], [1.0, 3.0, 2.0])
    assert found.mean == pytest.approx(15 / 6)
    with pytest.raises(DataError, match="not positive"):
        bootstrap_ratio([1.0, 2.0], [1.0, 0.0])


def test_constant_rows_give_a_point() -> None:
    found = bootstrap_mean([0.3] * 50)
    assert (found.low, found.high, found.standard_error) == pytest.approx((0.3, 0.3, 0.0), abs=1e-12)


def test_seed_decides() -> None:
    values = np.random.default_rng(0).normal(size=100)
    assert bootstrap_mean(values, seed=4) == bootstrap_mean(values, seed=4)
    assert bootstrap_mean(values, seed=4) != bootstrap_mean(values, seed=5)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"values": [1.0, math.nan]}, DataError, "values, row 1: not a finite number"),
        ({"values": []}, DataError, "a list of numbers is needed"),
        ({"values": [1.0]}, DataError, "two independent groups"),
        ({"values": [1.0, 2.0], "groups": ["a", "a"]}, DataError, "two independent groups"),
        ({"values": [1.0, 2.0], "groups": ["a"]}, DataError, "one group id per row"),
        ({"values": [1.0, 2.0], "level": 95}, ConfigError, "level: not a confidence level"),
        ({"values": [1.0, 2.0], "method": "t"}, ConfigError, "allowed: percentile, bca"),
        ({"values": [1.0, 2.0], "num_resamples": 10}, ConfigError, "100 or more"),
    ],
)
def test_bad_input_is_refused_in_one_line(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        bootstrap_mean(**arguments)


def test_quick_for_a_hundred_thousand_rows() -> None:
    rng = np.random.default_rng(0)
    started = time.process_time()
    bootstrap_mean((rng.random(100_000) < 0.7).astype(float))
    yes_no = time.process_time() - started
    bootstrap_mean(rng.normal(size=100_000), groups=rng.integers(20_000, size=100_000).tolist())
    clustered = time.process_time() - started - yes_no
    # Processor seconds, with room for a slow machine; measured 0.03 and 0.8.
    assert yes_no < 1
    assert clustered < 10
