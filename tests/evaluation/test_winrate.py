"""Win rate: both orders, ties, length control against statsmodels and in simulation."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

import numpy as np
import pytest
from scipy.special import expit

from preftune.errors import DataError
from preftune.evaluation.judge import Question, Verdict
from preftune.evaluation.metrics import Summary
from preftune.evaluation.winrate import length_controlled, win_rate


class Taste:
    """A judge in this process."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.asked: list[Question] = []

    def ask(self, questions: Sequence[Question], description: str = "") -> list[Verdict | None]:
        self.asked += questions
        return [self._one(question) for question in questions]

    def _one(self, question: Question) -> Verdict | None:
        if self.kind == "first":
            return "first"
        if self.kind == "good":
            gap = question.first.count("good") - question.second.count("good")
            return "first" if gap > 0 else "second" if gap < 0 else "tie"
        return "first" if question.first == "readable" else None


def test_both_orders_and_ties() -> None:
    judge = Taste("good")
    answers, opponents = ["good", "bad", "same", "good good"], ["bad", "good", "same", "good"]
    found = win_rate(judge, list("abcd"), answers, opponents, None, Summary())
    # By hand: win, loss, tie (equal, not asked), win.
    assert found["win_rate"]["mean"] == pytest.approx(2.5 / 4)
    assert (found["wins"], found["ties"], found["losses"], found["identical"]) == (2, 1, 1, 1)
    assert len(judge.asked) == 6
    assert found["position"] == {"first_wins": 0.5, "consistent": 1.0}


def test_a_judge_that_likes_the_first_place_gives_one_half() -> None:
    found = win_rate(Taste("first"), list("abc"), list("123"), list("456"), None, Summary())
    assert found["win_rate"]["mean"] == 0.5
    assert found["position"] == {"first_wins": 1.0, "consistent": 0.0}


def test_unreadable_comparisons_are_left_out() -> None:
    with pytest.raises(DataError, match="no verdict"):
        win_rate(Taste("mute"), ["a", "b"], ["1", "2"], ["3", "4"], None, Summary())


def drawn(rng: np.random.Generator, theta: float, phi: float, num: int) -> tuple[np.ndarray, np.ndarray]:
    gaps = rng.normal(50, 100, size=num)
    wins = (rng.random(num) < expit(theta + phi * np.tanh(gaps / gaps.std()))).astype(float)
    return wins, gaps


def test_agrees_with_statsmodels_without_the_prior() -> None:
    statsmodels = importlib.import_module("statsmodels.api")
    wins, gaps = drawn(np.random.default_rng(0), 0.4, 1.2, 300)
    wins[:40] = 0.5
    x = np.stack([np.ones(300), np.tanh(gaps / gaps.std())], 1)
    groups = np.arange(300) // 2
    fit = statsmodels.GLM(wins, x, family=statsmodels.families.Binomial()).fit(
        cov_type="cluster", cov_kwds={"groups": groups, "use_correction": True}
    )
    ours = length_controlled(wins, gaps, groups.tolist(), ridge=0.0)
    assert ours["mean"] == pytest.approx(expit(fit.params[0]), abs=1e-5)
    assert ours["phi"] == pytest.approx(fit.params[1], abs=1e-4)
    # Their correction has (n - 1) / (n - k) besides groups / (groups - 1).
    error = fit.bse[0] / np.sqrt(299 / 298)
    quantile = importlib.import_module("scipy.stats").t.ppf(0.975, 149)
    assert ours["high"] == pytest.approx(expit(fit.params[0] + quantile * error), abs=1e-4)


def test_takes_the_liking_for_length_out() -> None:
    wins, gaps = drawn(np.random.default_rng(1), 0.0, 2.0, 4000)
    found = length_controlled(wins, gaps)
    assert wins.mean() > 0.58
    assert found["mean"] == pytest.approx(0.5, abs=0.03)
    assert found["low"] < 0.5 < found["high"]


def test_covers() -> None:
    hits = 0
    for seed in range(800):
        wins, gaps = drawn(np.random.default_rng([3, seed]), 0.5, 1.0, 80)
        found = length_controlled(wins, gaps)
        hits += found["low"] <= expit(0.5) <= found["high"]
    # 0.95 with 2 points of tolerance; the scatter of 800 draws is 0.8.
    assert hits / 800 == pytest.approx(0.95, abs=0.02)


def test_symmetric_and_without_length_differences() -> None:
    wins, gaps = drawn(np.random.default_rng(2), 0.3, 1.0, 100)
    one, two = length_controlled(wins, gaps), length_controlled(1 - wins, -gaps)
    assert one["mean"] == pytest.approx(1 - two["mean"], abs=1e-9)
    assert length_controlled(wins, np.zeros(100))["mean"] == pytest.approx(wins.mean(), abs=1e-5)
    alike = length_controlled(np.ones(30), gaps[:30])
    assert (alike["mean"], alike["high"]) == (1.0, 1.0)
    assert 0.8 < alike["low"] < 1
