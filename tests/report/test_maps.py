"""A sweep's best trial and its equals, against tests by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from preftune.report.html import render
from preftune.report.maps import direction_of, fields_of, metrics_of, sweep_payload, trials_table
from preftune.report.page import gather
from preftune.report.read import Sweep, read_sweep
from tests.report.folders import estimate, make_sweep


def load(folder: Path, **options: Any) -> Sweep:
    sweep = read_sweep(make_sweep(folder, with_runs=False, **options))
    assert sweep is not None
    return sweep


def test_fields_and_scales(tmp_path: Path) -> None:
    fields = fields_of(load(tmp_path, third_field=True))
    assert [(item.name, item.log, len(item.values)) for item in fields] == [
        ("learning_rate", True, 3),
        ("beta", True, 3),
        ("label_smoothing", False, 2),
    ]


def test_flags_of_the_sweep_decide_about_ties(tmp_path: Path) -> None:
    sweep = load(tmp_path)
    metric = metrics_of(sweep)[0]
    flagged = [
        trial["number"]
        for trial in sweep.trials
        if trial["metrics"]
        and trial["metrics"]["eval_rewards/accuracies"]["tied_with_best"]
        and trial["number"] != metric.best
    ]
    assert metric.name == "eval_rewards/accuracies"
    assert metric.tied == flagged
    assert metric.tied
    assert "paired" in metric.tested


def test_without_flags_holm_corrected_normal_tests_decide() -> None:
    means = [0.70, 0.69, 0.67, 0.60, 0.45]
    trials = [
        {"number": n, "params": {"beta": n}, "metrics": {"accuracy": estimate(mean, 0.03)}}
        for n, mean in enumerate(means)
    ]
    sweep = Sweep("s", Path("s"), {"metric": "accuracy", "direction": "maximize"}, trials)
    # By hand: error 0.03 / 1.96 each, sqrt(2) for a difference; Holm multiplies the k-th smallest p by (4, 3, 2, 1).
    error = 0.03 / 1.959964 * np.sqrt(2)
    p_values = [2 * stats.norm.sf((0.70 - mean) / error) for mean in means[1:]]
    order = np.argsort(p_values)
    running, adjusted = 0.0, [0.0] * 4
    for rank, index in enumerate(order):
        running = max(running, (4 - rank) * p_values[index])
        adjusted[index] = running
    expected = [n + 1 for n, p in enumerate(adjusted) if p > 0.05]
    found = metrics_of(sweep)[0]
    assert (found.best, found.tied) == (0, expected)
    assert 0 < len(expected) < 4


def test_lower_is_better_for_losses_and_neither_for_kl(tmp_path: Path) -> None:
    sweep = load(tmp_path)
    by_name = {metric.name: metric for metric in metrics_of(sweep)}
    losses = {trial["number"]: trial["metrics"]["eval_loss"]["mean"] for trial in sweep.trials if trial["metrics"]}
    assert by_name["eval_loss"].best == min(losses, key=lambda number: losses[number])
    assert by_name["kl"].best is None


@pytest.mark.parametrize(
    ("name", "direction"),
    [
        ("eval_loss", "minimize"),
        ("rewards/margins", "maximize"),
        ("win_rate", "maximize"),
        ("kl", None),
        ("eval_rewards/rejected", None),
    ],
)
def test_directions(name: str, direction: str | None) -> None:
    assert direction_of(name) == direction


def test_among_equals_the_trial_that_the_sweep_names_is_framed() -> None:
    trials = [
        {"number": n, "params": {"beta": n}, "metrics": {"accuracy": {"mean": 0.6}}, "tied_with_best": True}
        for n in range(3)
    ]
    content = {"metric": "accuracy", "direction": "maximize", "best": {"number": 2}}
    found = metrics_of(Sweep("s", Path("s"), content, trials))[0]
    assert (found.best, found.tied) == (2, [0, 1])


def test_failed_trials_stay_in_the_table_and_out_of_the_maps(tmp_path: Path) -> None:
    sweep = load(tmp_path)
    table = trials_table(sweep, metrics_of(sweep))
    assert len(table.rows) == 9
    assert table.rows[0][3].endswith("best")
    assert table.rows[-1][-2] == "fail"
    assert sweep_payload(sweep)["trials"][-1]["metrics"] == {}


@pytest.mark.parametrize(
    "trials",
    [[], [{}], [{"params": 3, "metrics": []}], [{"number": 1, "params": {"beta": 0.1}, "metrics": {"a": None}}]],
)
def test_sweeps_without_figures(trials: list[dict[str, Any]]) -> None:
    sweep = Sweep("s", Path("s"), {}, trials)
    assert metrics_of(sweep) == []
    assert sweep_payload(sweep)["metrics"] == []


def test_paired_tests_of_the_sweep_hold_for_every_metric_that_it_tested(tmp_path: Path) -> None:
    sweep = load(tmp_path, flags=False)
    name = "eval_rewards/accuracies"
    scored = [trial["number"] for trial in sweep.trials if trial["metrics"]]
    cells = [{"number": number, "tied_with_best": number in (4, 5)} for number in scored]
    sweep.content |= {"metric": "eval_loss", "direction": "minimize", "maps": {name: {"best": 4, "cells": cells}}}
    metric = next(metric for metric in metrics_of(sweep) if metric.name == name)
    assert (metric.best, metric.tied) == (4, [5])
    assert metric.tested.startswith("paired tests")


@pytest.mark.parametrize("damaged", [{"a": 1}, [4], None])
def test_cells_without_a_number_are_left_out(damaged: Any, tmp_path: Path) -> None:
    sweep = load(tmp_path, flags=False)
    name = "eval_rewards/accuracies"
    cells = [{"number": 4, "tied_with_best": True}, {"number": damaged}, {"number": 5, "tied_with_best": True}]
    sweep.content |= {"metric": "eval_loss", "direction": "minimize", "maps": {name: {"best": 4, "cells": cells}}}
    metric = next(metric for metric in metrics_of(sweep) if metric.name == name)
    assert (metric.best, metric.tied) == (4, [5])


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [(0.01, 0.05, ""), (-0.02, 0.05, "includes 0"), (-0.05, -0.01, "prefers the rejected"), (None, None, "")],
)
def test_a_sweet_spot_that_gained_nothing_is_not_recommended(
    low: float | None, high: float | None, said: str, tmp_path: Path
) -> None:
    sweep = load(tmp_path)
    best = sweep.content["best"]["number"]
    gain = {"mean": 0.02 if high is None or high > 0 else -0.03, "low": low, "high": high, "n": 50}
    sweep.trials[best]["metrics"]["eval_preference_gain"] = gain
    sweep.content["metric"] = "eval_preference_gain"
    sweep.content["best"]["reason"] = "trial 4 is the one"
    text = render(gather([], [sweep]))
    assert ("includes 0" in text, "prefers the rejected" in text) == (said == "includes 0", "prefers" in said)
    assert ('<article class="verdict good">' in text) == (not said)
    assert "Trial 4 is the one." in text


def test_trials_that_have_left_the_reference_are_named(tmp_path: Path) -> None:
    sweep = load(tmp_path)
    page = render(gather([], [sweep]))
    assert "Cells without colour" not in page
    sweep.trials[0]["left_reference"] = True
    assert [trial["left"] for trial in sweep_payload(sweep)["trials"]] == [True] + [False] * (len(sweep.trials) - 1)
    rows = trials_table(sweep, metrics_of(sweep)).rows
    assert [row[0] for row in rows if "left the reference" in row[-2]] == ["0"]
    # It comes last of the trials that have a figure.
    figured = [row[0] for row in rows if row[3] != "-"]
    assert figured[-1] == "0"
    assert "Cells without colour" in render(gather([], [sweep]))
