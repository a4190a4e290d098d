"""Each guard on evidence made by hand: what it fires on, what it is silent on, once per episode."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch

from preftune.stats.clusters import t_interval
from preftune.training.guards.base import Guard, Reading
from preftune.training.guards.dynamics import EntropyCollapse, GradientSpike, NonFinite, RewardJump
from preftune.training.guards.evidence import Generation, HeldOut, Moments, Watch, Window
from preftune.training.guards.outcomes import (
    LengthExploitation,
    LikelihoodDisplacement,
    Overfitting,
    OverOptimisation,
)

NUM = 400


def moments(margins: Any) -> Moments:
    watch = Watch(torch.device("cpu"))
    values = torch.zeros(len(margins), 5, dtype=torch.float64)
    values[:, 0] = torch.as_tensor(margins)
    watch.add_train(values)
    return watch.pop_window(lambda each: each)[0]


def window(step: int, margins: Any = (), epoch: float = 0.1, norms: Any = (), **logs: float) -> Window:
    return Window(step, epoch, moments(np.asarray(margins, dtype=float)), list(norms), logs)


def heldout(step: int, train: Any = (), generation: Generation | None = None, **columns: Any) -> HeldOut:
    rng = np.random.default_rng(9)
    base = {
        "margin": rng.normal(size=NUM),
        "chosen": np.zeros(NUM),
        "rejected": np.zeros(NUM),
        "chosen_length": rng.integers(10, 30, NUM),
        "rejected_length": rng.integers(10, 30, NUM),
    }
    has_reference = columns.pop("has_reference", True)
    values = np.stack([np.asarray(columns.get(name, base[name]), dtype=float) for name in base], 1)
    pairs = moments(np.asarray(train, dtype=float))
    return HeldOut(step, 0.1, "eval", values, np.arange(NUM), has_reference, pairs, generation, {})


def generation(
    step: int, kl: float = 1.0, length: float = 20.0, entropy: float = 1.5, spread: float = 0.1, tail: float = 0.005
) -> Generation:
    noise = np.random.default_rng(step).normal(size=64)
    return Generation(
        step=step,
        epoch=0.1,
        log_ratios=kl + spread * noise,
        lengths=length + noise,
        chosen_lengths=np.full(64, 20.0),
        entropy=entropy + 0.05 * noise,
        finished=np.ones(64, dtype=bool),
        tail_shares=tail + 0.002 * noise,
    )


def noisy(mean: float, seed: int, num: int = 128) -> Any:
    return np.random.default_rng(seed).normal(mean, 0.3, num)


# ---- moments --------------------------------------------------------------------------------------------------------


def test_moments_are_those_of_numpy_however_they_are_split() -> None:
    margins = np.random.default_rng(0).normal(size=50)
    whole, parts = moments(margins), moments(margins[:20]) + moments(margins[20:])
    assert whole.as_list() == pytest.approx(parts.as_list())
    assert whole.mean("margin") == pytest.approx(margins.mean())
    assert whole.variance("margin") == pytest.approx(margins.var(ddof=1))
    assert whole.mean("implied") == pytest.approx((1 / (1 + np.exp(-margins))).mean())
    assert whole.mean("correct") == pytest.approx((margins > 0).mean())
    assert Moments.from_list(json.loads(json.dumps(whole.as_list()))) == whole


def test_ties_count_half() -> None:
    assert moments(np.zeros(10)).mean("correct") == 0.5


# ---- reward jump ----------------------------------------------------------------------------------------------------


def test_learning_at_a_steady_pace_is_no_jump() -> None:
    guard = RewardJump()
    means = np.linspace(0, 2, 40)
    assert all(guard.observe(window(n, noisy(mean, n))) is None for n, mean in enumerate(means))


@pytest.mark.parametrize("size", [128, 32])
def test_a_jump_is_told_once_and_again_after_it_is_over(size: int) -> None:
    guard = RewardJump()
    told = []
    means = [0.0] * 3 + [1.5] * 6 + [0.0] * 3 + [1.5] * 3
    for place, mean in enumerate(means):
        for part in range(128 // size):
            if guard.observe(window(10 * place + part, noisy(mean, 10 * place + part, size))) is not None:
                told.append(place)
    assert told == [3, 12]


def test_a_rise_that_noise_explains_is_no_jump() -> None:
    """12 points up, on so few answers that the interval reaches below 10."""
    guard = RewardJump()

    def right(share: float) -> Any:
        return np.where(np.arange(128) < share * 128, 0.01, -0.01)

    guard.observe(window(1, right(0.55)))
    assert guard.observe(window(2, right(0.67))) is None
    reading = guard.observe(window(3, right(0.99)))
    assert reading is not None
    assert reading.evidence["rise"] == pytest.approx(0.32, abs=0.02)


def test_windows_more_than_an_epoch_apart_are_not_compared() -> None:
    guard = RewardJump()
    guard.observe(window(1, noisy(0.0, 1), epoch=1.0))
    assert guard.observe(window(2, noisy(2.0, 2), epoch=2.5)) is None


# ---- gradient, entropy, numbers -------------------------------------------------------------------------------------


def test_a_spike_is_named_with_its_step() -> None:
    guard = GradientSpike()
    norms = np.exp(np.random.default_rng(0).normal(0, 0.3, 40))
    assert guard.observe(window(40, norms=norms)) is None
    reading = guard.observe(window(44, norms=[1.0, 1.1, 30.0, 0.9]))
    assert reading is not None
    assert reading.evidence["spike_step"] == 43
    assert guard.observe(window(48, norms=[1.0, 0.9, 1.0, 1.0])) is None
    assert guard.observe(window(52, norms=[1.0, 40.0, 1.0, 1.0])) is not None


def test_unsteady_gradients_are_no_spikes() -> None:
    guard = GradientSpike()
    for seed in range(20):
        norms = np.exp(np.random.default_rng(seed).normal(0, 1.0, 50))
        assert guard.observe(window(50 * seed + 50, norms=norms)) is None


def test_entropy_of_the_data() -> None:
    guard = EntropyCollapse()
    healthy = [guard.observe(window(n, entropy=2.0 - 0.02 * n)) for n in range(20)]
    assert healthy == [None] * 20
    told = [guard.observe(window(n, entropy=0.5)) for n in range(20, 30)]
    assert sum(reading is not None for reading in told) == 1


def test_entropy_of_samples() -> None:
    guard = EntropyCollapse()
    assert guard.observe(generation(0)) is None
    assert guard.observe(generation(1, entropy=1.0)) is None
    assert guard.observe(generation(2, entropy=0.4)) is not None
    assert guard.observe(generation(3, entropy=0.4)) is None


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_numbers_that_are_none(bad: float) -> None:
    guard = NonFinite()
    assert guard.observe(window(1, loss=0.7, norms=[1.0])) is None
    reading = guard.observe(window(4, loss=0.7, norms=[1.0, bad, 1.0]))
    assert reading is not None
    assert "step 3" in reading.message
    assert guard.observe(window(5, loss=0.7, norms=[1.0])) is None
    assert guard.observe(window(6, loss=bad, norms=[1.0])) is not None


def test_rewards_that_are_none_are_seen_behind_a_filtered_loss() -> None:
    reading = NonFinite().observe(window(1, [0.1, math.nan], loss=0.7))
    assert reading is not None
    assert "rewards" in reading.message


# ---- held-out -------------------------------------------------------------------------------------------------------


def ratios(chosen: float, rejected: float) -> dict[str, Any]:
    rng = np.random.default_rng(1)
    return {"chosen": rng.normal(chosen, 1, NUM), "rejected": rng.normal(rejected, 1, NUM)}


@pytest.mark.parametrize(
    ("chosen", "rejected", "fires"),
    [(-20.0, -30.0, True), (-1.0, -3.0, False), (2.0, -30.0, False), (-20.0, -10.0, False)],
    ids=["displaced", "slightly below", "above", "margin shrinks"],
)
def test_displacement(chosen: float, rejected: float, fires: bool) -> None:
    guard = LikelihoodDisplacement()
    assert (guard.observe(heldout(1, **ratios(chosen, rejected))) is not None) == fires


def test_displacement_without_a_reference_starts_from_the_first_evaluation() -> None:
    guard = LikelihoodDisplacement()
    start: dict[str, Any] = {"chosen": np.full(NUM, -50.0), "rejected": np.full(NUM, -52.0), "has_reference": False}
    later: dict[str, Any] = {"chosen": np.full(NUM, -80.0), "rejected": np.full(NUM, -99.0), "has_reference": False}
    assert guard.observe(heldout(0, **start)) is None
    assert guard.observe(heldout(1, **start)) is None
    assert guard.observe(heldout(2, **later)) is not None


def test_single_answers_are_compared_by_their_means() -> None:
    """Unpaired data have a log-ratio on one side of every row only."""
    found = ratios(-20.0, -30.0)
    for place, name in enumerate(("chosen", "rejected")):
        found[name][place::2] = np.nan
    assert LikelihoodDisplacement().observe(heldout(1, **found)) is not None


def test_length_that_explains_the_reward() -> None:
    lengths: dict[str, Any] = {
        name: np.random.default_rng(seed).integers(10, 60, NUM)
        for seed, name in enumerate(("chosen_length", "rejected_length"))
    }
    noise = np.random.default_rng(2).normal(size=(2, NUM))
    for slope, fires in ((0.2, True), (-0.2, False), (0.02, False)):
        chosen, rejected = (slope * each + n for each, n in zip(lengths.values(), noise, strict=True))
        guard = LengthExploitation()
        assert guard.observe(heldout(1, chosen=chosen, rejected=rejected, **lengths)) is None
        reading = guard.observe(heldout(2, chosen=chosen, rejected=rejected, **lengths))
        assert (reading is not None) == fires


def test_samples_that_grow() -> None:
    guard = LengthExploitation()
    assert guard.observe(generation(0)) is None
    assert guard.observe(generation(1, length=29.0)) is None
    assert guard.observe(generation(2, length=32.0)) is not None


def margins(mean: float, seed: int = 5) -> Any:
    return mean + np.random.default_rng(seed).normal(size=NUM)


def test_overfitting_where_held_out_quality_falls() -> None:
    guard = Overfitting()
    assert guard.observe(heldout(1, noisy(0.2, 1), margin=margins(0.8))) is None
    assert guard.observe(heldout(2, noisy(0.5, 2), margin=margins(0.79))) is None
    assert guard.observe(heldout(3, noisy(0.6, 3), margin=margins(0.3))) is not None
    assert guard.observe(heldout(4, noisy(0.6, 4), margin=margins(0.3))) is None


def test_overfitting_where_held_out_quality_stands_still_far_below() -> None:
    guard = Overfitting()
    assert guard.observe(heldout(1, noisy(0.1, 1), margin=margins(0.3))) is None
    assert guard.observe(heldout(2, noisy(2.0, 2), margin=margins(0.3))) is not None


def test_no_overfitting_while_both_improve_or_the_training_margin_rests() -> None:
    guard = Overfitting()
    for step, mean in enumerate((0.1, 0.3, 0.5, 0.7)):
        assert guard.observe(heldout(step, noisy(mean, step), margin=margins(mean + 0.1))) is None
    guard = Overfitting()
    assert guard.observe(heldout(1, noisy(0.5, 1), margin=margins(0.8))) is None
    assert guard.observe(heldout(2, noisy(0.2, 2), margin=margins(0.3))) is None


def test_other_held_out_data_are_not_compared_pair_by_pair() -> None:
    guard = Overfitting()
    assert guard.observe(heldout(1, noisy(0.2, 1), margin=margins(0.8))) is None
    others: dict[str, Any] = {"chosen_length": np.full(NUM, 7)}
    assert guard.observe(heldout(2, noisy(0.6, 2), margin=margins(0.1), **others)) is None


def test_over_optimisation_needs_kl_and_loss_of_quality_together() -> None:
    for kl, quality, fires in ((8.0, 0.3, True), (8.0, 0.8, False), (1.0, 0.3, False)):
        guard = OverOptimisation()
        assert guard.observe(heldout(1, margin=margins(0.8), generation=generation(1, kl=1.0))) is None
        later = heldout(2, margin=margins(quality), generation=generation(2, kl=kl))
        assert (guard.observe(later) is not None) == fires


def test_kl_beyond_its_budget_counts_only_where_it_is_known_well() -> None:
    assert OverOptimisation().observe(generation(1, kl=40.0)) is not None
    assert OverOptimisation().observe(generation(1, kl=40.0, spread=200.0)) is None
    assert OverOptimisation().observe(generation(1, kl=10.0)) is None


def test_over_optimisation_sees_samples_that_the_reference_would_not_write() -> None:
    guard = OverOptimisation()
    assert guard.observe(generation(1, tail=0.01)) is None  # as many as the reference itself may write
    assert guard.observe(generation(2, tail=0.0105)) is None  # more, but not with certainty
    alarm = guard.observe(generation(3, tail=0.03))
    assert alarm is not None
    assert "3.0 % of them among the 1 % it is least likely to write" in alarm.message
    assert guard.observe(generation(4, tail=0.02)) is None  # told already
    assert guard.observe(generation(5, tail=0.008)) is None  # over
    assert guard.observe(generation(6, tail=0.03)) is not None


def test_samples_that_are_surely_but_hardly_different_are_no_alarm() -> None:
    # 1.3 % with an interval above 1 %: a trained policy is never its reference, and enough samples would tell any two.
    near = generation(1, tail=0.013)
    assert t_interval(near.tail_shares).low() > 0.01
    assert OverOptimisation().observe(near) is None
    assert OverOptimisation().observe(generation(1, tail=0.016)) is not None


# ---- episodes and state ---------------------------------------------------------------------------------------------


class _Scripted(Guard):
    name, cause, remedy, source = "reward_jump", "-", "-", "-"

    def on_window(self, window: Window) -> Reading:
        value = window.logs["x"]
        return Reading(firing=value > 2, clear=value < 1)


def test_hysteresis() -> None:
    guard = _Scripted()
    told = [guard.observe(window(n, x=x)) is not None for n, x in enumerate((0, 3, 3, 1.5, 3, 0.5, 1.5, 3))]
    assert told == [False, True, False, False, False, False, False, True]


def test_state_goes_through_json_at_any_point() -> None:
    """A guard that is rebuilt from its state before every reading says what one says that lives on."""
    evidence: list[Any] = []
    for step in range(1, 25):
        growth = 0.05 * step if step < 12 else 2.0
        evidence.append(
            window(step, noisy(growth, step), norms=[1.0, 1.0, 50.0 if step == 20 else 1.0], entropy=2 - step / 13)
        )
        evidence.append(generation(step, kl=step, length=20 + step / 2, entropy=1.5 - step / 18))
        evidence.append(
            heldout(
                step,
                noisy(growth, step),
                margin=margins(1 - step / 25),
                generation=evidence[-1],
                **ratios(-step, -2 * step),
            )
        )
    for kind in (
        RewardJump,
        EntropyCollapse,
        GradientSpike,
        NonFinite,
        LikelihoodDisplacement,
        LengthExploitation,
        Overfitting,
        OverOptimisation,
    ):
        living, told, again = kind(), [], []
        state = kind().state()
        for each in evidence:
            told.append(living.observe(each))
            rebuilt = kind()
            rebuilt.load(json.loads(json.dumps(state, allow_nan=False)))
            again.append(rebuilt.observe(each))
            state = rebuilt.state()
        assert [each is not None for each in told] == [each is not None for each in again]
        if kind is not NonFinite:
            assert any(each is not None for each in told), kind.name
