"""Intervals over few groups: independent code, hand values, coverage; tests and power against statsmodels."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import scipy.special
import scipy.stats

from benchmarks import coverage
from preftune.errors import DataError
from preftune.evaluation.comparison import compare
from preftune.evaluation.metrics import Summary
from preftune.stats.intervals import bootstrap_mean, paired_proportion_interval, proportion_interval, wilson_interval
from preftune.stats.power import detectable_difference, detectable_proportion
from preftune.stats.significance import mcnemar

RESULT = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "evaluation" / "coverage.json"


def test_studentised_interval_against_a_slow_loop() -> None:
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(15), rng.integers(1, 5, size=15))
    values = rng.exponential(size=15)[groups] + 0.2 * rng.normal(size=len(groups))
    by_group = [values[groups == group] for group in range(15)]

    def estimate(parts: list[Any]) -> tuple[float, float]:
        rows = np.concatenate(parts)
        mean = rows.mean()
        residuals = [float((part - mean).sum()) for part in parts]
        return float(mean), math.sqrt(len(parts) / (len(parts) - 1) * sum(r * r for r in residuals)) / len(rows)

    mean, error = estimate(by_group)
    scaled = []
    for _ in range(6000):
        drawn = [by_group[i] for i in rng.integers(15, size=15)]
        other, spread = estimate(drawn)
        scaled.append((other - mean) / spread)
    low, high = mean - np.quantile(scaled, 0.975) * error, mean - np.quantile(scaled, 0.025) * error
    ours = bootstrap_mean(values, groups=groups.tolist(), method="student", num_resamples=20_000)
    assert ours.mean == pytest.approx(mean)
    assert ours.low == pytest.approx(low, abs=0.06 * (high - low))
    assert ours.high == pytest.approx(high, abs=0.06 * (high - low))


def test_studentised_interval_of_normal_rows_is_students() -> None:
    values = np.random.default_rng(1).normal(size=400)
    low, high = scipy.stats.t.interval(0.95, 399, values.mean(), scipy.stats.sem(values))
    ours = bootstrap_mean(values, method="student", num_resamples=20_000)
    assert (ours.low, ours.high) == pytest.approx((low, high), abs=0.05 * (high - low))
    assert bootstrap_mean(values + 7, method="student").low == pytest.approx(
        bootstrap_mean(values, method="student").low + 7
    )


def test_constant_rows_and_rare_differences() -> None:
    flat = bootstrap_mean([0.3] * 30, method="student")
    assert (flat.low, flat.high) == pytest.approx((0.3, 0.3))
    rare = bootstrap_mean([1.0] + [0.0] * 29, method="student")
    assert math.isfinite(rare.low)
    assert math.isfinite(rare.high)


def test_proportions_of_single_rows_are_wilsons() -> None:
    rows = [1.0] * 37 + [0.0] * 13
    ours, plain = proportion_interval(rows), wilson_interval(37, 50)
    assert (ours.low, ours.high) == (plain.low, plain.high)


def test_proportions_over_groups_by_hand() -> None:
    # Groups of two that always agree hold as much as one row each, up to the two quantiles and G / (G - 1).
    rows, groups = [1.0] * 60 + [0.0] * 20, [n // 2 for n in range(80)]
    ours = proportion_interval(rows, groups=groups)
    t = scipy.stats.t.ppf(0.975, 39)
    error = math.sqrt(40 / 39 * sum((2 * (r - 0.75)) ** 2 for r in rows[::2])) / 80
    n = 0.75 * 0.25 / error**2
    ends = [
        ((0.75 + t * t / (2 * n)) + s * t * math.sqrt(0.1875 / n + t * t / (4 * n * n))) / (1 + t * t / n)
        for s in (-1, 1)
    ]
    assert (ours.low, ours.high) == pytest.approx(ends, rel=1e-12)
    assert ours.high - ours.low > 1.3 * (wilson_interval(60, 80).high - wilson_interval(60, 80).low)


def test_all_right_still_has_a_width() -> None:
    ours = proportion_interval([1.0] * 60, groups=[n // 3 for n in range(60)])
    assert ours.high == 1.0
    assert 0.75 < ours.low < 0.95
    with pytest.raises(DataError, match="not an outcome"):
        proportion_interval([0.5, 1.5])


def rows_of(better: int, worse: int, total: int) -> list[float]:
    return [1.0] * better + [-1.0] * worse + [0.0] * (total - better - worse)


def score(better: int, worse: int, total: int, true: float) -> float:
    """The score statistic of a true difference, with the likelihood's maximum searched numerically."""

    def cost(share: float) -> float:
        # Only the first right, only the second right, no change: share, share + true, the rest.
        parts = np.array([share, share + true, 1 - 2 * share - true])
        return -float(scipy.special.xlogy([worse, better, total - better - worse], np.maximum(parts, 1e-300)).sum())

    bounds = (max(0.0, -true), (1 - true) / 2)
    share = scipy.optimize.minimize_scalar(cost, bounds=bounds, method="bounded", options={"xatol": 1e-13}).x
    variance = (2 * share + true - true**2) / total
    return float(((better - worse) / total - true) / math.sqrt(variance))


@pytest.mark.parametrize("counts", [(9, 3, 32), (2, 0, 4), (1, 7, 50), (0, 0, 10), (30, 0, 40), (4, 4, 8)])
def test_paired_proportions_end_where_the_score_test_does(counts: tuple[int, int, int]) -> None:
    found = paired_proportion_interval(rows_of(*counts))
    assert score(*counts, found.low) == pytest.approx(1.959964, abs=1e-4)
    assert score(*counts, found.high) == pytest.approx(-1.959964, abs=1e-4)
    swapped = paired_proportion_interval(rows_of(counts[1], counts[0], counts[2]))
    assert (swapped.low, swapped.high) == pytest.approx((-found.high, -found.low), abs=1e-9)


def test_paired_proportions_without_spread_are_not_certain() -> None:
    # All rows changed for the better: with n rows the lower end solves n (1 - d)^2 = z^2 (1 - d^2) by hand.
    found, z2 = paired_proportion_interval(rows_of(4, 0, 4)), 1.959964**2
    assert found.low == pytest.approx((4 - z2) / (4 + z2), abs=1e-6)
    assert found.high == 1.0
    # No row changed: n d^2 = z^2 |d| (1 - |d|).
    still = paired_proportion_interval(rows_of(0, 0, 10))
    assert (still.low, still.high) == pytest.approx((-z2 / (10 + z2), z2 / (10 + z2)), abs=1e-6)
    with pytest.raises(DataError, match="no difference of two outcomes"):
        paired_proportion_interval([0.5, 0.0])
    # Of rows that repeat within their prompt each prompt counts once, with Student's quantile.
    twice = paired_proportion_interval(rows_of(8, 0, 8), groups=[n // 2 for n in range(8)])
    t2 = scipy.stats.t.ppf(0.975, 3) ** 2
    assert twice.low == pytest.approx((4 - t2) / (4 + t2), abs=1e-6)


@pytest.mark.parametrize(("better", "worse", "num"), [(0.2, 0.1, 50), (0.9, 0.0, 50), (0.05, 0.02, 100)])
def test_paired_proportions_cover(better: float, worse: float, num: int) -> None:
    rng = np.random.default_rng(5)
    drawn = rng.multinomial(num, [better, worse, 1 - better - worse], size=1500)
    ends = [paired_proportion_interval(rows_of(b, w, num)) for b, w, _ in drawn]
    share = np.mean([found.low <= better - worse <= found.high for found in ends])
    assert 0.925 <= share <= 0.985


@pytest.mark.thin(1)
@pytest.mark.parametrize(("scenario", "num_groups"), [("margins", 20), ("changed", 20), ("outcomes 0.6", 50)])
def test_covers(scenario: str, num_groups: int) -> None:
    cells = coverage.measure(scenario, num_groups, 1200, 400)
    # The method that evaluations use stands last; 1200 draws scatter by 0.6 points.
    assert cells[-1]["method"] in ("student", "wilson groups", "tango groups")
    assert coverage.PROMISE[0] <= cells[-1]["coverage"] <= coverage.PROMISE[1]


def test_the_stored_table_keeps_the_promise() -> None:
    cells = json.loads(RESULT.read_text(encoding="utf-8"))["cells"]
    least = {"student": 20, "wilson groups": 50, "tango groups": 20}
    promised = [cell for cell in cells if cell["groups"] >= least.get(cell["method"], 10**6)]
    assert len(promised) >= 24
    for cell in promised:
        assert coverage.PROMISE[0] <= cell["coverage"] <= coverage.PROMISE[1], cell


@pytest.mark.parametrize("table", [((40, 6), (17, 37)), ((5, 12), (3, 9)), ((90, 1), (7, 2))])
def test_mcnemar_agrees_with_statsmodels(table: tuple[tuple[int, int], tuple[int, int]]) -> None:
    theirs = importlib.import_module("statsmodels.stats.contingency_tables").mcnemar(table, exact=True)
    assert mcnemar(table[0][1], table[1][0]).exact_p == pytest.approx(theirs.pvalue, rel=1e-12)


@pytest.mark.parametrize("num", [5, 30, 970])
@pytest.mark.parametrize("power", [0.8, 0.95])
def test_detectable_difference_agrees_with_statsmodels(num: int, power: float) -> None:
    solver = importlib.import_module("statsmodels.stats.power").TTestPower()
    theirs = float(solver.solve_power(nobs=num, alpha=0.05, power=power, alternative="two-sided"))
    assert detectable_difference(num, 2.5, power=power) == pytest.approx(2.5 * theirs, rel=1e-4)


def test_detectable_proportion_agrees_with_statsmodels() -> None:
    solver = importlib.import_module("statsmodels.stats.power").NormalIndPower()
    size = float(solver.solve_power(nobs1=400, ratio=1.0, alpha=0.05, power=0.8, alternative="two-sided"))
    expected = math.sin(math.asin(math.sqrt(0.6)) + size / 2) ** 2 - 0.6
    assert detectable_proportion(400, 400, 0.6) == pytest.approx(expected, abs=1e-4)


def pair_of_checkpoints(num: int, shift: float) -> tuple[Any, Any, list[int]]:
    rng = np.random.default_rng(4)
    base = rng.normal(0.3, 1.0, size=(num, 2))
    noise = rng.normal(0, 0.3, size=(num, 2))
    return base + noise + [shift, 0.0], base, (np.arange(num) // 2).tolist()


def test_comparison_by_hand() -> None:
    ours, theirs, groups = pair_of_checkpoints(300, 0.4)
    found = compare(ours, theirs, groups, Summary())
    right, other = ours[:, 0] > ours[:, 1], theirs[:, 0] > theirs[:, 1]
    assert found["mcnemar"]["only_model"] == sum(bool(a and not b) for a, b in zip(right, other, strict=True))
    assert found["accuracy"]["difference"]["mean"] == pytest.approx(right.mean() - other.mean())
    margins = (ours[:, 0] - ours[:, 1]) - (theirs[:, 0] - theirs[:, 1])
    per_prompt = margins.reshape(-1, 2).mean(1)
    assert found["margin"]["difference"]["mean"] == pytest.approx(per_prompt.mean())
    # Groups of equal size: the clustered error is that of the groups' means.
    expected = detectable_difference(150, per_prompt.std(ddof=1))
    assert found["margin"]["detectable"] == pytest.approx(expected, rel=1e-9)
    assert found["margin"]["difference"]["low"] > 0
    assert "the model ranks more pairs right" in found["conclusion"]


@pytest.mark.parametrize("num", [2, 4, 6])
def test_a_handful_of_pairs_that_all_changed_is_no_certainty(num: int) -> None:
    right, wrong = np.array([[1.0, 0.0]] * num), np.array([[0.0, 1.0]] * num)
    found = compare(right, wrong, list(range(num)), Summary())
    accuracy = found["accuracy"]
    assert accuracy["difference"]["mean"] == accuracy["difference"]["high"] == 1.0
    assert accuracy["difference"]["low"] < 0.4
    # Nothing scatters, so nothing says how small a difference would have been found.
    assert accuracy["detectable"] is None
    assert found["margin"]["detectable"] is None
    # Two-sided binomial: 0.5, 0.125 and 0.031; mid-p is half of that.
    assert found["mcnemar"]["mid_p"] == pytest.approx(0.5**num)
    assert ("excludes 0" in found["conclusion"] and "no difference" not in found["conclusion"]) == (num == 6)
    if num == 4:
        assert accuracy["difference"]["low"] > 0
        assert "McNemar's test does not agree" in found["conclusion"]


def test_shares_that_are_all_alike_have_an_interval() -> None:
    groups = list(range(4))
    nothing = Summary().share([0.0] * 4, groups)
    wilson = wilson_interval(0, 4)
    assert (nothing["mean"], nothing["low"], nothing["high"]) == (0.0, 0.0, wilson.high)
    shares = [0.3, 0.4, 0.35, 0.3]
    assert Summary().share(shares, groups) == Summary().number(shares, groups)
    # Student's interval knows no bounds, and a share has two.
    near = [0.0, 0.1, 0.05, 0.0]
    assert Summary().number(near, groups)["low"] < 0
    assert Summary().share(near, groups) == {**Summary().number(near, groups), "low": 0.0}


def test_equal_checkpoints() -> None:
    ours, theirs, groups = pair_of_checkpoints(100, 0.0)
    assert compare(theirs, theirs, groups, Summary())["conclusion"] == "both rank every pair alike"
    assert "would most likely not have been found" in compare(ours, theirs, groups, Summary())["conclusion"]
