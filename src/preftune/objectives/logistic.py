"""Losses that put the log-sigmoid to log-ratios: DPO and its closest relatives.

In all formulas r_w and r_l are the log-ratios of the chosen (w) and the rejected (l) completion, or their scores under
an f-divergence, and h = beta (r_w - r_l).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from preftune.errors import DataError
from preftune.objectives.batch import PairLogps
from preftune.objectives.divergences import pair_scores, score_difference
from preftune.objectives.knobs import (
    BETA,
    DISCOPOP_TAU,
    DPOP_LAMBDA,
    EXO_LABEL_SMOOTHING,
    LABEL_SMOOTHING,
    ODPO_ALPHA,
    ODPO_TRANSFORM,
)
from preftune.objectives.numerics import guarded_exp, per_token


def smoothed_logistic(logits: Tensor, label_smoothing: float) -> Tensor:
    """-(1 - e) log sigmoid(z) - e log sigmoid(-z), the cross-entropy against a label flipped with probability e.

    Args:
        logits: z, any shape.
        label_smoothing: e in [0, 0.5).

    Returns:
        The losses, same shape.
    """
    smoothing = LABEL_SMOOTHING.number(label_smoothing)
    clean = -F.logsigmoid(logits)
    if smoothing == 0.0:
        return clean
    return (1.0 - smoothing) * clean - smoothing * F.logsigmoid(-logits)


def sigmoid(
    batch: PairLogps,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
) -> Tensor:
    """DPO, and with label smoothing cDPO: the logistic loss of the reward difference h.

    -log sigmoid(h), and with label smoothing e: -(1 - e) log sigmoid(h) - e log sigmoid(-h). TRL accepts
    ``label_smoothing`` with this loss and does not apply it; here it is applied.

    Args:
        batch: Pairs with reference log-probs.
        beta: Strength of the pull towards the reference, > 0.
        label_smoothing: Assumed share of flipped labels, in [0, 0.5).
        f_divergence_type: Divergence from the reference.
        f_alpha_divergence_coef: Order of the alpha-divergence.

    Returns:
        Losses ``(pairs,)`` in nats; log 2 where policy and reference agree.

    Raises:
        ConfigError: A knob is out of range.
        DataError: The reference log-probs are missing.

    Source: Direct Preference Optimization (arXiv:2305.18290), eq. 7; smoothing: Mitchell, A note on DPO with noisy
    preferences & relationship to IPO (2023).

    Example:
        >>> one = torch.ones(1)
        >>> batch = PairLogps(chosen_logps=-4 * one, rejected_logps=-9 * one, ref_chosen_logps=-6 * one,
        ...                   ref_rejected_logps=-8 * one, chosen_lengths=3 * one, rejected_lengths=3 * one)
        >>> round(sigmoid(batch, beta=0.5).item(), 4)  # h = 0.5 (2 + 1) = 1.5
        0.2014
    """
    delta = score_difference(batch, f_divergence_type, f_alpha_divergence_coef)
    return smoothed_logistic(BETA.number(beta) * delta, label_smoothing)


def sigmoid_norm(
    batch: PairLogps,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
) -> Tensor:
    """Length-normalised DPO: ``-log sigmoid(beta (r_w / |y_w| - r_l / |y_l|))``.

    Its beta is on the scale of per-token averages: Tulu 3 uses 5.

    Args:
        batch: Pairs with reference log-probs.
        beta: Strength of the pull towards the reference, > 0.
        label_smoothing: Assumed share of flipped labels, in [0, 0.5).
        f_divergence_type: Divergence from the reference, applied before the division by the length.
        f_alpha_divergence_coef: Order of the alpha-divergence.

    Returns:
        Losses ``(pairs,)``.

    Raises:
        ConfigError: A knob is out of range.
        DataError: The reference log-probs are missing.

    Source: Tulu 3 (arXiv:2411.15124), length-normalised DPO.
    """
    chosen, rejected = pair_scores(batch, f_divergence_type, f_alpha_divergence_coef)
    delta = per_token(chosen, batch.chosen_lengths) - per_token(rejected, batch.rejected_lengths)
    return smoothed_logistic(BETA.number(beta) * delta, label_smoothing)


def robust(
    batch: PairLogps,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
) -> Tensor:
    """Robust DPO: (-(1 - e) log sigmoid(h) + e log sigmoid(-h)) / (1 - 2 e).

    Its expectation over labels flipped with probability e is the DPO loss on the clean labels. It may be negative.

    Args:
        batch: Pairs with reference log-probs.
        beta: Strength of the pull towards the reference, > 0.
        label_smoothing: Flip rate e in [0, 0.5); 0 gives DPO.
        f_divergence_type: Divergence from the reference.
        f_alpha_divergence_coef: Order of the alpha-divergence.

    Returns:
        Losses ``(pairs,)``.

    Raises:
        ConfigError: A knob is out of range.
        DataError: The reference log-probs are missing.

    Source: Provably Robust DPO (arXiv:2403.00409).
    """
    flip = LABEL_SMOOTHING.number(label_smoothing)
    logits = BETA.number(beta) * score_difference(batch, f_divergence_type, f_alpha_divergence_coef)
    return (flip * F.logsigmoid(-logits) - (1.0 - flip) * F.logsigmoid(logits)) / (1.0 - 2.0 * flip)


def exo_pair(
    batch: PairLogps,
    *,
    beta: float,
    label_smoothing: float = 1e-3,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
) -> Tensor:
    """EXO on pairs: KL from softmax(h, 0) to (1 - e, e).

    With q = sigmoid(h) this is q (log q - log(1 - e)) + (1 - q) (log(1 - q) - log e).

    Args:
        batch: Pairs with reference log-probs.
        beta: Strength of the pull towards the reference, > 0.
        label_smoothing: e in (0, 0.5); at 0 the divergence is infinite.
        f_divergence_type: Divergence from the reference.
        f_alpha_divergence_coef: Order of the alpha-divergence.

    Returns:
        Losses ``(pairs,)``, at least 0.

    Raises:
        ConfigError: A knob is out of range.
        DataError: The reference log-probs are missing.

    Source: Towards Efficient Exact Optimization of Language Model Alignment (arXiv:2402.00856), eq. 16.
    """
    target = EXO_LABEL_SMOOTHING.number(label_smoothing)
    logits = BETA.number(beta) * score_difference(batch, f_divergence_type, f_alpha_divergence_coef)
    chosen_gap = F.logsigmoid(logits) - math.log1p(-target)
    rejected_gap = F.logsigmoid(-logits) - math.log(target)
    return torch.sigmoid(logits) * chosen_gap + torch.sigmoid(-logits) * rejected_gap


def nca_pair(batch: PairLogps, *, beta: float) -> Tensor:
    """NCA on pairs: -log sigmoid(beta r_w) - 1/2 log sigmoid(-beta r_w) - 1/2 log sigmoid(-beta r_l).

    The second term keeps the chosen likelihood from running away, the third lowers the rejected one by itself.

    Args:
        batch: Pairs with reference log-probs.
        beta: Strength of the pull towards the reference, > 0.

    Returns:
        Losses ``(pairs,)``; 2 log 2 where policy and reference agree.

    Raises:
        ConfigError: ``beta`` is not positive.
        DataError: The reference log-probs are missing.

    Source: Noise Contrastive Alignment (arXiv:2402.05369).
    """
    strength = BETA.number(beta)
    chosen, rejected = strength * batch.chosen_logratios, strength * batch.rejected_logratios
    return -F.logsigmoid(chosen) - 0.5 * (F.logsigmoid(-chosen) + F.logsigmoid(-rejected))


def discopop(
    batch: PairLogps,
    *,
    beta: float,
    discopop_tau: float = 0.05,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
) -> Tensor:
    """DiscoPOP: (1 - m) (-log sigmoid(h)) + m exp(-h) with the mixture m = sigmoid(h / tau).

    Args:
        batch: Pairs with reference log-probs.
        beta: Strength of the pull towards the reference, > 0.
        discopop_tau: Temperature of the mixture, > 0.
        f_divergence_type: Divergence from the reference.
        f_alpha_divergence_coef: Order of the alpha-divergence.

    Returns:
        Losses ``(pairs,)``.

    Raises:
        ConfigError: A knob is out of range.
        DataError: The reference log-probs are missing.

    Source: Discovering Preference Optimization Algorithms with and for LLMs (arXiv:2406.08414), eq. 5.
    """
    tau = DISCOPOP_TAU.number(discopop_tau)
    logits = BETA.number(beta) * score_difference(batch, f_divergence_type, f_alpha_divergence_coef)
    logistic = -F.logsigmoid(logits) * torch.sigmoid(-logits / tau)
    # m exp(-h) as one exponential: for very negative h the factors are 0 and infinity, their product is neither.
    return logistic + guarded_exp(F.logsigmoid(logits / tau) - logits)


def dpop(batch: PairLogps, *, beta: float, dpop_lambda: float = 50.0) -> Tensor:
    """DPO-Positive: -log sigmoid(beta (r_w - r_l - lambda max(0, -r_w))).

    Args:
        batch: Pairs with reference log-probs.
        beta: Strength of the pull towards the reference, > 0.
        dpop_lambda: Penalty on a chosen completion that is less probable than under the reference, >= 0.

    Returns:
        Losses ``(pairs,)``.

    Raises:
        ConfigError: A knob is out of range.
        DataError: The reference log-probs are missing.

    Source: Smaug (arXiv:2402.13228), the DPOP loss.
    """
    penalty = DPOP_LAMBDA.number(dpop_lambda) * torch.relu(-batch.chosen_logratios)
    return -F.logsigmoid(BETA.number(beta) * (batch.chosen_logratios - batch.rejected_logratios - penalty))


def odpo(
    batch: PairLogps,
    *,
    beta: float,
    odpo_alpha: float = 1.0,
    odpo_transform: str = "log",
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
) -> Tensor:
    """DPO with an offset: -log sigmoid(h - alpha f(score gap)), f = log or the identity.

    The offset asks for a larger reward margin where the data's score gap is larger. The identity is the margin loss
    known from reward models.

    Args:
        batch: Pairs with reference log-probs and ``margins`` (score gap, chosen minus rejected).
        beta: Strength of the pull towards the reference, > 0.
        odpo_alpha: Scale of the offset, >= 0.
        odpo_transform: ``log`` (gaps must be > 0) or ``identity``.
        f_divergence_type: Divergence from the reference.
        f_alpha_divergence_coef: Order of the alpha-divergence.

    Returns:
        Losses ``(pairs,)``.

    Raises:
        ConfigError: A knob is out of range.
        DataError: Margins or reference log-probs are missing, or a margin has no logarithm.

    Source: Direct Preference Optimization with an Offset (arXiv:2402.10571).
    """
    transform, scale = ODPO_TRANSFORM.choice(odpo_transform), ODPO_ALPHA.number(odpo_alpha)
    margins = needed_margins(batch, "odpo")
    # On an accelerator this would stall the queue at every step; there the whole column is checked once, beforehand.
    if margins.device.type == "cpu":
        check_odpo_margins(margins, transform)
    offset = scale * (margins.log() if transform == "log" else margins)
    logits = BETA.number(beta) * score_difference(batch, f_divergence_type, f_alpha_divergence_coef)
    return -F.logsigmoid(logits - offset)


def needed_margins(batch: PairLogps, method: str) -> Tensor:
    """Return the margins column of a batch.

    Args:
        batch: Any pairs.
        method: Name of the method that asks, for the message.

    Returns:
        ``(pairs,)``.

    Raises:
        DataError: The batch carries none.
    """
    if batch.margins is None:
        raise DataError(
            f"{method} needs a score gap for every pair",
            where="PairLogps.margins",
            remedy="give the data a `margin` column, or scores for both completions",
        )
    return batch.margins


def check_odpo_margins(margins: Tensor, odpo_transform: str = "log") -> None:
    """Check a whole column of score gaps once, before training.

    Args:
        margins: Score gaps of all pairs, any shape.
        odpo_transform: ``log`` or ``identity``.

    Raises:
        DataError: A gap is not finite, or not positive where its logarithm is taken; the message names the row.
    """
    bad = ~margins.isfinite() | ((margins <= 0) if odpo_transform == "log" else torch.zeros_like(margins).bool())
    if bool(bad.any()):
        row = int(bad.nonzero()[0, 0])
        raise DataError(
            "this score gap cannot be used",
            where=f"margin of row {row}",
            value=float(margins[row]),
            allowed="a number > 0" if odpo_transform == "log" else "a finite number",
            remedy="drop ties and swapped pairs, or set odpo_transform: identity",
        )
