"""Symmetries that follow from the definitions, on drawn numbers."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from preftune.objectives import (
    METHODS,
    PairLogps,
    alpha_divergence,
    build_objective,
    forward_kl,
    js_divergence,
    reverse_kl,
)
from preftune.objectives.numerics import MAX_EXPONENT, guarded_exp, log_odds, power_score

LOGP = st.floats(-200.0, -0.01)
BETA = st.floats(0.01, 2.0)
SMOOTHING = st.floats(0.0, 0.45)
LENGTH = st.integers(1, 50)
DIFFERENCE = [name for name, spec in METHODS.items() if "f_divergence_type" in spec.knobs]
WITH_REFERENCE = [name for name, spec in METHODS.items() if spec.needs_reference and spec.paired]


@st.composite
def batches(draw: st.DrawFn, equal_lengths: bool = False) -> PairLogps:
    size = draw(st.integers(1, 4))

    def column(strategy: st.SearchStrategy[float] | st.SearchStrategy[int]) -> Tensor:
        return torch.tensor(draw(st.lists(strategy, min_size=size, max_size=size)), dtype=torch.float64)

    lengths = column(LENGTH)
    return PairLogps(
        chosen_logps=column(LOGP),
        rejected_logps=column(LOGP),
        ref_chosen_logps=column(LOGP),
        ref_rejected_logps=column(LOGP),
        chosen_lengths=lengths,
        rejected_lengths=lengths if equal_lengths else column(LENGTH),
        margins=column(st.floats(0.05, 1.0)),
    )


def loss_of(name: str, batch: PairLogps, beta: float, **knobs: Any) -> Tensor:
    return build_objective(name, beta=beta, **knobs)(batch).loss


def swapped(batch: PairLogps) -> PairLogps:
    ref_chosen, ref_rejected = batch.ref_logps
    return replace(
        batch,
        chosen_logps=batch.rejected_logps,
        rejected_logps=batch.chosen_logps,
        ref_chosen_logps=ref_rejected,
        ref_rejected_logps=ref_chosen,
        chosen_lengths=batch.rejected_lengths,
        rejected_lengths=batch.chosen_lengths,
    )


def close(left: Tensor, right: Tensor) -> None:
    torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-9)


@pytest.mark.thin(7)
@pytest.mark.parametrize("name", WITH_REFERENCE)
@given(batch=batches(), beta=BETA, shift=st.floats(-50.0, 50.0))
def test_only_the_difference_to_the_reference_counts(name: str, batch: PairLogps, beta: float, shift: float) -> None:
    ref_chosen, ref_rejected = batch.ref_logps
    moved = replace(
        batch,
        chosen_logps=batch.chosen_logps + shift,
        ref_chosen_logps=ref_chosen + shift,
        rejected_logps=batch.rejected_logps - shift,
        ref_rejected_logps=ref_rejected - shift,
    )
    if name == "aot":
        # AOT sorts the margins of policy and reference apart, so a shift common to both pairs is what it ignores.
        moved = replace(batch, chosen_logps=batch.chosen_logps + shift, ref_chosen_logps=ref_chosen + shift)
    torch.testing.assert_close(loss_of(name, moved, beta), loss_of(name, batch, beta), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", DIFFERENCE)
@given(batch=batches(equal_lengths=True), beta=BETA, shift=st.floats(-50.0, 50.0))
def test_difference_losses_ignore_a_common_shift(name: str, batch: PairLogps, beta: float, shift: float) -> None:
    """Raising both completions leaves a difference as it is: the reason why a divergence is defined for these alone."""
    moved = replace(batch, chosen_logps=batch.chosen_logps + shift, rejected_logps=batch.rejected_logps + shift)
    torch.testing.assert_close(loss_of(name, moved, beta), loss_of(name, batch, beta), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", [name for name in WITH_REFERENCE if name not in DIFFERENCE])
def test_the_other_losses_do_not_ignore_a_common_shift(name: str) -> None:
    ones, lengths = torch.tensor([1.0, 2.0]), torch.ones(2)
    batch = PairLogps(
        chosen_logps=-ones,
        rejected_logps=-ones,
        ref_chosen_logps=-2 * ones,
        ref_rejected_logps=-ones,
        chosen_lengths=lengths,
        rejected_lengths=lengths,
        margins=lengths,
    )
    moved = replace(batch, chosen_logps=batch.chosen_logps - 3.0, rejected_logps=batch.rejected_logps - 3.0)
    if name in ("aot", "aot_unpaired"):  # defined on differences too, but of sorted columns, so without a divergence
        close(loss_of(name, moved, 0.5), loss_of(name, batch, 0.5))
        return
    assert not torch.isclose(loss_of(name, moved, 0.5), loss_of(name, batch, 0.5)).any()


@given(batch=batches(), beta=BETA)
def test_swapping_a_pair_moves_dpo_by_the_reward_margin(batch: PairLogps, beta: float) -> None:
    """-log sigmoid(-h) + log sigmoid(h) = h."""
    margin = beta * (batch.chosen_logratios - batch.rejected_logratios)
    close(loss_of("sigmoid", swapped(batch), beta) - loss_of("sigmoid", batch, beta), margin)


@given(batch=batches(), beta=BETA, flip=SMOOTHING)
@pytest.mark.parametrize("name", ["sigmoid", "sigmoid_norm", "aot_unpaired"])
def test_smoothing_mixes_a_pair_with_its_swap(name: str, batch: PairLogps, beta: float, flip: float) -> None:
    if name == "aot_unpaired":
        batch = batch.select(slice(0, 1))  # the swap is per pair only where nothing is sorted
    mixed = (1 - flip) * loss_of(name, batch, beta) + flip * loss_of(name, swapped(batch), beta)
    close(loss_of(name, batch, beta, label_smoothing=flip), mixed)


@given(batch=batches(), beta=BETA, flip=SMOOTHING)
def test_robust_is_unbiased_under_label_flips(batch: PairLogps, beta: float, flip: float) -> None:
    """The defining property: averaged over flips with probability e, it is the DPO loss on the clean pair."""
    kept = loss_of("robust", batch, beta, label_smoothing=flip)
    flipped = loss_of("robust", swapped(batch), beta, label_smoothing=flip)
    torch.testing.assert_close(
        (1 - flip) * kept + flip * flipped, loss_of("sigmoid", batch, beta), rtol=1e-7, atol=1e-7
    )


@given(batch=batches(), beta=BETA)
def test_swap_symmetry_of_squares(batch: PairLogps, beta: float) -> None:
    """IPO's square around the margin m = 1/(2 beta): L(swap) - L = 4 m x difference."""
    delta = batch.chosen_logratios / batch.chosen_lengths - batch.rejected_logratios / batch.rejected_lengths
    moved = loss_of("ipo", swapped(batch), beta) - loss_of("ipo", batch, beta)
    torch.testing.assert_close(moved, 2.0 / beta * delta, rtol=1e-7, atol=1e-6)


@given(batch=batches(), beta=BETA, epsilon=st.floats(1e-3, 0.49))
def test_exo_is_a_divergence(batch: PairLogps, beta: float, epsilon: float) -> None:
    """Not negative, and zero where sigmoid(h) = 1 - epsilon."""
    assert (loss_of("exo_pair", batch, beta, label_smoothing=epsilon) >= -1e-12).all()
    matched = math.log((1 - epsilon) / epsilon) / beta
    ref_chosen, ref_rejected = batch.ref_logps
    optimum = replace(batch, chosen_logps=ref_chosen + matched, rejected_logps=ref_rejected)
    close(loss_of("exo_pair", optimum, beta, label_smoothing=epsilon), torch.zeros_like(batch.chosen_logps))


@given(batch=batches(), beta=BETA)
def test_limits_between_methods(batch: PairLogps, beta: float) -> None:
    dpo = loss_of("sigmoid", batch, beta)
    close(loss_of("robust", batch, beta), dpo)
    close(loss_of("dpop", batch, beta, dpop_lambda=0.0), dpo)
    close(loss_of("odpo", batch, beta, odpo_alpha=0.0), dpo)
    certain = replace(batch, margins=torch.ones_like(batch.chosen_logps))
    close(loss_of("sppo_soft", certain, beta), loss_of("sppo_hard", batch, beta))
    close(loss_of("alphapo", batch, beta, alpha=0.0), loss_of("simpo", batch, beta))
    single = batch.select(slice(0, 1))
    close(loss_of("aot", single, beta), loss_of("sigmoid", single, beta))
    close(loss_of("aot_unpaired", single, beta), loss_of("sigmoid", single, beta))


@given(ratio=st.floats(-20.0, 20.0))
def test_divergences_are_f_prime(ratio: float) -> None:
    """Each score is f'(t) at t = exp(r), from the table of the paper."""
    r, t = torch.tensor(ratio, dtype=torch.float64), math.exp(ratio)
    assert reverse_kl(r).item() == ratio
    assert forward_kl(r).item() == pytest.approx(1 - 1 / t, rel=1e-9, abs=1e-12)
    assert js_divergence(r).item() == pytest.approx(math.log(2 * t / (1 + t)), rel=1e-9, abs=1e-9)
    for alpha in (0.5, 2.0, -0.5):
        expected = (t ** (alpha - 1) - 1) / (alpha - 1)
        assert alpha_divergence(r, alpha).item() == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert alpha_divergence(r, 0.0).item() == forward_kl(r).item()


@given(ratio=st.floats(-50.0, 50.0), gap=st.sampled_from([1e-3, 1e-6, 1e-9, 1e-13, 0.0]))
def test_alpha_divergence_tends_to_reverse_kl(ratio: float, gap: float) -> None:
    """The error of the limit is (alpha - 1) r^2 / 2 to first order, on both sides and through 1 itself."""
    r = torch.tensor(ratio, dtype=torch.float64)
    for alpha in (1 + gap, 1 - gap):
        assert abs(alpha_divergence(r, alpha).item() - ratio) <= gap * ratio * ratio + 1e-6 * abs(ratio) + 1e-300


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"])
def test_scores_increase_with_the_log_ratio(name: str) -> None:
    """Also past the point where exp overflows: a clamp would leave the worst pairs without any gradient."""
    r = torch.tensor([-1e4, -1e3, -100.0, -33.0, -31.0, -1.0, 0.0, 1.0, 20.0], requires_grad=True)
    functions = {"reverse_kl": reverse_kl, "forward_kl": forward_kl, "js_divergence": js_divergence}
    scores = alpha_divergence(r, 0.5) if name == "alpha_divergence" else functions[name](r)
    (slope,) = torch.autograd.grad(scores.sum(), [r])
    assert (scores.diff() > 0).all()
    assert (slope[:6] > 0).all()


def test_guarded_exp_is_exp_below_and_its_tangent_above() -> None:
    x = torch.tensor(
        [-1e4, -3.0, 0.0, MAX_EXPONENT - 1e-3, MAX_EXPONENT + 1.0], dtype=torch.float64, requires_grad=True
    )
    values = guarded_exp(x)
    (slope,) = torch.autograd.grad(values.sum(), [x])
    top = math.exp(MAX_EXPONENT)
    assert torch.equal(values[:4], x[:4].exp())
    assert values[4].item() == pytest.approx(2 * top)
    assert slope.tolist() == pytest.approx([0.0, math.exp(-3.0), 1.0, math.exp(MAX_EXPONENT - 1e-3), top])


@given(logp=st.floats(-500.0, -1e-6))
def test_log_odds_against_double_arithmetic(logp: float) -> None:
    expected = logp - math.log(-math.expm1(logp))
    assert log_odds(torch.tensor(logp, dtype=torch.float64)).item() == pytest.approx(expected, rel=1e-12, abs=1e-12)
    assert log_odds(torch.tensor(logp)).item() == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_log_odds_of_certainty_is_large_and_finite() -> None:
    x = torch.tensor([0.0, 1e-9], requires_grad=True)
    values = log_odds(x)
    (slope,) = torch.autograd.grad(values.sum(), [x])
    assert (values > 15).all()
    assert values.isfinite().all()
    assert slope.isfinite().all()


def test_power_score_does_not_cancel() -> None:
    """(exp(1e-7 x) - 1) / 1e-7 in float32 would be 0 or off by ten per cent."""
    assert power_score(torch.tensor(0.5), 1e-7).item() == pytest.approx(0.5, rel=1e-6)
