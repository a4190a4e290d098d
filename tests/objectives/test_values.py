"""Values worked out by hand from the papers' formulas, with the arithmetic written down.

One pair throughout: log pi(w) = -4, log pi(l) = -9, log pi_ref(w) = -6, log pi_ref(l) = -8, so r_w = 2 and r_l = -1;
|w| = 2, |l| = 4 tokens; score gap 0.5. With beta = 0.5: h = 0.5 * (2 + 1) = 1.5.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from preftune.objectives import METHODS, PairLogps, UnpairedLogps, build_objective, kl_baseline, kto


def softplus(x: float) -> float:
    """-log sigmoid(-x) in double precision."""
    return math.log1p(math.exp(x))


def s(x: float) -> float:
    """The logistic function."""
    return 1.0 / (1.0 + math.exp(-x))


def odds(p: float) -> float:
    """P / (1 - p)."""
    return p / (1.0 - p)


E = math.exp
LOG2 = math.log(2.0)
HALF_KL_SCORES = (1 - E(-2.0)) - (1 - E(1.0))  # forward KL: 1 - 1/t at t = e^2 and t = e^-1
JS_SCORES = math.log(2 * E(2.0) / (1 + E(2.0))) - math.log(2 * E(-1.0) / (1 + E(-1.0)))
# alpha = 0.5: (t^-0.5 - 1) / -0.5 = 2 (1 - 1/sqrt(t))
ALPHA_SCORES = 2 * (1 - E(-1.0)) - 2 * (1 - E(0.5))

HAND = [
    ("sigmoid", {}, softplus(-1.5)),
    ("sigmoid", {"label_smoothing": 0.1}, 0.9 * softplus(-1.5) + 0.1 * softplus(1.5)),
    ("sigmoid", {"f_divergence_type": "forward_kl"}, softplus(-0.5 * HALF_KL_SCORES)),
    ("sigmoid", {"f_divergence_type": "js_divergence"}, softplus(-0.5 * JS_SCORES)),
    ("sigmoid", {"f_divergence_type": "alpha_divergence"}, softplus(-0.5 * ALPHA_SCORES)),
    # r_w / 2 - r_l / 4 = 1 + 0.25
    ("sigmoid_norm", {}, softplus(-0.5 * 1.25)),
    ("sigmoid_norm", {"f_divergence_type": "forward_kl"}, softplus(-0.5 * ((1 - E(-2)) / 2 - (1 - E(1)) / 4))),
    ("robust", {"label_smoothing": 0.2}, (0.8 * softplus(-1.5) - 0.2 * softplus(1.5)) / 0.6),
    ("exo_pair", {"label_smoothing": 0.25}, s(1.5) * math.log(s(1.5) / 0.75) + s(-1.5) * math.log(s(-1.5) / 0.25)),
    # beta r_w = 1, beta r_l = -0.5
    ("nca_pair", {}, softplus(-1.0) + 0.5 * softplus(1.0) + 0.5 * softplus(-0.5)),
    ("discopop", {"discopop_tau": 0.5}, s(-3.0) * softplus(-1.5) + s(3.0) * E(-1.5)),
    # the chosen log-ratio is positive: no penalty (the other sign is below)
    ("dpop", {"dpop_lambda": 7.0}, softplus(-1.5)),
    ("odpo", {"odpo_alpha": 0.3}, softplus(-(1.5 - 0.3 * math.log(0.5)))),
    ("odpo", {"odpo_alpha": 0.3, "odpo_transform": "identity"}, softplus(-(1.5 - 0.3 * 0.5))),
    ("hinge", {}, 0.0),  # 1 - 1.5 < 0
    ("ipo", {}, (1.25 - 1.0) ** 2),  # 1 / (2 beta) = 1
    ("ipo", {"ipo_normalize": False}, (3.0 - 1.0) ** 2),
    ("sppo_hard", {}, (2.0 - 1.0) ** 2 + (-1.0 + 1.0) ** 2),
    # gap 0.5 means p = 0.75: targets +-(0.75 - 0.5) / 0.5 = +-0.5
    ("sppo_soft", {}, (2.0 - 0.5) ** 2 + (-1.0 + 0.5) ** 2),
    ("aot", {}, softplus(-1.5)),  # one pair: sorting changes nothing
    ("aot_unpaired", {"label_smoothing": 0.1}, 0.9 * softplus(-1.5) + 0.1 * softplus(1.5)),
    ("apo_zero", {}, (1 - s(1.0)) + s(-0.5)),
    ("apo_down", {}, s(1.0) + (1 - s(1.5))),
    ("bco_pair", {}, softplus(-1.0) + softplus(-0.5)),
    # avg log p: -4/2 = -2 and -9/4 = -2.25; NLL 4 nats over 2 tokens
    ("orpo", {}, 2.0 + 0.5 * softplus(-(math.log(odds(E(-2.0))) - math.log(odds(E(-2.25)))))),
    ("simpo", {"simpo_gamma": 0.3}, softplus(-(0.5 * 0.25 - 0.3))),
    ("simpo", {"simpo_gamma": 0.3, "cpo_alpha": 0.7}, softplus(-(0.5 * 0.25 - 0.3)) + 0.7 * 2.0),
    # (1 - p^-0.25) / 0.25 with p^-0.25 = e^0.5 and e^0.5625
    ("alphapo", {"alpha": 0.25}, softplus(-(0.5 * ((1 - E(0.5)) / 0.25 - (1 - E(0.5625)) / 0.25) - 0.5))),
    ("cpo", {}, softplus(-0.5 * 5.0) + 2.0),
    ("cpo", {"label_smoothing": 0.1, "cpo_alpha": 0.0}, 0.9 * softplus(-2.5) + 0.1 * softplus(2.5)),
    ("cpo_hinge", {}, 0.0 + 2.0),
    ("cpo_ipo", {}, (0.25 - 1.0) ** 2 + 2.0),
    ("sft", {}, 2.0),
]


def one_pair(**overrides: Any) -> PairLogps:
    values = {
        "chosen_logps": -4.0,
        "rejected_logps": -9.0,
        "ref_chosen_logps": -6.0,
        "ref_rejected_logps": -8.0,
        "chosen_lengths": 2.0,
        "rejected_lengths": 4.0,
        "margins": 0.5,
        **overrides,
    }
    return PairLogps(**{name: torch.tensor([value], dtype=torch.float64) for name, value in values.items()})


@pytest.mark.parametrize(("name", "knobs", "expected"), HAND)
def test_hand_value(name: str, knobs: dict[str, Any], expected: float) -> None:
    loss = build_objective(name, beta=0.5, **knobs)(one_pair()).loss
    assert loss.item() == pytest.approx(expected, rel=1e-12, abs=1e-14)


def test_every_paired_method_has_a_hand_value() -> None:
    assert {name for name, _, _ in HAND} == {name for name, spec in METHODS.items() if spec.paired}


def test_dpop_penalises_a_chosen_answer_below_the_reference() -> None:
    # r_w = -7 + 6 = -1, r_l = -1: h = 0, penalty 0.5 * 7 * 1 = 3.5
    batch = one_pair(chosen_logps=-7.0)
    assert build_objective("dpop", beta=0.5, dpop_lambda=7.0)(batch).loss.item() == pytest.approx(softplus(3.5))


def test_hinge_below_its_margin() -> None:
    # beta 0.1: 1 - 0.1 * 3
    assert build_objective("hinge", beta=0.1)(one_pair()).loss.item() == pytest.approx(0.7)


def test_bco_shift() -> None:
    # beta r_w - delta = 1 - 0.25, -(beta r_l - delta) = 0.5 + 0.25
    loss = build_objective("bco_pair", beta=0.5, bco_running_delta=True)(one_pair(), bco_delta=0.25).loss
    assert loss.item() == pytest.approx(2 * softplus(-0.75))


def test_losses_at_the_reference() -> None:
    """Where policy and reference agree, the loss is a known constant: the first number that training prints."""
    batch = one_pair(chosen_logps=-6.0, rejected_logps=-8.0)
    expected = {
        "sigmoid": LOG2,
        "sigmoid_norm": LOG2,
        "robust": LOG2,
        "nca_pair": 2 * LOG2,
        "discopop": 0.5 * LOG2 + 0.5,
        "dpop": LOG2,
        "hinge": 1.0,
        "ipo": 25.0,
        "sppo_hard": 50.0,
        "aot": LOG2,
        "aot_unpaired": LOG2,
        "apo_zero": 1.0,
        "apo_down": 1.0,
        "bco_pair": 2 * LOG2,
    }
    for name, value in expected.items():
        assert build_objective(name, beta=0.1)(batch).loss.item() == pytest.approx(value, rel=1e-12), name


def test_aot_sorts() -> None:
    # log-ratios chosen (3, 1), rejected (0, 2): sorted differences 1 - 0 and 3 - 2
    def column(*values: float) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64)

    zeros, lengths = column(0.0, 0.0), column(1.0, 1.0)
    batch = PairLogps(
        chosen_logps=column(3.0, 1.0),
        rejected_logps=column(0.0, 2.0),
        ref_chosen_logps=zeros,
        ref_rejected_logps=zeros,
        chosen_lengths=lengths,
        rejected_lengths=lengths,
    )
    loss = build_objective("aot_unpaired", beta=1.0)(batch).loss
    assert loss.tolist() == pytest.approx([softplus(-1.0), softplus(-1.0)])
    # paired: policy margins (3, -1) sorted (-1, 3), reference margins (0, 0)
    paired = build_objective("aot", beta=1.0)(batch).loss
    assert paired.tolist() == pytest.approx([softplus(1.0), softplus(-3.0)])


def test_sft_is_the_token_mean_of_the_whole_step() -> None:
    """Split 2 + 1, pairs of 1, 3 and 8 tokens: the parts add up to (2 + 9 + 4) / 12 nats per token."""
    step = PairLogps(
        chosen_logps=torch.tensor([-2.0, -9.0, -4.0]),
        rejected_logps=torch.zeros(3),
        chosen_lengths=torch.tensor([1, 3, 8]),
        rejected_lengths=torch.ones(3),
    )
    objective = build_objective("sft", beta=0.1)
    parts = [objective(step.select(part)).loss.sum() for part in (slice(0, 2), slice(2, 3))]
    assert (torch.stack(parts).sum() / 3).item() == pytest.approx(15 / 12)


def test_sft_term_counts_its_own_sum_and_tokens() -> None:
    """The sum behind the SFT term may differ from the scored one: down-weighted tails, or a prompt for ORPO."""
    batch = one_pair(chosen_sum_logps=-10.0, chosen_scored=5.0)
    assert build_objective("sft", beta=0.5)(batch).loss.item() == pytest.approx(2.0)
    assert build_objective("cpo", beta=0.5)(batch).loss.item() == pytest.approx(softplus(-2.5) + 2.0)


def test_kto_by_hand() -> None:
    batch = UnpairedLogps(
        logps=torch.tensor([-4.0, -9.0], dtype=torch.float64),
        ref_logps=torch.tensor([-6.0, -8.0], dtype=torch.float64),
        labels=torch.tensor([True, False]),
    )
    # kl 0.4: desirable 0.5 (2 - 0.4) = 0.8; undesirable 0.5 (0.4 + 1) = 0.7
    loss = kto(batch, beta=0.5, kl=0.4, desirable_weight=1.2, undesirable_weight=0.9)
    assert loss.tolist() == pytest.approx([1.2 * (1 - s(0.8)), 0.9 * (1 - s(0.7))])
    unpaired = build_objective("apo_zero_unpaired", beta=0.5)(batch).loss
    assert unpaired.tolist() == pytest.approx([1 - s(1.0), s(-0.5)])


@pytest.mark.parametrize(("policy", "expected"), [([-1.0, -5.0], 1.0), ([-7.0, -9.0], 0.0)])
def test_kl_baseline_is_clamped_after_the_mean(policy: list[float], expected: float) -> None:
    # log-ratios (3, -1) have the mean 1, although one is negative; (-3, -5) have a negative mean
    baseline = kl_baseline(torch.tensor(policy, requires_grad=True), torch.tensor([-4.0, -4.0]))
    assert baseline.item() == expected
    assert not baseline.requires_grad
