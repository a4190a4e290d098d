"""What the pairs of a packed row add up to: sums per sequence, weights and metrics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import TrainerCallback

from preftune.kernels.head import TokenScores
from preftune.objectives import PairLogps, ld_token_weights, wpo_weight
from preftune.packing import PackedRow
from preftune.training.config import DPOConfig
from preftune.training.metrics import Term

if TYPE_CHECKING:
    from preftune.training.dpo import DPOTrainer

#: Difference of policy and reference in nats per token that rounding can explain, by half-precision or not.
_AGREEMENT = {True: 5e-2, False: 2e-3}


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


def disagreement(logps: PairLogps, half: bool) -> str | None:
    """What is wrong where policy and reference differ before the first update, or ``None`` where they do not.

    Args:
        logps: The pairs of a row.
        half: Whether something was computed in half precision.
    """
    with torch.no_grad():
        ratios = torch.cat([logps.chosen_logratios, logps.rejected_logratios]).abs()
        tokens = torch.cat([logps.chosen_lengths, logps.rejected_lengths])
        worst = float((ratios / tokens.to(ratios.dtype)).max())
    if worst <= _AGREEMENT[half]:
        return None
    return (
        f"policy and reference differ by {worst:.2g} nats per token before the first update, so that the loss does not "
        "start where it should; likely causes: dropout is on (disable_dropout: true), the reference is not the model "
        "that training starts from, or an adapter was merged or switched in between"
    )


class SyncReference(TrainerCallback):
    """Moves the reference towards the policy every so many steps (TR-DPO, 2404.09656)."""

    def __init__(self, trainer: DPOTrainer) -> None:
        self.trainer = trainer

    def on_step_end(  # type: ignore[override]
        self, args: DPOConfig, state: Any, control: Any, **kwargs: Any
    ) -> None:
        """Follow the policy where a synchronisation is due."""
        reference = self.trainer.reference
        if reference is not None and state.global_step % args.ref_model_sync_steps == 0:
            reference.follow(args.ref_model_mixup_alpha)
