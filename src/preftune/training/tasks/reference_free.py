"""ORPO and CPO (with SimPO and AlphaPO): pairs without a reference model.

The sums differ from those of DPO: per-token averages where the method has them, and for ORPO a supervised term that
covers the prompt as well. Some things differ from TRL on purpose. The supervised term is the mean over all tokens of an
optimizer step, where TRL averages the means of micro-batches, so that accumulation changes nothing. A pair whose prompt
alone fills ``max_length`` is dropped, where TRL's average over no tokens is not a number, and without a ``max_length``
nothing is cut, where TRL takes 512. The completion starts at one place for both answers, the earlier one, where TRL
lets the two differ by a token that merges with the prompt's end in one of them only.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from preftune.kernels.device import put, widened
from preftune.kernels.head import TokenScores
from preftune.objectives import PairLogps
from preftune.objectives.numerics import log_odds, per_token
from preftune.packing import PackedRow, Tree, pair_trees
from preftune.training.batch import Example, Examples, Totals
from preftune.training.config import PackedConfig
from preftune.training.guards.evidence import of_pairs
from preftune.training.metrics import Term
from preftune.training.reference_free_config import CPOConfig, ORPOConfig, ReferenceFreeConfig
from preftune.training.sequences import num_scored, reward_metrics, token_metrics
from preftune.training.task import RowTerms, weights_of
from preftune.training.tasks.pairs import Pairs

#: Slots of a pair: chosen completion, rejected completion, prompt of the chosen sequence.
_SLOTS = 3


class ContrastTask(Pairs):
    """CPO's: completions are compared under the policy alone.

    Args:
        args: Settings.
    """

    name = "cpo"
    config_class: ClassVar[type[PackedConfig]] = CPOConfig
    #: Whether the supervised term covers the prompt.
    scores_prompt: ClassVar[bool] = False

    def __init__(self, args: ReferenceFreeConfig) -> None:
        super().__init__(args)
        self.options = replace(self.options, enclose=True)

    def trees(self, example: Example, number: int) -> tuple[Tree, ...]:
        """A pair's trees; the prompt has a slot of its own where it is scored."""
        first = _SLOTS * number
        return pair_trees(
            example["prompt_ids"],
            example["chosen_ids"],
            example["rejected_ids"],
            example.get("rejected_prompt_ids"),
            (first, first + 1),
            first + 2 if self.scores_prompt else None,
            (example.get("chosen_mask"), example.get("rejected_mask")),
        )

    def totals(self, examples: Examples) -> list[float]:
        """Number of pairs, and of tokens in the supervised term."""
        scored = 0
        for e in examples:
            prompt = len(e["prompt_ids"])
            # Nothing predicts the first token of a sequence.
            scored += num_scored(e, "chosen")[1] + (prompt - 1 if self.scores_prompt and prompt else 0)
        return [float(len(examples)), float(scored)]

    def _pair_logps(self, row: PackedRow, scores: TokenScores, examples: Examples, totals: Totals) -> PairLogps:
        """Sums and token counts of a row's pairs."""
        logps = widened(scores.logps)
        slots = put(row.target_slot, logps.device)
        size = _SLOTS * len(examples)
        chosen, rejected, prompt = logps.new_zeros(size).index_add(0, slots, logps).view(-1, _SLOTS).unbind(1)
        counts = np.bincount(row.target_slot, minlength=size).reshape(-1, _SLOTS)
        num_chosen, num_rejected, num_prompt = put(counts, logps.device).unbind(1)
        weights = weights_of(examples)
        return PairLogps(
            chosen_logps=chosen,
            rejected_logps=rejected,
            chosen_lengths=num_chosen,
            rejected_lengths=num_rejected,
            chosen_sum_logps=chosen + prompt,
            chosen_scored=num_chosen + num_prompt,
            weights=put(weights, chosen.device, chosen.dtype) if weights else None,
            mean_chosen_scored=totals[1] / totals[0],
        )

    def row_terms(self, row: PackedRow, scores: TokenScores, examples: Examples, totals: Totals) -> RowTerms:
        """Objective and TRL's metrics of one row."""
        logps = self._pair_logps(row, scores, examples, totals)
        loss = self.objective(logps).loss.sum()
        rewards = torch.stack(self.objective.rewards(logps), 1)
        with torch.no_grad():
            metrics = self._metrics(logps, rewards) | token_metrics(row, scores, _SLOTS)
        return RowTerms(loss, float(logps.num_pairs), metrics, rewards, of_pairs(logps, rewards))

    def _metrics(self, logps: PairLogps, rewards: Tensor) -> dict[str, Term]:
        compared = self.objective.specs[0].scores
        assert compared is not None
        # Averages over tokens or sums, whichever the method compares.
        nll: Term = (-logps.sft_logps.sum(), logps.sft_tokens.sum())
        return reward_metrics(rewards, *compared(logps, 0.0)) | {"nll_loss": nll}


class OddsRatioTask(ContrastTask):
    """ORPO's: the supervised term covers prompt and chosen completion, as TRL's does."""

    name = "orpo"
    config_class = ORPOConfig
    scores_prompt = True

    def _metrics(self, logps: PairLogps, rewards: Tensor) -> dict[str, Term]:
        chosen = per_token(logps.chosen_logps, logps.chosen_lengths)
        odds_ratio = log_odds(chosen) - log_odds(per_token(logps.rejected_logps, logps.rejected_lengths))
        pairs = float(logps.num_pairs)
        return super()._metrics(logps, rewards) | {
            "log_odds_ratio": (torch.nn.functional.logsigmoid(odds_ratio).sum(), pairs),
            "log_odds_chosen": (odds_ratio.sum(), pairs),
        }
