"""Modifiers that work with any loss: LD-DPO's token weights and WPO's pair weights."""

from __future__ import annotations

import torch
from torch import Tensor

from preftune.errors import DataError
from preftune.objectives.knobs import LD_ALPHA


def ld_token_weights(positions: Tensor, shared_lengths: Tensor, alpha: float) -> Tensor:
    """LD-DPO's rule for one token: weight 1 up to the shorter completion's length, alpha behind it.

    Positions and lengths count *scored* completion tokens. The weights multiply the per-token log-probs of the policy
    and of the reference alike, before they are summed.

    Args:
        positions: 0-based position of each token within its completion, integers of any shape.
        shared_lengths: min(|y_w|, |y_l|) of the pair that each token belongs to, same shape.
        alpha: Weight of the tokens behind, in [0, 1]; 1 changes nothing, 0 cuts them off.

    Returns:
        float32 weights, same shape.

    Raises:
        ConfigError: ``alpha`` is out of range.
        DataError: The shapes differ.

    Source: Length Desensitization in DPO (arXiv:2409.06411).
    """
    tail = LD_ALPHA.number(alpha)
    if positions.shape != shared_lengths.shape:
        raise DataError(
            "positions and lengths must have one shape (nothing is broadcast)",
            where="ld_token_weights",
            value=(tuple(positions.shape), tuple(shared_lengths.shape)),
        )
    ones = torch.ones(positions.shape, device=positions.device)
    return torch.where(positions < shared_lengths, ones, tail * ones)


def ld_weights(lengths_self: Tensor, lengths_other: Tensor, alpha: float) -> Tensor:
    """LD-DPO's weights for completions laid end to end.

    Args:
        lengths_self: Scored tokens of each completion, integers ``(completions,)``.
        lengths_other: Scored tokens of the other completion of its pair, ``(completions,)``.
        alpha: Weight of the tokens behind the shorter length, in [0, 1].

    Returns:
        float32 weights ``(sum of lengths_self,)``, completion after completion.

    Raises:
        ConfigError: ``alpha`` is out of range.
        DataError: The lengths are no integer vectors of one shape.

    Source: Length Desensitization in DPO (arXiv:2409.06411).

    Example:
        >>> ld_weights(torch.tensor([3, 1]), torch.tensor([1, 3]), alpha=0.5).tolist()
        [1.0, 0.5, 0.5, 1.0]
    """
    integers = not (lengths_self.is_floating_point() or lengths_other.is_floating_point())
    if lengths_self.ndim != 1 or lengths_self.shape != lengths_other.shape or not integers:
        raise DataError(
            "lengths must be two integer vectors of one shape",
            where="ld_weights",
            value=(tuple(lengths_self.shape), tuple(lengths_other.shape)),
        )
    starts = torch.cumsum(lengths_self, 0) - lengths_self
    total = int(lengths_self.sum())
    positions = torch.arange(total, device=lengths_self.device) - torch.repeat_interleave(starts, lengths_self)
    shared = torch.repeat_interleave(torch.minimum(lengths_self, lengths_other), lengths_self)
    return ld_token_weights(positions, shared, alpha)


def wpo_weight(
    chosen_aligned_logps: Tensor, rejected_aligned_logps: Tensor, chosen_lengths: Tensor, rejected_lengths: Tensor
) -> Tensor:
    """WPO's weight of a pair: exp(avg a(y_w)) exp(avg a(y_l)), a(y_t) = log pi(y_t) - log sum_v pi(v)^2.

    The second part of a(y_t), the log of the probability that two draws agree, makes the weight about 1 for what the
    policy itself would write. It may exceed 1. The weight carries no gradient.

    Args:
        chosen_aligned_logps: Sum of a(y_t) over scored tokens of the chosen completion, ``(pairs,)``.
        rejected_aligned_logps: The same for the rejected completion.
        chosen_lengths: Scored tokens of the chosen completion.
        rejected_lengths: Scored tokens of the rejected completion.

    Returns:
        ``(pairs,)``, at least float32.

    Raises:
        DataError: The shapes differ.

    Source: WPO (arXiv:2406.11827), eq. 2 with aligned weights.

    Example:
        >>> two = torch.tensor([2])
        >>> wpo_weight(torch.tensor([0.5]).log() * 2, torch.tensor([0.25]).log() * 2, two, two).tolist()
        [0.125]
    """
    shapes = {tuple(t.shape) for t in (chosen_aligned_logps, rejected_aligned_logps, chosen_lengths, rejected_lengths)}
    if len(shapes) != 1:
        raise DataError("the tensors must have one shape (nothing is broadcast)", where="wpo_weight", value=shapes)
    wide = torch.promote_types(torch.float32, chosen_aligned_logps.dtype)
    chosen = chosen_aligned_logps.detach().to(wide) / chosen_lengths.to(wide).clamp(min=1.0)
    rejected = rejected_aligned_logps.detach().to(wide) / rejected_lengths.to(wide).clamp(min=1.0)
    return torch.exp(chosen + rejected)
