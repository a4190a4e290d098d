"""Losses over the distribution of a batch: Alignment via Optimal Transport.

They sort across all pairs of an optimizer step, so they are not a sum over pairs: the whole step must be in one batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from preftune.objectives.batch import PairLogps
from preftune.objectives.knobs import BETA
from preftune.objectives.logistic import smoothed_logistic


def aot(batch: PairLogps, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """AOT, paired: the logistic loss of beta (u_(i) - v_(i)), u and v sorted across the batch.

    u = log pi(w) - log pi(l) is the policy's margin, v = log pi_ref(w) - log pi_ref(l) the reference's.

    Args:
        batch: All pairs of an optimizer step, with reference log-probs.
        beta: Scale of the logistic loss, > 0.
        label_smoothing: Assumed share of flipped labels, in [0, 0.5).

    Returns:
        Losses ``(pairs,)`` in sorted order: entry i belongs to a quantile, not to pair i.

    Raises:
        ConfigError: A knob is out of range.
        DataError: The reference log-probs are missing.

    Source: Distributional Preference Alignment of LLMs via Optimal Transport (arXiv:2406.05882).
    """
    policy = batch.chosen_logps - batch.rejected_logps
    ref_chosen, ref_rejected = batch.ref_logps
    reference = ref_chosen - ref_rejected
    delta = torch.sort(policy).values - torch.sort(reference).values
    return smoothed_logistic(BETA.number(beta) * delta, label_smoothing)


def aot_unpaired(batch: PairLogps, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """AOT, unpaired: the logistic loss of beta (r_w(i) - r_l(i)), each sorted across the batch by itself.

    Args:
        batch: All pairs of an optimizer step, with reference log-probs; which completion was paired with which
            plays no part.
        beta: Scale of the logistic loss, > 0.
        label_smoothing: Assumed share of flipped labels, in [0, 0.5).

    Returns:
        Losses ``(pairs,)`` in sorted order.

    Raises:
        ConfigError: A knob is out of range.
        DataError: The reference log-probs are missing.

    Source: Distributional Preference Alignment of LLMs via Optimal Transport (arXiv:2406.05882).
    """
    delta = torch.sort(batch.chosen_logratios).values - torch.sort(batch.rejected_logratios).values
    return smoothed_logistic(BETA.number(beta) * delta, label_smoothing)
