"""Losses with a target margin: hinge, IPO and SPPO.

r_w and r_l are the log-ratios of the chosen (w) and the rejected (l) completion, or their scores under an f-divergence.
"""

from __future__ import annotations

import torch
from torch import Tensor

from preftune.errors import DataError
from preftune.objectives.batch import PairLogps
from preftune.objectives.divergences import pair_scores, score_difference
from preftune.objectives.knobs import BETA, IPO_NORMALIZE
from preftune.objectives.logistic import needed_margins
from preftune.objectives.numerics import per_token


def hinge(
    batch: PairLogps,
    *,
    beta: float,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
) -> Tensor:
    """SLiC's hinge in RSO's normalised form: max(0, 1 - beta (r_w - r_l)).

    Args:
        batch: Pairs with reference log-probs.
        beta: Inverse of the margin asked for, > 0 (gamma in RSO).
        f_divergence_type: Divergence from the reference.
        f_alpha_divergence_coef: Order of the alpha-divergence.

    Returns:
        Losses ``(pairs,)``.

    Raises:
        ConfigError: A knob is out of range.
        DataError: The reference log-probs are missing.

    Source: SLiC-HF (arXiv:2305.10425) and Statistical Rejection Sampling (arXiv:2309.06657), hinge-norm.
    """
    delta = score_difference(batch, f_divergence_type, f_alpha_divergence_coef)
    return torch.relu(1.0 - BETA.number(beta) * delta)


def ipo(
    batch: PairLogps,
    *,
    beta: float,
    ipo_normalize: bool = True,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
) -> Tensor:
    """IPO: ``(r_w / |y_w| - r_l / |y_l| - 1 / (2 beta))^2``.

    Without the averages over tokens the square grows with the length; ``ipo_normalize=False`` gives the plain sums
    that the paper's text has.

    Args:
        batch: Pairs with reference log-probs.
        beta: Regularisation, > 0 (tau in the paper).
        ipo_normalize: Average log-ratios over completion tokens, as TRL does.
        f_divergence_type: Divergence from the reference, applied before the division by the length.
        f_alpha_divergence_coef: Order of the alpha-divergence.

    Returns:
        Losses ``(pairs,)``.

    Raises:
        ConfigError: A knob is out of range.
        DataError: The reference log-probs are missing.

    Source: A General Theoretical Paradigm to Understand Learning from Human Preferences (arXiv:2310.12036), eq. 17.

    Example:
        >>> one = torch.ones(1)
        >>> batch = PairLogps(chosen_logps=-4 * one, rejected_logps=-9 * one, ref_chosen_logps=-6 * one,
        ...                   ref_rejected_logps=-8 * one, chosen_lengths=2 * one, rejected_lengths=4 * one)
        >>> ipo(batch, beta=0.5).item(), ipo(batch, beta=0.5, ipo_normalize=False).item()
        (0.0625, 4.0)
    """
    chosen, rejected = pair_scores(batch, f_divergence_type, f_alpha_divergence_coef)
    if IPO_NORMALIZE.flag(ipo_normalize):
        chosen, rejected = per_token(chosen, batch.chosen_lengths), per_token(rejected, batch.rejected_lengths)
    return (chosen - rejected - 0.5 / BETA.number(beta)).square()


def sppo_hard(batch: PairLogps, *, beta: float) -> Tensor:
    """SPPO with certain preferences: (r_w - 1/(2 beta))^2 + (r_l + 1/(2 beta))^2.

    Args:
        batch: Pairs with reference log-probs.
        beta: Inverse of the step size eta, > 0.

    Returns:
        Losses ``(pairs,)``.

    Raises:
        ConfigError: ``beta`` is not positive.
        DataError: The reference log-probs are missing.

    Source: Self-Play Preference Optimization (arXiv:2405.00675), eq. 4.7 with win probabilities 1 and 0.
    """
    target = 0.5 / BETA.number(beta)
    return (batch.chosen_logratios - target).square() + (batch.rejected_logratios + target).square()


def sppo_soft(batch: PairLogps, *, beta: float) -> Tensor:
    """SPPO with win probabilities: (r_w - (p - 1/2)/beta)^2 + (r_l - (1/2 - p)/beta)^2.

    p is the probability that the chosen completion wins. The batch carries it as the gap between the two win
    probabilities, ``margins`` = p - (1 - p) = 2 p - 1: a gap of 1 is ``sppo_hard``.

    Args:
        batch: Pairs with reference log-probs and ``margins`` in [-1, 1].
        beta: Inverse of the step size eta, > 0.

    Returns:
        Losses ``(pairs,)``.

    Raises:
        ConfigError: ``beta`` is not positive.
        DataError: Margins or reference log-probs are missing, or a margin is no gap of probabilities.

    Source: Self-Play Preference Optimization (arXiv:2405.00675), eq. 4.7.
    """
    margins = needed_margins(batch, "sppo_soft")
    # See odpo: on an accelerator the column is checked once, beforehand.
    if margins.device.type == "cpu":
        check_win_gaps(margins)
    target = margins * (0.5 / BETA.number(beta))
    return (batch.chosen_logratios - target).square() + (batch.rejected_logratios + target).square()


def check_win_gaps(margins: Tensor) -> None:
    """Check a whole column of win-probability gaps once, before training.

    Args:
        margins: 2 p - 1 for every pair, any shape.

    Raises:
        DataError: A gap is outside [-1, 1]; the message names the row.
    """
    bad = ~(margins.abs() <= 1.0)
    if bool(bad.any()):
        row = int(bad.nonzero()[0, 0])
        raise DataError(
            "sppo_soft reads the margin as a gap of win probabilities",
            where=f"margin of row {row}",
            value=float(margins[row]),
            allowed="a number in [-1, 1]",
            remedy="store p(chosen wins) - p(rejected wins), or use sppo_hard",
        )
