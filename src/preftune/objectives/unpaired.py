"""Losses on single completions with a desirable/undesirable label: KTO and unpaired APO-zero."""

from __future__ import annotations

import torch
from torch import Tensor

from preftune.errors import DataError
from preftune.objectives.anchored import constant
from preftune.objectives.batch import UnpairedLogps
from preftune.objectives.knobs import BETA, DESIRABLE_WEIGHT, UNDESIRABLE_WEIGHT


def kto(
    batch: UnpairedLogps,
    *,
    beta: float,
    kl: float | Tensor,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """KTO: lambda_D (1 - sigmoid(beta (r - kl))) if desirable, else lambda_U (1 - sigmoid(beta (kl - r))).

    Args:
        batch: Labelled completions with reference log-probs.
        beta: Risk aversion, > 0.
        kl: Baseline of the whole step, see ``kl_baseline``; one number >= 0, taken as a constant.
        desirable_weight: lambda_D, >= 0.
        undesirable_weight: lambda_U, >= 0.

    Returns:
        Losses ``(examples,)`` in the order of the batch.

    Raises:
        ConfigError: A knob is out of range, or ``kl`` is not one number.

    Source: KTO (arXiv:2402.01306), eq. 7.

    Example:
        >>> batch = UnpairedLogps(logps=torch.tensor([-3.0, -3.0]), ref_logps=torch.tensor([-4.0, -4.0]),
        ...                       labels=torch.tensor([True, False]))
        >>> kto(batch, beta=1.0, kl=1.0, undesirable_weight=2.0).tolist()  # both rewards sit on the baseline
        [0.5, 1.0]
    """
    baseline = constant(kl, "kl", batch.logps)
    return _value_loss(batch, BETA.number(beta) * (batch.logratios - baseline), desirable_weight, undesirable_weight)


def apo_zero_unpaired(
    batch: UnpairedLogps, *, beta: float, desirable_weight: float = 1.0, undesirable_weight: float = 1.0
) -> Tensor:
    """Unpaired APO-zero: lambda_D (1 - sigmoid(beta r)) if desirable, else lambda_U sigmoid(beta r).

    Args:
        batch: Labelled completions with reference log-probs.
        beta: Strength of the pull towards the reference, > 0.
        desirable_weight: lambda_D, >= 0.
        undesirable_weight: lambda_U, >= 0.

    Returns:
        Losses ``(examples,)`` in the order of the batch.

    Raises:
        ConfigError: A knob is out of range.

    Source: Anchored Preference Optimization (arXiv:2408.06266), eq. 7 taken apart; TRL's ``apo_zero_unpaired``.
    """
    return _value_loss(batch, BETA.number(beta) * batch.logratios, desirable_weight, undesirable_weight)


def _value_loss(batch: UnpairedLogps, rewards: Tensor, desirable_weight: float, undesirable_weight: float) -> Tensor:
    desirable, undesirable = DESIRABLE_WEIGHT.number(desirable_weight), UNDESIRABLE_WEIGHT.number(undesirable_weight)
    # Both branches are one sigmoid of the signed reward: 1 - sigmoid(z) = sigmoid(-z).
    losses = torch.sigmoid(torch.where(batch.labels, -rewards, rewards))
    return torch.where(batch.labels, desirable * losses, undesirable * losses)


def kl_baseline(policy_logps: Tensor, ref_logps: Tensor) -> Tensor:
    """KTO's estimate of KL(policy || reference): mean log-ratio of mismatched completions, at least 0.

    Each prompt is scored with the completion of another one of the batch, without a gradient. The estimate belongs to
    the whole optimizer step: pass the mismatched examples of all its batches and processes, or add their log-ratios
    and counts first and call ``kl_baseline_from_sum``. The clamp comes after the mean, never before.

    Args:
        policy_logps: log pi(mismatched completion | prompt), summed over tokens, ``(examples,)``.
        ref_logps: The same under the reference model.

    Returns:
        A 0-dimensional tensor without gradient.

    Raises:
        DataError: The shapes differ, or there are no examples.

    Source: KTO (arXiv:2402.01306), the estimate of z_0.
    """
    if policy_logps.shape != ref_logps.shape or policy_logps.ndim != 1:
        raise DataError(
            "the mismatched log-probs of policy and reference must have one shape",
            where="kl_baseline",
            value=(tuple(policy_logps.shape), tuple(ref_logps.shape)),
            allowed="(examples,) twice",
        )
    wide = torch.promote_types(torch.float32, policy_logps.dtype)
    total = (policy_logps.detach().to(wide) - ref_logps.detach().to(wide)).sum()
    return kl_baseline_from_sum(total, policy_logps.shape[0])


def kl_baseline_from_sum(logratio_sum: Tensor, num_examples: int | Tensor) -> Tensor:
    """KTO's baseline from sums over several batches or processes.

    Args:
        logratio_sum: Sum of the log-ratios of all mismatched examples of the step, 0-dimensional.
        num_examples: Their number.

    Returns:
        max(0, mean), 0-dimensional, without gradient.

    Raises:
        DataError: There are no examples.
    """
    if not isinstance(num_examples, Tensor) and num_examples < 1:
        raise DataError("the baseline needs at least one mismatched example", where="kl_baseline", value=num_examples)
    return (logratio_sum.detach() / num_examples).clamp(min=0.0)


def check_kto_weights(
    num_desirable: int, num_undesirable: int, desirable_weight: float = 1.0, undesirable_weight: float = 1.0
) -> str | None:
    """Compare the class balance with KTO's rule 1 <= lambda_D n_D / (lambda_U n_U) <= 4/3.

    Args:
        num_desirable: Desirable examples, n_D.
        num_undesirable: Undesirable examples, n_U.
        desirable_weight: lambda_D.
        undesirable_weight: lambda_U.

    Returns:
        ``None`` where the rule holds, otherwise a message with the ranges that would satisfy it.

    Source: KTO (arXiv:2402.01306), eq. 8.

    Example:
        >>> check_kto_weights(400, 300)
        >>> check_kto_weights(100, 400)
        'lambda_D n_D / (lambda_U n_U) = 0.25 is outside [1, 4/3] (KTO, eq. 8): set desirable_weight in [4, 5.33] or \
undesirable_weight in [0.188, 0.25]'
    """
    desirable, undesirable = num_desirable * desirable_weight, num_undesirable * undesirable_weight
    if desirable == 0 or undesirable == 0:
        kind = "desirable" if desirable == 0 else "undesirable"
        return f"no {kind} example has any weight: KTO needs both kinds"
    # Cross-multiplied, so that a ratio of exactly 4/3 is inside.
    if undesirable <= desirable and 3 * desirable <= 4 * undesirable:
        return None
    low, high = undesirable / num_desirable, undesirable / num_desirable * 4 / 3
    other_low, other_high = desirable / num_undesirable * 3 / 4, desirable / num_undesirable
    return (
        f"lambda_D n_D / (lambda_U n_U) = {desirable / undesirable:.3g} is outside [1, 4/3] (KTO, eq. 8): "
        f"set desirable_weight in [{low:.3g}, {high:.3g}] or undesirable_weight in [{other_low:.3g}, {other_high:.3g}]"
    )
