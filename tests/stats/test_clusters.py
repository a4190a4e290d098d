"""Estimates against closed forms, SciPy, statsmodels and simulation."""

from __future__ import annotations

import importlib
import math

import numpy as np
import pytest
from scipy import stats

from preftune.stats.clusters import clustered, r_squared, separation_influence, t_interval


def test_without_clusters_it_is_the_usual_error() -> None:
    values = np.random.default_rng(0).normal(size=50)
    found = clustered(values)
    assert found.mean == pytest.approx(values.mean())
    assert found.error == pytest.approx(stats.sem(values))
    assert clustered(values, np.arange(50)).error == pytest.approx(stats.sem(values))


def test_clusters_agree_with_statsmodels() -> None:
    api = importlib.import_module("statsmodels.api")
    rng = np.random.default_rng(1)
    groups = rng.integers(0, 30, size=200)
    values = rng.normal(size=200) + rng.normal(size=30)[groups]
    fit = api.OLS(values, np.ones(200)).fit(cov_type="cluster", cov_kwds={"groups": groups, "use_correction": False})
    count = len(np.unique(groups))
    assert clustered(values, groups).error == pytest.approx(float(fit.bse[0]) * math.sqrt(count / (count - 1)))


def test_clusters_widen_the_interval_to_what_repetition_is_worth() -> None:
    """Every value three times over is no more evidence than once."""
    values = np.random.default_rng(2).normal(size=40)
    once, thrice = clustered(values), clustered(np.repeat(values, 3), np.repeat(np.arange(40), 3))
    assert thrice.error == pytest.approx(once.error)


def test_values_that_are_not_there_are_left_out() -> None:
    values = np.array([1.0, np.nan, 3.0])
    assert clustered(values).mean == 2.0
    assert clustered(values).num == 2
    assert math.isnan(clustered(np.array([np.nan])).mean)


def test_small_samples_get_students_interval() -> None:
    values = np.array([1.0, 2.0, 4.0])
    low, high = stats.t.interval(0.95, 2, loc=values.mean(), scale=stats.sem(values))
    found = t_interval(values)
    assert (found.low(1.959963984540054), found.high(1.959963984540054)) == pytest.approx((low, high))


def test_influence_gives_the_spread_of_the_separation() -> None:
    """Delta method against 4000 simulated data sets."""
    rng = np.random.default_rng(3)
    samples = rng.normal(0.4, 1.0, size=(4000, 200))
    found = samples.mean(1) / samples.std(1)
    d, influence = separation_influence(samples[0])
    assert d == pytest.approx(samples[0].mean() / samples[0].std())
    assert influence.std() / math.sqrt(200) == pytest.approx(found.std(), rel=0.1)
    assert separation_influence(np.zeros(5))[0] == 0.0


def test_r_squared_is_scipys() -> None:
    rng = np.random.default_rng(4)
    x = rng.normal(size=60)
    y = 0.8 * x + rng.normal(size=60)
    expected = stats.linregress(x, y)
    r2, slope, low = r_squared(x, y)
    assert (r2, slope) == pytest.approx((expected.rvalue**2, expected.slope))
    interval = stats.pearsonr(x, y).confidence_interval(0.95)
    assert low == pytest.approx(interval.low**2, rel=1e-6)
    assert r_squared(np.ones(9), np.arange(9.0)) == (0.0, 0.0, 0.0)
