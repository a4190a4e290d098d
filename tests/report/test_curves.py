"""Log lines become curves without losing a value."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from preftune.report.curves import curves_of, encode, payload, plots_for
from preftune.report.read import Run


def run_with(history: list[dict[str, Any]], events: list[dict[str, Any]] | None = None) -> Run:
    return Run("run", Path("run"), history=history, events=events or [])


def test_every_value_of_a_metric_is_kept_with_its_log_line() -> None:
    lines: list[dict[str, Any]] = [
        {"step": 2, "loss": 0.5, "epoch": 0.2, "num_tokens": 200},
        {"step": 1, "loss": 0.6, "epoch": 0.1, "num_tokens": 100},
        {"step": 2, "eval_loss": 0.7, "epoch": 0.2, "eval_runtime": 3.0, "eval_samples_per_second": 9.0},
        {"step": 4, "loss": 0.4, "epoch": 0.4, "num_tokens": 400, "note": "text", "flag": True},
    ]
    curves = curves_of(run_with(lines))
    assert curves.axes["step"].tolist() == [1, 2, 2, 4]
    assert curves.axes["tokens"].tolist() == [100, 200, 200, 400]
    assert curves.train["loss"].values.tolist() == [0.6, 0.5, 0.4]
    assert curves.train["loss"].rows.tolist() == [0, 1, 3]
    assert curves.evaluation["loss"].values.tolist() == [0.7]
    assert curves.metrics == ["loss"]


def test_time_comes_from_the_live_log_without_breaks_and_never_runs_backwards() -> None:
    lines = [{"step": step, "loss": 1.0} for step in (1, 2, 3)]
    events = [
        {"event": "begin", "time": 1000.0, "step": 0},
        {"time": 1010.0, "step": 1, "logs": {}},
        {"time": 1025.0, "step": 2, "logs": {}},
        # Killed, and resumed from step 1 an hour later; then somebody sets the clock back.
        {"event": "begin", "time": 5000.0, "step": 1},
        {"time": 5008.0, "step": 2, "logs": {}},
        {"time": 4000.0, "step": 3, "logs": {}},
    ]
    curves = curves_of(run_with(lines, events))
    assert curves.axes["time"].tolist() == [10.0, 18.0, 18.0]
    assert not curves.estimated_time


def test_without_a_clock_the_known_sum_is_spread_over_the_steps_and_called_an_estimate() -> None:
    lines: list[dict[str, Any]] = [{"step": step, "loss": 1.0} for step in (1, 2, 4)]
    curves = curves_of(run_with([*lines, {"step": 4, "train_runtime": 100.0}]))
    assert curves.axes["time"].tolist() == [25.0, 50.0, 100.0, 100.0]
    assert curves.estimated_time
    assert "time" not in curves_of(run_with(lines)).axes


@pytest.mark.parametrize(
    "history", [[], [{}], [{"step": None, "loss": 1}], [{"step": 1, "loss": "x"}], [{"step": 1, "loss": None}]]
)
def test_logs_without_figures_give_no_curves(history: list[dict[str, Any]]) -> None:
    assert curves_of(run_with(history)).metrics == []


def test_known_metrics_share_plots_and_unknown_ones_are_not_lost() -> None:
    names = ["entropy", "rewards/rejected", "rewards/chosen", "loss", "guards/kl", "generations/length", "my_metric"]
    plots = {spec.key: [name for name, _ in spec.metrics] for spec in plots_for(names)}
    assert list(plots) == ["loss", "rewards", "entropy", "lengths", "guards", "other-0"]
    assert plots["rewards"] == ["rewards/chosen", "rewards/rejected"]
    assert plots["guards"] == ["guards/kl"]
    assert sorted(name for metrics in plots.values() for name in metrics) == sorted(names)


def test_the_ends_of_an_interval_belong_to_its_metric_and_strays_stay_metrics() -> None:
    plots = plots_for(["generation/kl", "generation/kl_low", "generation/kl_high", "stray_low"])
    assert [[name for name, _ in spec.metrics] for spec in plots] == [["generation/kl"], ["stray_low"]]


def test_numbers_survive_the_way_into_the_page() -> None:
    values = np.array([0.1, -3e-7, 12345.678])
    packed = encode(values)
    back = np.frombuffer(base64.b64decode(packed["data"]), "<f4")
    np.testing.assert_allclose(back, values, rtol=1e-7)
    # Beyond 2^24 four bytes would lose the last digits of a token count.
    lines = [{"step": 1, "loss": 1.0, "num_tokens": 2**24 + 1}, {"step": 2, "loss": 1.0, "num_tokens": 2**30 + 1}]
    tokens = payload(curves_of(run_with(lines)))["axes"]["tokens"]
    assert np.frombuffer(base64.b64decode(tokens["data"]), "<f8").tolist() == [2**24 + 1, 2**30 + 1]


@pytest.mark.parametrize("part", ["", "eval_"])
def test_an_accuracy_of_ties_alone_is_no_point(part: str) -> None:
    """Before the first step every margin is 0 to the bit, and a tie counts as wrong."""
    names = (f"{part}rewards/accuracies", f"{part}rewards/margins")
    values = [(0.0, 0.0), (0.0, -0.2), (0.6, 0.1)]
    lines = [{"step": step, **dict(zip(names, each, strict=True))} for step, each in enumerate(values)]
    found = curves_of(Run("run", Path("run"), history=lines))
    curve = (found.evaluation if part else found.train)["rewards/accuracies"]
    assert curve.values.tolist() == [0.0, 0.6]
    assert curve.rows.tolist() == [1, 2]
