"""What the pairs of a packed row add up to: sums per sequence, weights and metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import TrainerCallback

from preftune.kernels.device import put, widened
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
    """Position of each target among the scored tokens of its sequence: ranks count unscored first tokens too."""
    first = np.full(int(row.target_slot.max()) + 1, np.iinfo(np.int64).max)
    np.minimum.at(first, row.target_slot, row.target_rank)
    ranks: npt.NDArray[np.int64] = row.target_rank - first[row.target_slot]
    return ranks


def wpo_weights(row: PackedRow, scores: TokenScores) -> Tensor:
    """Weights of the row's pairs ``(pairs,)`` by how likely the policy is to write them (WPO, 2406.11827)."""
    assert scores.log_sum_sq is not None
    chosen, rejected = sequence_sums(row, scores.logps.detach() - scores.log_sum_sq)
    lengths = put(_lengths(row).astype(np.float64), chosen.device)
    return wpo_weight(chosen, rejected, lengths[:, 0], lengths[:, 1])


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
        is_chosen = put(row.target_slot % 2 == 0, scores.entropy.device)
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
