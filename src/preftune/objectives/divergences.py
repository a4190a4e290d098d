"""f-divergences: how a log-ratio becomes the score that a difference-based loss compares.

f-DPO replaces DPO's log-ratio r = log t by f'(t), where f generates the divergence from the reference. The term of the
derivation that depends on the prompt alone cancels only in the difference chosen - rejected, so a divergence other than
reverse KL is defined only for losses that are functions of that difference.

Source: Beyond Reverse KL (arXiv:2309.16240).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch.nn.functional as F
from torch import Tensor

from preftune.objectives.batch import PairLogps
from preftune.objectives.knobs import F_ALPHA_DIVERGENCE_COEF, F_DIVERGENCE_TYPE
from preftune.objectives.numerics import power_score


def reverse_kl(logratios: Tensor) -> Tensor:
    """Score of the reverse KL divergence, f'(t) = log t (+ 1, which cancels): the log-ratio itself.

    Args:
        logratios: log pi - log pi_ref, any shape, in nats.

    Returns:
        The scores, same shape.
    """
    return logratios


def forward_kl(logratios: Tensor) -> Tensor:
    """Score of the forward KL divergence, f'(t) = 1 - 1/t (up to a constant).

    Args:
        logratios: log pi - log pi_ref, any shape, in nats.

    Returns:
        The scores, same shape; finite where exp overflows.
    """
    return power_score(logratios, -1.0)


def js_divergence(logratios: Tensor) -> Tensor:
    """Score of the Jensen-Shannon divergence, f'(t) = log(2t / (1 + t)) = log 2 + log sigmoid(r).

    Args:
        logratios: log pi - log pi_ref, any shape, in nats.

    Returns:
        The scores, same shape.
    """
    return math.log(2.0) + F.logsigmoid(logratios)


def alpha_divergence(logratios: Tensor, coef: float) -> Tensor:
    """Score of the alpha-divergence, f'(t) = (t^(alpha - 1) - 1) / (alpha - 1).

    Reverse KL is its limit at alpha -> 1 and forward KL its value at alpha = 0.

    Args:
        logratios: log pi - log pi_ref, any shape, in nats.
        coef: The order alpha.

    Returns:
        The scores, same shape; finite where exp overflows.
    """
    return power_score(logratios, coef - 1.0)


DIVERGENCES: Mapping[str, Callable[[Tensor, float], Tensor]] = MappingProxyType(
    {
        "reverse_kl": lambda logratios, coef: reverse_kl(logratios),
        "forward_kl": lambda logratios, coef: forward_kl(logratios),
        "js_divergence": lambda logratios, coef: js_divergence(logratios),
        "alpha_divergence": alpha_divergence,
    }
)


def pair_scores(batch: PairLogps, f_divergence_type: str, f_alpha_divergence_coef: float) -> tuple[Tensor, Tensor]:
    """Scores of the chosen and the rejected completion under a divergence.

    Args:
        batch: Pairs with reference log-probs.
        f_divergence_type: Name in ``DIVERGENCES``.
        f_alpha_divergence_coef: Order of the alpha-divergence; the others do not look at it.

    Returns:
        Two ``(pairs,)`` tensors.

    Raises:
        ConfigError: The name is unknown.
    """
    transform = DIVERGENCES[F_DIVERGENCE_TYPE.choice(f_divergence_type)]
    coef = F_ALPHA_DIVERGENCE_COEF.number(f_alpha_divergence_coef)
    return transform(batch.chosen_logratios, coef), transform(batch.rejected_logratios, coef)


def score_difference(batch: PairLogps, f_divergence_type: str, f_alpha_divergence_coef: float) -> Tensor:
    """Chosen minus rejected score, the argument of DPO's logistic loss before beta.

    Args:
        batch: Pairs with reference log-probs.
        f_divergence_type: Name in ``DIVERGENCES``.
        f_alpha_divergence_coef: Order of the alpha-divergence.

    Returns:
        ``(pairs,)``.
    """
    chosen, rejected = pair_scores(batch, f_divergence_type, f_alpha_divergence_coef)
    return chosen - rejected
