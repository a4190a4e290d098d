"""Metrics of pairs against scikit-learn, slow loops and hand values; the trainer's own numbers."""

from __future__ import annotations

import importlib
import math

import numpy as np
import pytest
from scipy.special import expit

from preftune.errors import DataError
from preftune.evaluation.metrics import Summary, by_length, by_source, calibration, preference_metrics, reward_metrics

SUMMARY = Summary(num_resamples=300)
RNG = np.random.default_rng(0)
REWARDS = RNG.normal([[0.4, 0.0]], 1.0, size=(200, 2))
GROUPS = (np.arange(200) // 3).tolist()


def test_hand_values_and_strictness() -> None:
    rewards = np.array([[1.0, 0.0], [0.2, 0.2], [0.0, 2.0], [3.0, 1.0]])
    found = reward_metrics(rewards, None, SUMMARY)
    assert found["rewards/accuracies"]["mean"] == 0.5
    assert found["rewards/ties"]["mean"] == 0.25
    assert found["rewards/margins"]["mean"] == pytest.approx((1 + 0 - 2 + 2) / 4)
    assert found["rewards/chosen"]["n"] == 4


def test_calibration_against_independent_code() -> None:
    metrics = importlib.import_module("sklearn.metrics")
    found = calibration(REWARDS, GROUPS, SUMMARY)
    p = expit(REWARDS[:, 0] - REWARDS[:, 1])
    # Presented in both orders, the pairs are an ordinary forecast of yes and no.
    both, truth = np.concatenate([p, 1 - p]), np.concatenate([np.ones(200), np.zeros(200)])
    assert found["brier"]["mean"] == pytest.approx(metrics.brier_score_loss(truth, both), rel=1e-12)
    assert found["log_loss"]["mean"] == pytest.approx(metrics.log_loss(truth, both), rel=1e-12)
    total = 0.0
    for low in np.arange(0.5, 1.0, 0.05):
        rows = [q for q in p if low <= max(q, 1 - q) < low + 0.05]
        if rows:
            total += abs(sum(q > 0.5 for q in rows) - sum(max(q, 1 - q) for q in rows)) / 200
    assert found["ece"] == pytest.approx(total, rel=1e-9)
    assert sum(part["n"] for part in found["bins"]) == 200


def test_calibration_of_extremes() -> None:
    found = calibration(np.array([[1e4, 0.0], [0.0, 1e4], [0.0, 0.0]]), None, SUMMARY)
    assert found["brier"]["mean"] == pytest.approx((0 + 1 + 0.25) / 3)
    assert found["log_loss"]["mean"] == pytest.approx((1e4 + math.log(2)) / 3)
    # A tie says one half and is half right.
    assert found["bins"][0]["accuracy"]["mean"] == found["bins"][0]["confidence"] == 0.5


def test_buckets_by_length() -> None:
    lengths = np.stack([np.arange(200) % 7 + 1, np.arange(200) % 5 + 1], 1)
    found = by_length(REWARDS, lengths, GROUPS, SUMMARY)
    longer = {part["name"]: part for part in found if part["kind"] == "longer"}
    rows = [n for n in range(200) if lengths[n, 0] > lengths[n, 1]]
    right = sum(REWARDS[n, 0] > REWARDS[n, 1] for n in rows)
    assert longer["chosen is longer"]["n"] == len(rows)
    assert longer["chosen is longer"]["accuracy"]["mean"] == pytest.approx(right / len(rows))
    assert sum(part["n"] for part in longer.values()) == 200
    assert sum(part["n"] for part in found if part["kind"] == "tokens") == 200
    one = by_length(REWARDS, np.full((200, 2), 4), GROUPS, SUMMARY)
    assert [part["name"] for part in one] == ["equal length", "4-4 tokens"]


def test_by_source() -> None:
    sources = ["b", "a"] * 100
    found = by_source(REWARDS, sources, GROUPS, SUMMARY)
    assert [part["name"] for part in found] == ["a", "b"]
    assert found[0]["margin"]["mean"] == pytest.approx((REWARDS[1::2, 0] - REWARDS[1::2, 1]).mean())
    assert by_source(REWARDS, None, GROUPS, SUMMARY) == []


def test_one_prompt_has_no_interval() -> None:
    found = reward_metrics(np.ones((3, 2)), ["p"] * 3, SUMMARY)["rewards/margins"]
    assert math.isnan(found["low"])
    assert found["mean"] == 0


def test_preference_metrics_is_flat_and_refuses_nonsense() -> None:
    found = preference_metrics(REWARDS, GROUPS)
    assert found["accuracy_low"] < found["accuracy"] < found["accuracy_high"]
    assert set(found) == {"ece"} | {
        f"{name}{end}" for name in ("accuracy", "margin", "brier", "log_loss") for end in ("", "_low", "_high")
    }
    with pytest.raises(DataError, match=r"\(pairs, 2\)"):
        preference_metrics(np.zeros(3))
    with pytest.raises(DataError, match="pair 1"):
        preference_metrics([[0.0, 1.0], [math.nan, 0.0]])
