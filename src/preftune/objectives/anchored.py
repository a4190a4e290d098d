"""Losses that judge each completion against the reference by itself: APO and BCO on pairs.

r_w and r_l are the log-ratios of the chosen (w) and the rejected (l) completion.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from preftune.errors import ConfigError
from preftune.objectives.batch import PairLogps
from preftune.objectives.knobs import BETA
from preftune.objectives.numerics import scalar


def apo_zero(batch: PairLogps, *, beta: float) -> Tensor:
    """APO-zero: (1 - sigmoid(beta r_w)) + sigmoid(beta r_l).

    Raises the chosen and lowers the rejected completion: for data whose chosen answers are better than the model's own.

    Args:
        batch: Pairs with reference log-probs.
        beta: Strength of the pull towards the reference, > 0.

    Returns:
        Losses ``(pairs,)`` in [0, 2]; 1 where policy and reference agree.

    Raises:
        ConfigError: ``beta`` is not positive.
        DataError: The reference log-probs are missing.

    Source: Anchored Preference Optimization and Contrastive Revisions (arXiv:2408.06266), eq. 7.
    """
    strength = BETA.number(beta)
    # 1 - sigmoid(x) as sigmoid(-x): no cancellation when the loss gets small.
    return torch.sigmoid(-strength * batch.chosen_logratios) + torch.sigmoid(strength * batch.rejected_logratios)


def apo_down(batch: PairLogps, *, beta: float) -> Tensor:
    """APO-down: sigmoid(beta r_w) + (1 - sigmoid(beta (r_w - r_l))).

    Lowers the chosen completion and the rejected one more: for a model that is already better than the chosen answers.

    Args:
        batch: Pairs with reference log-probs.
        beta: Strength of the pull towards the reference, > 0.

    Returns:
        Losses ``(pairs,)`` in [0, 2]; 1 where policy and reference agree.

    Raises:
        ConfigError: ``beta`` is not positive.
        DataError: The reference log-probs are missing.

    Source: Anchored Preference Optimization and Contrastive Revisions (arXiv:2408.06266), eq. 8.
    """
    strength = BETA.number(beta)
    delta = batch.chosen_logratios - batch.rejected_logratios
    return torch.sigmoid(strength * batch.chosen_logratios) + torch.sigmoid(-strength * delta)


def bco_pair(batch: PairLogps, *, beta: float, delta: float | Tensor = 0.0) -> Tensor:
    """BCO on pairs: -log sigmoid(beta r_w - delta) - log sigmoid(-(beta r_l - delta)).

    delta, the paper's reward shift, is the mean of all rewards so far; see ``BCOState``. The second term is
    -log sigmoid(delta - beta r_l): both completions are measured from the same shift. TRL's ``bco_pair`` has delta = 0.

    Args:
        batch: Pairs with reference log-probs.
        beta: Strength of the pull towards the reference, > 0.
        delta: Reward shift, one number, taken as a constant.

    Returns:
        Losses ``(pairs,)``; 2 log 2 where policy and reference agree and delta is 0.

    Raises:
        ConfigError: ``beta`` is not positive, or ``delta`` is not one number.
        DataError: The reference log-probs are missing.

    Source: Binary Classifier Optimization for LLM Alignment (arXiv:2404.04656).
    """
    strength = BETA.number(beta)
    shift = constant(delta, "delta", batch.chosen_logps)
    chosen, rejected = strength * batch.chosen_logratios, strength * batch.rejected_logratios
    return -F.logsigmoid(chosen - shift) - F.logsigmoid(shift - rejected)


def constant(value: float | Tensor, name: str, like: Tensor) -> Tensor:
    """Bring one number to a batch's dtype and device, without its gradient.

    Args:
        value: A float or a tensor with one element.
        name: What it is, for the message.
        like: Tensor whose dtype and device to take.

    Returns:
        A 0-dimensional tensor.

    Raises:
        ConfigError: There is more than one element.
    """
    # With the dtype at once: a Python number would come by way of fp32.
    number = scalar(value, like).detach()
    if number.numel() != 1:
        raise ConfigError(
            "must be one number for the whole step", where=name, value=tuple(number.shape), allowed="a scalar"
        )
    return number.reshape(())


@dataclass(frozen=True)
class BCOState:
    """Running mean of all rewards, the reward shift of BCO.

    A value, not an object with a memory: ``update`` returns the next state. During an optimizer step every batch uses
    the delta of the *previous* steps, so the loss is a sum over pairs and does not depend on how the step is split.
    TRL's former BCO trainer took the mean up to and including the micro-batch at hand, which makes a loss depend on how
    a step is split. After the step the engine sums beta log-ratios and their count over all batches, adds both over all
    processes, and calls ``update`` once; every process then holds the same state. Two numbers, so it goes into a
    checkpoint as JSON.

    Attributes:
        total: Sum of the rewards seen so far.
        count: How many they were, chosen and rejected ones together.

    Example:
        >>> state = BCOState().update(reward_sum=3.0, num_rewards=4)
        >>> state.delta, state.update(reward_sum=-1.0, num_rewards=4).delta
        (0.75, 0.25)
    """

    total: float = 0.0
    count: int = 0

    @property
    def delta(self) -> float:
        """Mean of the rewards so far; 0 before the first step."""
        return self.total / self.count if self.count else 0.0

    def update(self, *, reward_sum: float, num_rewards: int) -> BCOState:
        """Return the state after one more optimizer step.

        Args:
            reward_sum: Sum of beta log-ratios over chosen and rejected completions of the step, all processes.
            num_rewards: How many completions that were.

        Returns:
            The new state.

        Raises:
            ConfigError: The sum is not finite or the count negative.
        """
        if not math.isfinite(reward_sum) or num_rewards < 0:
            raise ConfigError(
                "cannot add these rewards to the running mean",
                where="BCOState.update",
                value=(reward_sum, num_rewards),
                allowed="a finite sum and a count >= 0",
            )
        return BCOState(self.total + reward_sum, self.count + num_rewards)
