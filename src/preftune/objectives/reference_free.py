"""Losses without a reference model: ORPO, SimPO, AlphaPO, CPO.

p_w and p_l are the probabilities of the chosen (w) and the rejected (l) completion; avg is a mean over their tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from preftune.objectives.batch import PairLogps
from preftune.objectives.knobs import ALPHA, BETA, CPO_ALPHA, SIMPO_GAMMA
from preftune.objectives.logistic import smoothed_logistic
from preftune.objectives.numerics import log_odds, per_token, power_score
from preftune.objectives.supervised import sft


def average_scores(batch: PairLogps, alpha: float = 0.0) -> tuple[Tensor, Tensor]:
    """Scores from length-normalised log-probs: avg log p, or (1 - p^-alpha) / alpha with log p the average.

    Args:
        batch: Any pairs.
        alpha: Shape of the AlphaPO reward; 0 gives the average log-prob.

    Returns:
        Chosen and rejected scores, two ``(pairs,)`` tensors.

    Source: AlphaPO (arXiv:2501.03884).
    """
    # (1 - p^-alpha) / alpha = (e^(-alpha log p) - 1) / (-alpha)
    exponent = -ALPHA.number(alpha)
    chosen = power_score(per_token(batch.chosen_logps, batch.chosen_lengths), exponent)
    return chosen, power_score(per_token(batch.rejected_logps, batch.rejected_lengths), exponent)


def sum_scores(batch: PairLogps, alpha: float = 0.0) -> tuple[Tensor, Tensor]:
    """Scores from summed log-probs: log p, or (1 - p^-alpha) / alpha.

    Args:
        batch: Any pairs.
        alpha: Shape of the AlphaPO reward; 0 gives the log-prob.

    Returns:
        Chosen and rejected scores, two ``(pairs,)`` tensors.

    Source: AlphaPO (arXiv:2501.03884).
    """
    exponent = -ALPHA.number(alpha)
    return power_score(batch.chosen_logps, exponent), power_score(batch.rejected_logps, exponent)


def _with_sft(loss: Tensor, batch: PairLogps, beta: float, cpo_alpha: float, sft_average: str) -> Tensor:
    weight = CPO_ALPHA.number(cpo_alpha)
    return loss if weight == 0.0 else loss + weight * sft(batch, beta=beta, sft_average=sft_average)


def orpo(batch: PairLogps, *, beta: float, sft_average: str = "batch_tokens") -> Tensor:
    """ORPO: SFT term - beta log sigmoid(log odds_w - log odds_l), odds from avg log p.

    The SFT term covers the tokens behind ``chosen_sum_logps``: the completion in the paper, prompt and completion in
    TRL.

    Args:
        batch: Any pairs.
        beta: Weight of the odds-ratio term, > 0 (lambda in the paper).
        sft_average: Normalisation of the SFT term, see ``sft``; the paper has ``pair_tokens``.

    Returns:
        Losses ``(pairs,)``.

    Raises:
        ConfigError: A knob is out of range.

    Source: ORPO (arXiv:2403.07691), eqs. 4, 6 and 7.
    """
    chosen, rejected = average_scores(batch)
    odds_ratio = F.logsigmoid(log_odds(chosen) - log_odds(rejected))
    return sft(batch, beta=beta, sft_average=sft_average) - BETA.number(beta) * odds_ratio


def simpo(
    batch: PairLogps,
    *,
    beta: float,
    simpo_gamma: float = 0.5,
    cpo_alpha: float = 0.0,
    alpha: float = 0.0,
    label_smoothing: float = 0.0,
    sft_average: str = "batch_tokens",
) -> Tensor:
    """SimPO: -log sigmoid(beta (avg log p_w - avg log p_l) - gamma); plus cpo_alpha times SFT it is CPO-SimPO.

    Args:
        batch: Any pairs.
        beta: Reward scale, > 0; on per-token averages, so 2 to 10.
        simpo_gamma: Target margin of the rewards, >= 0.
        cpo_alpha: Weight of the SFT term, 0 in SimPO.
        alpha: Shape of the AlphaPO reward; 0 is the log-prob.
        label_smoothing: Assumed share of flipped labels, in [0, 0.5).
        sft_average: Normalisation of the SFT term, see ``sft``.

    Returns:
        Losses ``(pairs,)``.

    Raises:
        ConfigError: A knob is out of range.

    Source: SimPO (arXiv:2405.14734), eq. 6.
    """
    chosen, rejected = average_scores(batch, alpha)
    logits = BETA.number(beta) * (chosen - rejected) - SIMPO_GAMMA.number(simpo_gamma)
    return _with_sft(smoothed_logistic(logits, label_smoothing), batch, beta, cpo_alpha, sft_average)


def alphapo(
    batch: PairLogps,
    *,
    beta: float,
    simpo_gamma: float = 0.5,
    alpha: float = 0.25,
    label_smoothing: float = 0.0,
) -> Tensor:
    """AlphaPO: SimPO with the reward beta (1 - p^-alpha) / alpha, log p the average over tokens, and no SFT term.

    Args:
        batch: Any pairs.
        beta: Reward scale, > 0.
        simpo_gamma: Target margin of the rewards, >= 0.
        alpha: Shape of the reward; 0 gives SimPO.
        label_smoothing: Assumed share of flipped labels, in [0, 0.5).

    Returns:
        Losses ``(pairs,)``.

    Raises:
        ConfigError: A knob is out of range.

    Source: AlphaPO (arXiv:2501.03884).
    """
    return simpo(batch, beta=beta, simpo_gamma=simpo_gamma, alpha=alpha, label_smoothing=label_smoothing)


def cpo(
    batch: PairLogps,
    *,
    beta: float,
    cpo_alpha: float = 1.0,
    alpha: float = 0.0,
    label_smoothing: float = 0.0,
    sft_average: str = "batch_tokens",
) -> Tensor:
    """CPO: -log sigmoid(beta (log p_w - log p_l)) + cpo_alpha SFT.

    Args:
        batch: Any pairs.
        beta: Reward scale, > 0.
        cpo_alpha: Weight of the SFT term, >= 0.
        alpha: Shape of the AlphaPO reward; 0 is the log-prob.
        label_smoothing: Assumed share of flipped labels, in [0, 0.5).
        sft_average: Normalisation of the SFT term, see ``sft``.

    Returns:
        Losses ``(pairs,)``.

    Raises:
        ConfigError: A knob is out of range.

    Source: Contrastive Preference Optimization (arXiv:2401.08417), eq. 3.
    """
    chosen, rejected = sum_scores(batch, alpha)
    loss = smoothed_logistic(BETA.number(beta) * (chosen - rejected), label_smoothing)
    return _with_sft(loss, batch, beta, cpo_alpha, sft_average)


def cpo_hinge(
    batch: PairLogps,
    *,
    beta: float,
    cpo_alpha: float = 1.0,
    alpha: float = 0.0,
    sft_average: str = "batch_tokens",
) -> Tensor:
    """CPO with SLiC's hinge: max(0, 1 - beta (log p_w - log p_l)) + cpo_alpha SFT.

    Args:
        batch: Any pairs.
        beta: Inverse of the margin asked for, > 0.
        cpo_alpha: Weight of the SFT term, >= 0.
        alpha: Shape of the AlphaPO reward; 0 is the log-prob.
        sft_average: Normalisation of the SFT term, see ``sft``.

    Returns:
        Losses ``(pairs,)``.

    Raises:
        ConfigError: A knob is out of range.

    Source: SLiC-HF (arXiv:2305.10425); TRL's CPO trainer with ``loss_type="hinge"``.
    """
    chosen, rejected = sum_scores(batch, alpha)
    loss = torch.relu(1.0 - BETA.number(beta) * (chosen - rejected))
    return _with_sft(loss, batch, beta, cpo_alpha, sft_average)


def cpo_ipo(
    batch: PairLogps,
    *,
    beta: float,
    cpo_alpha: float = 1.0,
    alpha: float = 0.0,
    sft_average: str = "batch_tokens",
) -> Tensor:
    """CPO with IPO's square: (avg log p_w - avg log p_l - 1 / (2 beta))^2 + cpo_alpha SFT.

    Args:
        batch: Any pairs.
        beta: Regularisation, > 0 (tau in the IPO paper).
        cpo_alpha: Weight of the SFT term, >= 0.
        alpha: Shape of the AlphaPO reward; 0 is the log-prob.
        sft_average: Normalisation of the SFT term, see ``sft``.

    Returns:
        Losses ``(pairs,)``.

    Raises:
        ConfigError: A knob is out of range.

    Source: IPO (arXiv:2310.12036), eq. 17 without a reference; TRL's CPO trainer with ``loss_type="ipo"``.
    """
    chosen, rejected = average_scores(batch, alpha)
    loss = (chosen - rejected - 0.5 / BETA.number(beta)).square()
    return _with_sft(loss, batch, beta, cpo_alpha, sft_average)
