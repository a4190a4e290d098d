"""What the summary says, and what it must not say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import scipy.stats

from preftune.report.curves import curves_of
from preftune.report.html import render
from preftune.report.page import gather
from preftune.report.read import Run
from preftune.report.verdict import Verdict, judge


def verdict(**parts: Any) -> Verdict:
    run = Run("run", Path("run"), **parts)
    return judge(run, curves_of(run))


def evaluated(low: float, mean: float, high: float) -> dict[str, Any]:
    return {"metrics": {"accuracy": {"mean": mean, "low": low, "high": high, "n": 100}}}


@pytest.mark.parametrize(
    ("interval", "tone", "words"),
    [
        ((0.51, 0.6, 0.7), "good", "Looks better"),
        ((0.45, 0.6, 0.7), "unclear", "Cannot be told"),
        ((0.3, 0.4, 0.49), "bad", "Looks worse"),
    ],
)
def test_only_an_interval_that_excludes_chance_speaks(
    interval: tuple[float, float, float], tone: str, words: str
) -> None:
    found = verdict(evaluation=evaluated(*interval))
    assert found.tone == tone
    assert found.headline.startswith(words)
    assert any("weak proxy" in line for line in found.evidence)


@pytest.mark.parametrize("part", [{"ref_model": None}, {"ref_model": "base", "settings": {"reference_free": True}}])
@pytest.mark.parametrize("interval", [(0.51, 0.6, 0.7), (0.3, 0.4, 0.49)])
def test_without_a_reference_one_half_is_nobodys_start(
    interval: tuple[float, float, float], part: dict[str, Any]
) -> None:
    found = verdict(evaluation={**evaluated(*interval), **part})
    assert found.tone == "unclear"
    assert found.headline == "Not settled: without a reference, it is not known where the model began."
    text = " ".join([found.headline, *found.evidence])
    assert "its reference" not in text
    assert f"{100 * interval[1]:.1f} %" in text
    assert any("--compare" in step for step in found.steps)


@pytest.mark.parametrize(
    ("first", "last", "tone", "words"),
    [
        # Of 100 pairs at most 31 changed from right to wrong and 69 from wrong to right.
        (0.31, 0.69, "good", "Looks better than before training on held-out pairs."),
        (0.69, 0.31, "bad", "Looks worse than before training on held-out pairs."),
        # Here 55 and 45 may have: p = 0.32, although the interval of either lies on its side of the other's mean.
        (0.45, 0.55, "unclear", "Cannot be told from the model before training on held-out pairs."),
        # What begins high has not been trained to be there.
        (0.9, 0.9, "unclear", "Cannot be told from the model before training on held-out pairs."),
    ],
)
def test_a_method_without_reference_is_measured_by_its_own_start(
    first: float, last: float, tone: str, words: str
) -> None:
    provenance = {"plan": {"method": "orpo", "reference": "none"}, "data": {"test": {"num_rows": 100}}}
    history = [{"step": step, "eval_rewards/accuracies": value} for step, value in ((0, first), (10, last))]
    found = verdict(history=history, provenance=provenance)
    assert (found.tone, found.headline) == (tone, words)
    assert f"before training it was {100 * first:.1f} %" in found.evidence[0]
    changed = [round(100 * value) for value in (min(last, 1 - first), min(first, 1 - last))]
    by_scipy = scipy.stats.binomtest(changed[0], sum(changed)).pvalue
    assert (by_scipy < 0.05) == (tone != "unclear")
    # Without that evaluation there is nothing to compare with, however high the figure.
    later = verdict(history=history[1:], provenance=provenance)
    assert (later.tone, later.headline[:11]) == ("unclear", "Not settled")
    # A method with a reference begins at its reference, which one half stands for.
    provenance["plan"] = {"method": "sigmoid", "reference": "the policy before training, run along"}
    assert "its reference" in verdict(history=history, provenance=provenance).headline


def test_intervals_carry_the_level_of_the_evaluation() -> None:
    kl = {"mean": 2.0, "low": 1.5, "high": 2.5}
    found = verdict(evaluation={**evaluated(0.51, 0.6, 0.7), "level": 0.8, "kl": kl})
    details = {tile.label: tile.detail for tile in found.tiles}
    assert details["Held-out accuracy"] == "80 %: 51.0 to 70.0"
    assert details["KL to reference"] == "nats, 80 %: 1.5 to 2.5"
    assert "the 80 % interval lies above chance" in found.evidence[0]
    run = Run("run", Path("run"), evaluation={**evaluated(0.51, 0.6, 0.7), "level": 0.8})
    assert "Intervals of this evaluation are 80 % intervals." in render(gather([run], []))
    # A file that does not tell, or tells nonsense, was made with the default.
    for level in ({}, {"level": None}, {"level": "high"}, {"level": 80}):
        tile = verdict(evaluation={**evaluated(0.51, 0.6, 0.7), **level}).tiles[0]
        assert tile.detail == "95 %: 51.0 to 70.0"


def test_an_alarm_is_never_outvoted(tmp_path: Path) -> None:
    good = evaluated(0.6, 0.7, 0.8)
    alarm = {"guard": "length", "step": 3, "action": "warn", "remedy": "normalise by length"}
    warned = verdict(evaluation=good, alarms=[alarm, alarm])
    assert (warned.tone, warned.steps[0]) == ("unclear", "Normalise by length.")
    assert warned.steps.count("Normalise by length.") == 1
    assert "2 alarms (length)" in warned.headline
    stopped = verdict(evaluation=good, alarms=[{**alarm, "action": "stop"}])
    assert (stopped.tone, stopped.headline[:18]) == ("bad", "Stopped by a guard")


def test_training_figures_alone_never_speak_for_a_model() -> None:
    found = verdict(
        history=[
            {"step": 1, "loss": 0.7, "rewards/accuracies": 0.5},
            {"step": 2, "loss": 0.1, "rewards/accuracies": 1.0},
        ]
    )
    assert found.tone == "unclear"
    assert found.headline == "Cannot be judged: nothing was held out."
    assert any(step.startswith("Score the model on held-out pairs") for step in found.steps)


def test_the_last_evaluation_gets_a_wilson_interval_from_the_size_of_the_split() -> None:
    history = [{"step": 10, "eval_rewards/accuracies": 0.61}]
    without = verdict(history=history)
    assert (without.tone, without.tiles[0].detail) == ("unclear", "no interval")
    found = verdict(history=history, provenance={"data": {"test": {"num_rows": 100}}})
    # Wilson by hand for 61 of 100: centre (0.61 + 3.8415/200) / 1.038415, half width 1.96 sqrt(...) / 1.038415.
    assert found.tiles[0].value == "61.0 %"
    assert found.tiles[0].detail == "95 %: 51.2 to 70.0"
    assert found.tone == "good"


def test_a_held_out_loss_that_turned_names_the_step() -> None:
    history = [{"step": step, "eval_loss": loss} for step, loss in ((10, 0.7), (20, 0.5), (30, 0.6))]
    found = verdict(history=history)
    assert found.headline == "Held-out loss fell from 0.7 to 0.6."
    assert "Compare the checkpoint nearest to step 20 with the final one." in found.steps


def test_a_run_that_goes_on_is_said_to() -> None:
    events = [{"event": "begin", "time": 0.0, "step": 0, "max_steps": 100}]
    found = verdict(history=[{"step": 5, "loss": 1.0}], events=events)
    assert "5 of 100 planned steps are logged" in found.trained


def test_lengths_of_own_answers_stand_beside_the_accuracy() -> None:
    lengths = {"model": {"tokens": {"mean": 47.44}}, "reference": {"tokens": {"mean": 23.1}}}
    found = verdict(evaluation={**evaluated(0.6, 0.7, 0.8), "lengths": lengths})
    assert "Its own answers have 47.4 tokens on average, those of its reference 23.1." in found.evidence


def test_an_empty_run_is_not_judged() -> None:
    assert verdict().headline == "There is no training log in this folder."


def evaluations(*lines: tuple[int, float]) -> list[dict[str, Any]]:
    return [{"step": step, "eval_loss": loss, "eval_rewards/accuracies": 0.6} for step, loss in lines]


@pytest.mark.parametrize(
    ("lines", "step"),
    [
        (((10, 0.6), (20, 0.5), (30, 0.55)), "step 20"),
        # The evaluation after training repeats that of the last step, and is nothing to compare it with.
        (((10, 0.6), (20, 0.55), (30, 0.5), (30, 0.5)), None),
        (((10, 0.5), (20, 0.5), (30, 0.5)), None),
    ],
)
def test_an_earlier_step_is_named_only_where_it_was_better(lines: Any, step: str | None) -> None:
    found = verdict(history=evaluations(*lines))
    told = [line for line in found.steps if "checkpoint nearest" in line]
    assert told == ([] if step is None else [f"Compare the checkpoint nearest to {step} with the final one."])


def test_the_command_that_is_proposed_exists() -> None:
    from preftune.config import ModelConfig, ScriptConfig
    from preftune.config.fields import fields_of
    from preftune.evaluation.config import EvalConfig

    lines = verdict(history=[{"step": 1, "loss": 0.6}]).steps
    lines += verdict(evaluation={**evaluated(0.6, 0.7, 0.8), "ref_model": None}).steps
    proposed = [line for line in lines if "preftune eval" in line]
    assert len(proposed) == 2
    flags = [word.removeprefix("--") for line in proposed for word in line.split() if word.startswith("--")]
    assert flags
    assert set(flags) <= {name for holder in (EvalConfig, ModelConfig, ScriptConfig) for name in fields_of(holder)}
