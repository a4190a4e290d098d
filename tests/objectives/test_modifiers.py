"""LD-DPO's and WPO's weights, BCO's state, KTO's balance, margin columns."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.objectives.cases import pairs

from preftune.errors import ConfigError, DataError
from preftune.objectives import (
    BCOState,
    build_objective,
    check_kto_weights,
    check_odpo_margins,
    check_win_gaps,
    kl_baseline,
    kl_baseline_from_sum,
    ld_token_weights,
    ld_weights,
    wpo_weight,
)


@given(
    lengths=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=5),
    alpha=st.sampled_from([0.0, 0.25, 1.0]),
)
def test_ld_weights_against_a_loop(lengths: list[tuple[int, int]], alpha: float) -> None:
    own, other = torch.tensor([pair[0] for pair in lengths]), torch.tensor([pair[1] for pair in lengths])
    expected = [1.0 if token < min(pair) else alpha for pair in lengths for token in range(pair[0])]
    assert ld_weights(own, other, alpha).tolist() == expected


def test_ld_weights_are_checked() -> None:
    with pytest.raises(DataError, match="integer"):
        ld_weights(torch.ones(2), torch.ones(2), 0.5)
    with pytest.raises(DataError, match="one shape"):
        ld_weights(torch.tensor([1, 2]), torch.tensor([1]), 0.5)
    with pytest.raises(ConfigError, match="ld_alpha"):
        ld_weights(torch.tensor([1]), torch.tensor([1]), 1.5)
    with pytest.raises(DataError, match="broadcast"):
        ld_token_weights(torch.zeros(2, 3), torch.zeros(2, 1), 0.5)


def test_wpo_weight_is_one_for_uniform_tokens() -> None:
    """A policy that is uniform over V tokens: log pi = -log V and sum pi^2 = 1/V, so a(y_t) = 0."""
    aligned = torch.full((3,), 5 * (-math.log(50.0) - math.log(1 / 50.0)))
    lengths = torch.full((3,), 5)
    assert wpo_weight(aligned, aligned, lengths, lengths).tolist() == pytest.approx([1.0] * 3)


def test_wpo_weight_has_no_gradient_and_upcasts() -> None:
    aligned = torch.zeros(2, dtype=torch.bfloat16, requires_grad=True)
    weight = wpo_weight(aligned, aligned, torch.tensor([0, 3]), torch.tensor([1, 3]))
    assert not weight.requires_grad
    assert weight.dtype == torch.float32
    assert weight.isfinite().all()
    with pytest.raises(DataError, match="one shape"):
        wpo_weight(aligned, aligned, torch.tensor([1]), torch.tensor([1, 3]))


def test_bco_state_is_the_mean_of_all_rewards() -> None:
    """However the steps are cut, the state holds the plain mean, and it survives JSON."""
    rewards = torch.arange(12, dtype=torch.float64)
    state = BCOState()
    assert state.delta == 0.0
    for step in (rewards[:5], rewards[5:6], rewards[6:]):
        state = state.update(reward_sum=float(step.sum()), num_rewards=len(step))
    assert state.delta == pytest.approx(rewards.mean().item())
    assert BCOState(**vars(state)) == state
    with pytest.raises(ConfigError, match="running mean"):
        state.update(reward_sum=float("nan"), num_rewards=1)
    with pytest.raises(ConfigError, match="running mean"):
        state.update(reward_sum=0.0, num_rewards=-1)


def test_bco_with_its_state_does_not_depend_on_the_split() -> None:
    """Two steps of training-loop arithmetic, one batch a step against three: same losses, same state."""
    objective = build_objective("bco_pair", beta=0.3, bco_running_delta=True)
    losses = []
    for cuts in ([slice(0, 6)], [slice(0, 1), slice(1, 4), slice(4, 6)]):
        state, seen = BCOState(), []
        for seed in (1, 2):
            step, total, reward_sum, count = pairs(6, seed=seed), 0.0, 0.0, 0
            for cut in cuts:
                batch = step.select(cut)
                total += objective(batch, bco_delta=state.delta).loss.sum().item()
                for side in objective.rewards(batch):
                    reward_sum, count = reward_sum + side.sum().item(), count + len(side)
            state = state.update(reward_sum=reward_sum, num_rewards=count)
            seen.append(total)
        losses.append([*seen, state.delta])
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


@pytest.mark.parametrize(
    ("num_good", "num_bad", "desirable", "undesirable", "fits"),
    [
        (100, 100, 1.0, 1.0, True),
        (4, 3, 1.0, 1.0, True),  # exactly 4/3
        (400, 299, 1.0, 1.0, False),
        (100, 101, 1.0, 1.0, False),
        (100, 400, 4.0, 1.0, True),
        (100, 400, 5.33, 1.0, True),
        (100, 400, 5.34, 1.0, False),
        (100, 400, 1.0, 0.25, True),
        (0, 10, 1.0, 1.0, False),
        (10, 0, 1.0, 1.0, False),
        (10, 10, 1.0, 0.0, False),
    ],
)
def test_kto_balance(num_good: int, num_bad: int, desirable: float, undesirable: float, fits: bool) -> None:
    message = check_kto_weights(num_good, num_bad, desirable, undesirable)
    assert (message is None) is fits


def test_kto_advice_is_right() -> None:
    """Both ends of both ranges that the message names satisfy the rule."""
    message = check_kto_weights(120, 500, 1.0, 0.8)
    assert message is not None
    ranges = [part.split("]")[0].split(", ") for part in message.split(" in [")[1:]]
    (low, high), (other_low, other_high) = [(float(a), float(b)) for a, b in ranges]
    for weight in (low * 1.01, high * 0.99):
        assert check_kto_weights(120, 500, weight, 0.8) is None
    for weight in (other_low * 1.01, other_high * 0.99):
        assert check_kto_weights(120, 500, 1.0, weight) is None


def test_kl_baseline_from_parts_equals_the_whole() -> None:
    policy, reference = -torch.rand(7), -torch.rand(7) - 1.0
    whole = kl_baseline(policy, reference)
    total = (policy[:3] - reference[:3]).sum() + (policy[3:] - reference[3:]).sum()
    torch.testing.assert_close(kl_baseline_from_sum(total, 7), whole)
    torch.testing.assert_close(kl_baseline_from_sum(total, torch.tensor(7)), whole)
    with pytest.raises(DataError, match="at least one"):
        kl_baseline(torch.zeros(0), torch.zeros(0))
    with pytest.raises(DataError, match="one shape"):
        kl_baseline(torch.zeros(2), torch.zeros(1))


@pytest.mark.parametrize("bad", [0.0, -0.5, float("nan"), float("inf")])
def test_odpo_margins(bad: float) -> None:
    margins = torch.tensor([1.0, 2.0, bad])
    with pytest.raises(DataError, match="margin of row 2"):
        check_odpo_margins(margins)
    with pytest.raises(DataError, match="margin of row 2"):
        build_objective("odpo", beta=0.1)(pairs(3, margins=margins))
    if math.isfinite(bad):
        check_odpo_margins(margins, "identity")
        assert (
            build_objective("odpo", beta=0.1, odpo_transform="identity")(pairs(3, margins=margins))
            .loss.isfinite()
            .all()
        )


def test_an_objective_checks_the_whole_column() -> None:
    tied = torch.tensor([1.0, 0.0])
    build_objective("sigmoid", beta=0.1).check_margins(tied)
    build_objective(["odpo", "sft"], beta=0.1, odpo_transform="identity").check_margins(tied)
    with pytest.raises(DataError, match="margin of row 1"):
        build_objective(["sft", "odpo"], beta=0.1).check_margins(tied)
    with pytest.raises(DataError, match="margin of row 0"):
        build_objective("sppo_soft", beta=0.1).check_margins(tied + 1.0)


@pytest.mark.parametrize("bad", [1.01, -1.5, float("nan")])
def test_win_gaps(bad: float) -> None:
    check_win_gaps(torch.tensor([-1.0, 0.0, 1.0]))
    with pytest.raises(DataError, match="margin of row 1"):
        build_objective("sppo_soft", beta=0.1)(pairs(2, margins=torch.tensor([0.5, bad])))
