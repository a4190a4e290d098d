"""What the sequences of a packed row add up to: sums, weights and metrics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from preftune.kernels.device import put, widened
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
    logps = widened(logps)
    slots = put(row.target_slot, logps.device)
    if ld_alpha is not None:
        shared = _lengths(row).min(1)[row.target_slot // 2]
        weights = ld_token_weights(torch.from_numpy(_scored_ranks(row)), torch.from_numpy(shared), ld_alpha)
        logps = logps * put(weights.to(torch.float64).numpy(), logps.device)
    sums = logps.new_zeros(2 * len(row.examples)).index_add(0, slots, logps)
    return sums[0::2], sums[1::2]


def _lengths(row: PackedRow) -> npt.NDArray[np.int64]:
    """Scored tokens of every sequence, ``(pairs, 2)``."""
    return np.bincount(row.target_slot, minlength=2 * len(row.examples)).reshape(-1, 2)


def _scored_ranks(row: PackedRow) -> npt.NDArray[np.int64]:
    """Position of each target among the scored tokens of its sequence: ranks count unscored tokens too."""
    order = np.lexsort((row.target_rank, row.target_slot))
    slots = row.target_slot[order]
    first = np.searchsorted(slots, slots)
    ranks = np.empty(len(order), dtype=np.int64)
    ranks[order] = np.arange(len(order)) - first
    return ranks


def num_scored(example: Mapping[str, Any], side: str) -> tuple[int, int]:
    """Tokens of a completion that count, and those among them that have a log-prob.

    Args:
        example: A tokenised pair.
        side: ``chosen`` or ``rejected``.

    Returns:
        The two numbers. They differ where there is no prompt: nothing predicts the first token of a sequence.
    """
    mask = example.get(f"{side}_mask")
    length = len(example[f"{side}_ids"])
    counted = length if mask is None else int(np.count_nonzero(mask))
    first = len(example["prompt_ids"]) == 0 and (mask is None or bool(mask[0]))
    return counted, counted - first


def wpo_weights(row: PackedRow, scores: TokenScores) -> Tensor:
    """Weights of the row's pairs ``(pairs,)`` by how likely the policy is to write them (WPO, 2406.11827)."""
    assert scores.log_sum_sq is not None
    chosen, rejected = sequence_sums(row, scores.logps.detach() - scores.log_sum_sq)
    lengths = put(_lengths(row).astype(np.float64), chosen.device)
    return wpo_weight(chosen, rejected, lengths[:, 0], lengths[:, 1])


def pair_metrics(row: PackedRow, scores: TokenScores, logps: PairLogps, rewards: Tensor) -> dict[str, Term]:
    """TRL's metrics of a row's pairs; ``rewards`` are ``(pairs, 2)``, chosen and rejected."""
    sums = (logps.chosen_logps.detach(), logps.rejected_logps.detach())
    return reward_metrics(rewards, *sums) | token_metrics(row, scores, 2)


def reward_metrics(rewards: Tensor, chosen_logps: Tensor, rejected_logps: Tensor) -> dict[str, Term]:
    """What is logged of rewards ``(pairs, 2)``, and of the log-probs ``(pairs,)`` that are logged beside them."""
    (chosen, rejected), pairs = rewards.unbind(1), float(len(rewards))
    return {
        "rewards/chosen": (chosen.sum(), pairs),
        "rewards/rejected": (rejected.sum(), pairs),
        "rewards/accuracies": ((chosen > rejected).sum(), pairs),
        "rewards/margins": ((chosen - rejected).sum(), pairs),
        "logps/chosen": (chosen_logps.sum(), pairs),
        "logps/rejected": (rejected_logps.sum(), pairs),
    }


def token_metrics(row: PackedRow, scores: TokenScores, slots: int) -> dict[str, Term]:
    """Means over completion tokens, where they were computed.

    Args:
        row: The row.
        scores: Scores of its targets.
        slots: Slots of a pair: chosen and rejected completion, then what is scored of the prompt and left out here.
    """
    if scores.entropy is None or scores.mean_logit is None or scores.top1 is None:
        return {}
    place = put(row.target_slot % slots, scores.entropy.device)
    is_chosen, is_rejected = place == 0, place == 1
    num_chosen, num_rejected = is_chosen.sum(), is_rejected.sum()
    return {
        "entropy": ((scores.entropy * (place < 2)).sum(), num_chosen + num_rejected),
        "logits/chosen": ((scores.mean_logit * is_chosen).sum(), num_chosen),
        "logits/rejected": ((scores.mean_logit * is_rejected).sum(), num_rejected),
        "mean_token_accuracy": ((scores.top1 & is_chosen).sum(), num_chosen),
    }
