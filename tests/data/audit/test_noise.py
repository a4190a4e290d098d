"""The noise estimate against known truth: simulated judges, the review world, and what cannot be told."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from benchmarks.audit import world_pairs
from scipy import stats

from preftune.data import DataOptions
from preftune.data.audit.flip_rate import fit_lapse
from preftune.data.audit.judge import cross_fitted, differences
from preftune.data.audit.noise import estimate_noise, repeated_pairs
from preftune.data.audit.proportions import share_of
from preftune.data.audit.rows import read_rows
from tests.data.audit.conftest import clean_rows


def simulated(num_pairs: int, noise: float, seed: int, slope: float = 2.5, shape: Any = stats.norm) -> Any:
    """Scores of a judge whose own mistakes die out with its certainty, against labels with known turns."""
    rng = np.random.default_rng(seed)
    sure = np.abs(rng.normal(size=num_pairs))
    right = rng.random(num_pairs) < shape.cdf(slope * sure)
    turned = rng.random(num_pairs) < noise
    return np.where(right != turned, sure, -sure), turned


def read(rows: list[dict[str, str]]) -> Any:
    return read_rows(rows, DataOptions())


@pytest.mark.parametrize("noise", [0.0, 0.1, 0.25, 0.4])
@pytest.mark.parametrize("shape", [stats.norm, stats.logistic])
def test_a_simulated_judge_gives_its_noise_away(noise: float, shape: Any) -> None:
    scores, turned = simulated(4000, noise, seed=1, shape=shape)
    fit = fit_lapse(scores, np.arange(4000), seed=0)
    assert abs(fit.estimate - turned.mean()) < 0.06
    assert fit.low - 0.005 <= turned.mean() <= fit.high + 0.005
    assert fit.ceiling >= turned.mean() - 0.02
    assert fit.width < (0.2 if noise < 0.4 else 0.45)


@pytest.mark.slow
def test_the_interval_covers_in_repeated_samples() -> None:
    covered = []
    for seed in range(40):
        scores, _ = simulated(600, 0.2, seed, shape=stats.logistic, slope=3.0)
        fit = fit_lapse(scores, np.arange(600), num_resamples=60, seed=seed)
        covered.append(fit.low <= 0.2 <= fit.high)
    # 95 % nominal: fewer than 34 of 40 would happen once in a thousand times.
    assert sum(covered) >= 34


@pytest.mark.slow
def test_whichever_of_several_judges_is_quoted_holds() -> None:
    """Three judges with slips of their own look at the same labels; the one with the shortest interval is quoted."""
    quoted: dict[float, int] = {0.95: 0, 1 - 0.05 / 3: 0}
    for seed in range(60):
        rng = np.random.default_rng([9, seed])
        turned = rng.random(300) < 0.2
        sure = np.abs(rng.normal(size=(3, 300)))
        right = rng.random((3, 300)) < stats.norm.cdf(2.5 * sure)
        scores = np.where(right != turned, sure, -sure)
        for level in quoted:
            fits = [fit_lapse(each, np.arange(300), num_resamples=20, seed=seed, level=level) for each in scores]
            best = min(fits, key=lambda fit: fit.width)
            quoted[level] += best.low <= 0.2 <= best.high
    # 95 % less twice the scatter of 60 draws, and never fewer than with the shortest of plain intervals.
    assert quoted[1 - 0.05 / 3] >= 54
    assert quoted[1 - 0.05 / 3] >= quoted[0.95]


@pytest.mark.parametrize("level", [0.8, 0.95, 0.98, 0.999])
def test_a_higher_level_is_a_longer_interval(level: float) -> None:
    scores, _ = simulated(500, 0.2, seed=12)
    plain, other = (fit_lapse(scores, np.arange(500), seed=0, level=each) for each in (0.5, level))
    assert other.estimate == plain.estimate
    assert other.low <= plain.low < plain.high <= other.high
    assert other.width > plain.width


def test_a_judge_that_sees_nothing_cannot_tell() -> None:
    rng = np.random.default_rng(0)
    fit = fit_lapse(rng.normal(size=2000), np.arange(2000), seed=0)
    assert fit.agreement == pytest.approx(0.5, abs=0.05)
    assert (fit.low, fit.high) == (0.0, 0.5)


def test_agreement_alone_does_not_decide() -> None:
    """Two judges that agree with the labels equally often, one good with noisy labels, one weak with clean ones."""
    good, _ = simulated(6000, 0.25, seed=3, slope=8.0)
    weak, _ = simulated(6000, 0.0, seed=4, slope=0.95)
    fits = [fit_lapse(scores, np.arange(6000), seed=0) for scores in (good, weak)]
    assert fits[0].agreement == pytest.approx(fits[1].agreement, abs=0.02)
    assert fits[0].low > 0.15
    assert fits[1].low == 0.0
    assert fits[0].accuracy > fits[1].accuracy + 0.1


def test_scale_and_order_do_not_matter() -> None:
    scores, _ = simulated(500, 0.2, seed=2)
    groups = np.arange(500)
    first, scaled = fit_lapse(scores, groups, seed=1), fit_lapse(1e3 * scores, groups, seed=1)
    assert (first.estimate, first.low, first.high) == pytest.approx((scaled.estimate, scaled.low, scaled.high))
    order = np.random.default_rng(0).permutation(500)
    mixed = fit_lapse(scores[order], groups[order], seed=1)
    assert mixed.estimate == pytest.approx(first.estimate, abs=0.02)


def test_rows_of_one_prompt_count_once() -> None:
    scores, _ = simulated(400, 0.2, seed=6)
    alone = fit_lapse(scores, np.arange(400), seed=0)
    copied = fit_lapse(np.repeat(scores, 5), np.repeat(np.arange(400), 5), seed=0)
    careless = fit_lapse(np.repeat(scores, 5), np.arange(2000), seed=0)
    assert copied.width > 1.4 * careless.width
    assert copied.width == pytest.approx(alone.width, rel=0.35)


def test_the_judge_is_not_asked_about_prompts_it_knows() -> None:
    """A word that names the prompt gives its label away, to a judge that has seen the prompt."""
    rng = np.random.default_rng(0)
    rows = []
    for prompt in range(60):
        sides = [f" key{prompt} left{prompt}", f" key{prompt} right{prompt}"]
        better = int(rng.integers(2))
        rows += [{"prompt": f"p {prompt}", "chosen": sides[better], "rejected": sides[1 - better]}] * 2
    gaps = differences(*([row[name] for row in rows] for name in ("prompt", "chosen", "rejected")))
    prompts = np.repeat(np.arange(60), 2)
    apart = cross_fitted(gaps, prompts, num_repeats=2)
    leaked = cross_fitted(gaps, np.arange(120), num_repeats=2)
    assert apart is not None
    assert leaked is not None
    assert (leaked > 0).mean() > 0.8
    assert (apart > 0).mean() < 0.65
    assert cross_fitted(gaps[:12], prompts[:12]) is None


@pytest.mark.thin(1)
@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_the_review_world(noise: float) -> None:
    rows, turned = world_pairs(0, 1000, noise)
    finding, found = estimate_noise(read(rows), seed=0)
    fit = found["judges"]["features"]
    assert abs(fit["estimate"] - noise) < 0.1
    assert fit["low"] - 0.005 <= noise <= fit["high"] + 0.005
    assert found["num_pairs"] == 1000
    if noise == 0.0:
        assert (finding.severity, found["suspects"]) == ("ok", [])
        return
    suspects = [one["row"] for one in found["suspects"]]
    assert not suspects or np.mean([turned[row] for row in suspects]) > 0.8


def test_labels_by_coin_cannot_be_told() -> None:
    rows, _ = world_pairs(0, 400, 0.0, rule="coin")
    finding, found = estimate_noise(read(rows), seed=0)
    assert found["estimate"] is None
    assert not found["told"]
    assert "cannot be told" in finding.title
    assert found["high"] - found["low"] > 0.2


def test_a_reference_that_knows_better_is_used() -> None:
    """Where words explain nothing, log-probs of a model that knows the preference tell the turned labels."""
    rng = np.random.default_rng(5)
    rows = clean_rows(800, seed=4)
    margins = np.abs(rng.normal(size=800)) * 4 + 0.2
    turned = rng.random(800) < 0.2
    margins[turned] *= -1
    margins[7] = np.nan
    both = np.stack([margins, margins / 10], axis=1)
    _, found = estimate_noise(read(rows), ref_margins=both, seed=0)
    assert "reference" in found["judge"]
    assert found["told"]
    assert found["estimate"] == pytest.approx(turned.mean(), abs=0.05)
    assert found["num_pairs"] == 799
    # One of three is quoted, the shortest: each has a third of the doubt.
    assert {name: round(one["level"], 6) for name, one in found["judges"].items()} == {
        "features": 0.983333,
        "reference": 0.983333,
        "features and reference": 0.983333,
    }
    assert found["level"] == 0.95
    quoted = found["judges"][found["judge"]]
    assert (found["low"], found["high"]) == (quoted["low"], quoted["high"])
    _, alone = estimate_noise(read(rows), seed=0)
    assert [one["level"] for one in alone["judges"].values()] == [0.95]
    assert set(found["judges"]) == {"features", "reference", "features and reference"}
    assert found["judges"]["features"]["high"] - found["judges"]["features"]["low"] > 0.3


def test_repeated_pairs_by_hand() -> None:
    a, b = " one answer", " another answer"
    rows = [{"prompt": f"p{n}", "chosen": a, "rejected": b} for n in range(50)]
    again = [{"prompt": f"p{n}", "chosen": b if n < 9 else a, "rejected": a if n < 9 else b} for n in range(50)]
    found = repeated_pairs(read(rows + again))
    # 9 of 50 differ: 2 e (1 - e) = 0.18 has the solution e = 0.1.
    assert found["num_pairs"] == 50
    assert found["estimate"] == pytest.approx(0.1)
    low, high = stats.binomtest(9, 50).proportion_ci(method="wilson")
    assert found["low"] == pytest.approx((1 - np.sqrt(1 - 2 * low)) / 2)
    assert found["high"] == pytest.approx((1 - np.sqrt(1 - 2 * high)) / 2)
    assert repeated_pairs(read(rows))["estimate"] is None


def test_shares_agree_with_scipy_and_know_clusters() -> None:
    for count, total in ((0, 9), (3, 20), (50, 50), (199, 1000)):
        flags = [True] * count + [False] * (total - count)
        share = share_of(flags)
        low, high = stats.binomtest(count, total).proportion_ci(method="wilson")
        assert (share.low, share.high) == pytest.approx((low, high), abs=1e-12)
    flags = [bool(bit) for bit in np.random.default_rng(0).integers(2, size=200)]
    doubled = share_of(flags * 2, list(range(200)) * 2)
    single = share_of(flags)
    # Every row twice says no more than once; the cluster variance divides by one group less.
    assert (doubled.high - doubled.low) == pytest.approx(single.high - single.low, rel=0.01)
    assert share_of([]).total == 0
