"""The sweet spot, against hand calculations and libraries that the package does not use."""

from __future__ import annotations

import importlib
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from preftune.sweep.choice import Candidate, choose, paired_p
from preftune.sweep.scores import ACCURACY, GAIN, HeldOut
from tests.sweep.helpers import held


def candidate(number: int, right: np.ndarray, digest: str = "same", **params: float) -> Candidate:
    return Candidate(number, params, float(right.mean()), held(right.tolist(), digest=digest))


def flags(num_right: int, total: int = 200) -> np.ndarray:
    return np.arange(total) < num_right


def test_yes_no_values_take_mcnemar() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 2, 80).astype(float), rng.integers(0, 2, 80).astype(float)
    only_first = int(((first == 1) & (second == 0)).sum())
    only_second = int(((first == 0) & (second == 1)).sum())
    exact = stats.binomtest(only_first, only_first + only_second).pvalue
    point = stats.binom.pmf(only_first, only_first + only_second, 0.5)
    assert paired_p(first, second, np.arange(80), 0) == pytest.approx(exact - point, abs=1e-12)


def test_other_values_take_sign_flips_as_scipy_does() -> None:
    rng = np.random.default_rng(1)
    first = rng.normal(size=40)
    second = first + rng.normal(0.25, 1, size=40)
    oracle = stats.permutation_test(
        (second, first),
        lambda x, y, axis: np.mean(x - y, axis=axis),
        permutation_type="samples",
        n_resamples=20_000,
        vectorized=True,
        rng=np.random.default_rng(2),
    ).pvalue
    # Standard error of either estimate: sqrt(p (1 - p) / 10,000), at most 0.005.
    assert paired_p(first, second, np.arange(40), 0) == pytest.approx(oracle, abs=0.025)


def test_pairs_of_one_prompt_are_flipped_together() -> None:
    # Ten prompts of 20 pairs each, all pairs of a prompt alike: there are ten observations, not 200.
    groups = np.repeat(np.arange(10), 20)
    per_prompt = np.array([1.0, 1, 1, 1, 1, 1, 1, -1, -1, -1])
    p = paired_p(np.zeros(200), per_prompt[groups], groups, 0)
    assert p == pytest.approx(stats.binomtest(3, 10).pvalue, abs=0.02)
    assert paired_p(np.zeros(200), per_prompt[groups], np.arange(200), 0) < 1e-6


def test_equal_values_cannot_be_told_apart() -> None:
    values = np.random.default_rng(0).normal(size=30)
    assert paired_p(values, values, np.arange(30), 0) == 1.0


def test_the_most_conservative_of_those_as_good_as_the_best_is_taken() -> None:
    trials = [
        candidate(0, flags(150), beta=0.05, learning_rate=1e-5),
        # One standard error of the paired difference is sqrt(2) / 200 = 0.007 here; the difference is 0.005.
        candidate(1, np.roll(flags(149), 1) | flags(148), beta=0.1, learning_rate=1e-5),
        # Worse by 0.02 with a standard error of 0.01: not distinguishable after Holm, but no substitute.
        candidate(2, flags(146), beta=0.4, learning_rate=1e-5),
        candidate(3, flags(100), beta=0.8, learning_rate=1e-6),
    ]
    found = choose(trials, ACCURACY, "maximize", 0)
    assert found is not None
    assert found.best in (0, 1)
    told = found.comparisons
    assert told[2].tied is True
    assert told[3].tied is False
    assert told[2].difference == pytest.approx(146 / 200 - max(each.mean for each in trials))
    assert found.sweet_spot == 1
    assert "Holm" in found.reason


@pytest.mark.parametrize(
    ("setting", "cautious", "bold"),
    [("beta", 0.4, 0.1), ("learning_rate", 1e-6, 1e-5), ("num_train_epochs", 1, 2), ("max_steps", 50, 200)],
)
def test_what_is_cautious_about_every_setting(setting: str, cautious: float, bold: float) -> None:
    for order in ((cautious, bold), (bold, cautious)):
        careful = order.index(cautious)
        # As good as each other: the cautious one is the best and the one to take.
        found = choose(
            [candidate(n, flags(150), "same", **{setting: v}) for n, v in enumerate(order)], ACCURACY, "maximize", 0
        )
        assert found is not None
        assert (found.best, found.sweet_spot) == (careful, careful)
        # Right on one pair more and wrong on two more: worse by .005, standard error .009.
        worse = flags(148) | (np.arange(200) == 150)
        right = [worse if value == cautious else flags(150) for value in order]
        trials = [candidate(n, right[n], "same", **{setting: value}) for n, value in enumerate(order)]
        found = choose(trials, ACCURACY, "maximize", 0)
        assert found is not None
        assert (found.best, found.sweet_spot) == (1 - careful, careful)


def test_settings_count_in_their_order() -> None:
    """Beta before the learning rate, the learning rate before the length of training."""
    names = ("beta", "learning_rate", "num_train_epochs", "max_steps")
    cautious = dict(zip(names, (0.4, 1e-6, 1, 50), strict=True))
    bold = dict(zip(names, (0.1, 1e-5, 2, 200), strict=True))
    for place in range(1, len(names)):
        first = {**bold, names[place - 1]: cautious[names[place - 1]]}
        later = {**bold, **{name: cautious[name] for name in names[place:]}}
        found = choose(
            [candidate(n, flags(150), "same", **p) for n, p in enumerate((later, first))], ACCURACY, "maximize", 0
        )
        assert found is not None
        assert found.sweet_spot == 1


def test_the_preference_gain_is_cautious_enough_by_itself() -> None:
    rng = np.random.default_rng(0)
    rewards = rng.normal(size=(200, 2))
    lengths = np.ones((200, 2), int)
    shifts = (np.array([0.3, 0.0]), np.zeros(2))
    held_out = [HeldOut(rewards + shift, lengths, np.arange(200), 1.0, "same") for shift in shifts]
    bold, timid = (
        Candidate(number, {"beta": beta}, float(each.values(GAIN).mean()), each)
        for number, (beta, each) in enumerate(zip((0.05, 0.8), held_out, strict=True))
    )
    # Equal but for the last digits, so that the cautious one is well within a standard error.
    twin = Candidate(2, {"beta": 0.8}, bold.mean - 1e-9, held_out[0])
    found = choose([bold, timid, twin], GAIN, "maximize", 0)
    assert found is not None
    assert (found.best, found.sweet_spot) == (0, 0)
    assert found.comparisons[2].tied is True


def test_holm_is_taken_over_all_comparisons() -> None:
    multitest = importlib.import_module("statsmodels.stats.multitest")
    trials = [candidate(number, flags(150 - 4 * number)) for number in range(6)]
    found = choose(trials, ACCURACY, "maximize", 0)
    assert found is not None
    others = [found.comparisons[number] for number in range(1, 6)]
    raw = [each.p_value for each in others]
    adjusted = multitest.multipletests(raw, method="holm")[1]
    assert [each.adjusted_p for each in others] == pytest.approx(list(adjusted))
    # 4 discordant pairs, all one way: mid-p is 2 / 2^4 - (1/2)^4 = 1/16.
    assert raw[0] == pytest.approx(1 / 16)
    assert [each.tied for each in others] == [bool(p >= 0.05) for p in adjusted]


def test_other_held_out_pairs_are_not_compared() -> None:
    trials = [candidate(0, flags(150)), candidate(1, flags(149), digest="other"), candidate(2, flags(150), beta=1.0)]
    found = choose(trials, ACCURACY, "maximize", 0)
    assert found is not None
    assert found.comparisons[1].tied is None
    assert "could not be compared" in found.reason
    assert found.sweet_spot == 2


def test_what_is_to_be_small_is_minimised_and_nothing_is_chosen_of_nothing() -> None:
    trials = [Candidate(0, {}, 0.5, None), Candidate(1, {}, 0.3, None), Candidate(2, {}, float("nan"), None)]
    found = choose(trials, "eval_loss", "minimize", 0)
    assert found is not None
    assert (found.best, found.sweet_spot) == (1, 1)
    assert choose(trials[2:], "eval_loss", "minimize", 0) is None


def test_one_prompt_is_no_basis_for_a_comparison() -> None:
    alone = HeldOut(np.ones((3, 2)), np.ones((3, 2), int), np.zeros(3, dtype=np.int64), 1.0, "same")
    trials = [Candidate(0, {}, 0.5, alone), Candidate(1, {}, 0.4, alone)]
    found = choose(trials, ACCURACY, "maximize", 0)
    assert found is not None
    assert found.comparisons[1].tied is None


def test_trials_that_have_left_the_reference_stand_back() -> None:
    bold = replace(candidate(0, flags(190), beta=0.05), left=True)
    good, poor = candidate(1, flags(130), beta=0.1), candidate(2, flags(60), beta=0.8)
    found = choose([bold, good, poor], ACCURACY, "maximize", 0)
    assert found is not None
    assert (found.best, found.sweet_spot, found.left) == (1, 1, (0,))
    assert "trial 0 has left" in found.reason
    # What stands back is compared with nothing.
    assert 0 not in found.comparisons
    assert found.comparisons[2].tied is False
    # Where all have left, the figures decide as they are, and the reason says what they are worth.
    both = choose([bold, replace(poor, left=True)], ACCURACY, "maximize", 0)
    assert both is not None
    assert both.sweet_spot == 0
    assert "all trials are far" in both.reason
