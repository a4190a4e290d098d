"""What the sequences of a packed row add up to: sums, weights and metrics."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from preftune.kernels.head import TokenScores
from preftune.objectives import PairLogps, ld_token_weights, wpo_weight
from preftune.packing import PackedRow
from preftune.training.metrics import Term


def sequence_sums(row: PackedRow, logps: Tensor, ld_alpha: float | None = None) -> tuple[Tensor, Tensor]:
    """Per-sequence sums ``(pairs,)`` of per-token log-probs ``(N,)``: chosen and rejected.

    In fp64: sums reach hundreds of nats while the log-ratios taken from them are near zero.

    Args:
        row: The row whose targets were scored.
        logps: Log-probs of the row's targets, shape ``(N,)``.
        ld_alpha: Weight of the tokens beyond the shorter sequence's length (LD-DPO, 2409.06411); ``None`` for plain
            sums.
    """
    logps = logps if logps.device.type == "mps" else logps.double()
    slots = torch.from_numpy(row.target_slot).to(logps.device)
    if ld_alpha is not None:
        lengths = torch.bincount(slots, minlength=2 * len(row.examples)).view(-1, 2)
        shared = lengths.min(1).values[slots // 2]
        ranks = torch.from_numpy(_scored_ranks(row)).to(logps.device)
        logps = logps * ld_token_weights(ranks, shared, ld_alpha).to(logps.dtype)
    sums = logps.new_zeros(2 * len(row.examples)).index_add(0, slots, logps)
    return sums[0::2], sums[1::2]


def _scored_ranks(row: PackedRow) -> npt.NDArray[np.int64]:
    """Position of each target among the scored tokens of its sequence: ranks count unscored first tokens too."""
    first = np.full(int(row.target_slot.max()) + 1, np.iinfo(np.int64).max)
    np.minimum.at(first, row.target_slot, row.target_rank)
    ranks: npt.NDArray[np.int64] = row.target_rank - first[row.target_slot]
    return ranks


def wpo_weights(row: PackedRow, scores: TokenScores) -> Tensor:
    """Weights of the row's pairs ``(pairs,)`` by how likely the policy is to write them (WPO, 2406.11827)."""
    assert scores.log_sum_sq is not None
    chosen, rejected = sequence_sums(row, scores.logps.detach() - scores.log_sum_sq)
    slots = torch.from_numpy(row.target_slot).to(chosen.device)
    lengths = torch.bincount(slots, minlength=2 * len(row.examples)).to(chosen.dtype)
    return wpo_weight(chosen, rejected, lengths[0::2], lengths[1::2])


def pair_metrics(row: PackedRow, scores: TokenScores, logps: PairLogps, rewards: Tensor) -> dict[str, Term]:
    """TRL's metrics of a row's pairs; ``rewards`` are ``(pairs, 2)``, chosen and rejected."""
    chosen, rejected = rewards.unbind(1)
    pairs = float(logps.num_pairs)
    terms: dict[str, Term] = {
        "rewards/chosen": (chosen.sum(), pairs),
        "rewards/rejected": (rejected.sum(), pairs),
        "rewards/accuracies": ((chosen > rejected).sum(), pairs),
        "rewards/margins": ((chosen - rejected).sum(), pairs),
        "logps/chosen": (logps.chosen_logps.detach().sum(), pairs),
        "logps/rejected": (logps.rejected_logps.detach().sum(), pairs),
    }
    if scores.entropy is not None and scores.mean_logit is not None and scores.top1 is not None:
        is_chosen = torch.from_numpy(row.target_slot % 2 == 0).to(scores.entropy.device)
        number = float(len(row.target_slot))
        num_chosen = float((row.target_slot % 2 == 0).sum())
        terms["entropy"] = (scores.entropy.sum(), number)
        terms["logits/chosen"] = ((scores.mean_logit * is_chosen).sum(), num_chosen)
        terms["logits/rejected"] = ((scores.mean_logit * ~is_chosen).sum(), number - num_chosen)
        terms["mean_token_accuracy"] = ((scores.top1 & is_chosen).sum(), num_chosen)
    return terms
