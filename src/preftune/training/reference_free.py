"""ORPO and CPO (with SimPO and AlphaPO): pairs without a reference model, as drop-ins for TRL's trainers.

Both are the pair trainer with other sums: per-token averages where the method has them, and for ORPO a supervised term
that covers the prompt as well. Some things differ from TRL on purpose. The supervised term is the mean over all tokens
of an optimizer step, where TRL averages the means of micro-batches, so that accumulation changes nothing. A pair whose
prompt alone fills ``max_length`` is dropped, where TRL's average over no tokens is not a number, and without a
``max_length`` nothing is cut, where TRL takes 512. The completion starts at one place for both answers, the earlier
one, where TRL lets the two differ by a token that merges with the prompt's end in one of them only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from preftune.data import prepare
from preftune.errors import ConfigError
from preftune.kernels.device import put, widened
from preftune.kernels.head import TokenScores
from preftune.objectives import PairLogps
from preftune.objectives.numerics import log_odds, per_token
from preftune.packing import PackedRow, Tree, pair_trees
from preftune.training import setup
from preftune.training.base import RowTerms
from preftune.training.batch import Example
from preftune.training.dpo import DPOTrainer
from preftune.training.guards.evidence import of_pairs
from preftune.training.metrics import Term
from preftune.training.reference_free_config import CPOConfig, ORPOConfig, ReferenceFreeConfig

#: Slots of a pair: chosen completion, rejected completion, prompt of the chosen sequence.
_SLOTS = 3


class ReferenceFreeTrainer(DPOTrainer):
    """Base of the trainers that compare completions under the policy alone.

    Args:
        model: Name or path, or a model, PEFT-wrapped or not.
        args: Settings.
        data_collator: Not used: rows are packed, not collated. Passing one is refused.
        train_dataset: Preference data in any known format.
        eval_dataset: Held-out preference data, or a mapping of names to such.
        processing_class: Tokenizer; by default the model's own.
        model_init: Makes the model, where ``model`` is left out; called once.
        callbacks: Trainer callbacks.
        optimizers: Optimizer and scheduler to use instead of the configured ones.
        preprocess_logits_for_metrics: Not available, since no logits exist. Passing one is refused.
        peft_config: Adapter to train instead of the whole model.
        compute_metrics: Receives an ``EvalPrediction`` whose predictions are ``(pairs, 2)`` rewards of the chosen and
            the rejected completion, and whose labels are zeros, the index of the chosen one.
    """

    balances_experts = False

    args: ReferenceFreeConfig  # type: ignore[assignment]
    config_class: ClassVar[type[ReferenceFreeConfig]]
    #: Whether the supervised term covers the prompt.
    scores_prompt: ClassVar[bool] = False

    def __init__(
        self,
        model: str | PreTrainedModel | Any = None,
        args: ReferenceFreeConfig | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        model_init: Callable[[], Any] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        preprocess_logits_for_metrics: Any = None,
        peft_config: Any = None,
        compute_metrics: Callable[[Any], dict[str, float]] | None = None,
    ) -> None:
        if preprocess_logits_for_metrics is not None:
            raise ConfigError(
                "not available: logits are never built",
                where="preprocess_logits_for_metrics",
                remedy="leave preprocess_logits_for_metrics out",
            )
        model = _one_model(model, model_init)
        args = args or self.config_class(setup.default_output_dir(model, type(self).__name__.removesuffix("Trainer")))
        super().__init__(
            model=model,
            args=cast(Any, args),
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            peft_config=peft_config,
        )

    # ---- data -------------------------------------------------------------------------------------------------------

    def _prepared(self, dataset: Any, tokenizer: Any, name: str) -> Any:
        options = replace(self._data_options, enclose=True)
        prepared, self.reports[name] = prepare(dataset, tokenizer, options, name)
        return prepared

    def example_trees(self, example: Example, number: int) -> tuple[Tree, ...]:
        """A pair's trees; the prompt has a slot of its own where it is scored."""
        first = _SLOTS * number
        return pair_trees(
            example["prompt_ids"],
            example["chosen_ids"],
            example["rejected_ids"],
            example.get("rejected_prompt_ids"),
            (first, first + 1),
            first + 2 if self.scores_prompt else None,
        )

    def example_totals(self, examples: list[Example]) -> list[float]:
        """Number of pairs, and of tokens in the supervised term."""
        scored = 0
        for e in examples:
            prompt = len(e["prompt_ids"])
            # Nothing predicts the first token of a sequence.
            scored += len(e["chosen_ids"]) + (prompt - 1 if self.scores_prompt else -(prompt == 0))
        return [float(len(examples)), float(scored)]

    # ---- loss -------------------------------------------------------------------------------------------------------

    def pair_logps(
        self, row: PackedRow, scores: TokenScores, examples: list[Example], totals: list[float]
    ) -> PairLogps:
        """Sums and token counts of a row's pairs."""
        logps = widened(scores.logps)
        slots = put(row.target_slot, logps.device)
        size = _SLOTS * len(examples)
        chosen, rejected, prompt = logps.new_zeros(size).index_add(0, slots, logps).view(-1, _SLOTS).unbind(1)
        counts = np.bincount(row.target_slot, minlength=size).reshape(-1, _SLOTS)
        num_chosen, num_rejected, num_prompt = put(counts, logps.device).unbind(1)
        weights = [e["weight"] for e in examples if "weight" in e]
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

    def row_terms(self, row: PackedRow, scores: TokenScores, examples: list[Example], totals: list[float]) -> RowTerms:
        """Objective and TRL's metrics of one row."""
        logps = self.pair_logps(row, scores, examples, totals)
        loss = self.objective(logps).loss.sum()
        rewards = torch.stack(self.objective.rewards(logps), 1)
        with torch.no_grad():
            metrics = self._pair_metrics(logps, rewards) | _token_metrics(row, scores)
        return RowTerms(loss, float(logps.num_pairs), metrics, rewards, of_pairs(logps, rewards))

    def _pair_metrics(self, logps: PairLogps, rewards: Tensor) -> dict[str, Term]:
        (chosen, rejected), pairs = rewards.unbind(1), float(logps.num_pairs)
        compared = self.objective.specs[0].scores
        assert compared is not None
        # Averages over tokens or sums, whichever the method compares.
        chosen_logps, rejected_logps = compared(logps, 0.0)
        return {
            "rewards/chosen": (chosen.sum(), pairs),
            "rewards/rejected": (rejected.sum(), pairs),
            "rewards/accuracies": ((chosen > rejected).sum(), pairs),
            "rewards/margins": ((chosen - rejected).sum(), pairs),
            "logps/chosen": (chosen_logps.sum(), pairs),
            "logps/rejected": (rejected_logps.sum(), pairs),
            "nll_loss": (-logps.sft_logps.sum(), logps.sft_tokens.sum()),
        }


class ORPOTrainer(ReferenceFreeTrainer):
    """Odds-ratio preference optimisation (2403.07691): supervised fine-tuning with a preference term.

    Takes the arguments of TRL's trainer of the same name, with the same meaning; see :class:`ReferenceFreeTrainer`. The
    supervised term covers prompt and chosen completion, as TRL's does.
    """

    args: ORPOConfig
    config_class = ORPOConfig
    scores_prompt = True
    _tag_names = ("preftune", "orpo")

    def _pair_metrics(self, logps: PairLogps, rewards: Tensor) -> dict[str, Term]:
        chosen = per_token(logps.chosen_logps, logps.chosen_lengths)
        odds_ratio = log_odds(chosen) - log_odds(per_token(logps.rejected_logps, logps.rejected_lengths))
        pairs = float(logps.num_pairs)
        return super()._pair_metrics(logps, rewards) | {
            "log_odds_ratio": (torch.nn.functional.logsigmoid(odds_ratio).sum(), pairs),
            "log_odds_chosen": (odds_ratio.sum(), pairs),
        }


class CPOTrainer(ReferenceFreeTrainer):
    """Contrastive preference optimisation (2401.08417), SimPO (2405.14734) and AlphaPO (2501.03884).

    Takes the arguments of TRL's trainer of the same name, with the same meaning; see :class:`ReferenceFreeTrainer`.
    """

    args: CPOConfig
    config_class = CPOConfig
    _tag_names = ("preftune", "cpo")


def _one_model(model: Any, model_init: Callable[[], Any] | None) -> Any:
    if (model is None) == (model_init is None):
        raise ConfigError(
            "no model is given" if model is None else "a model is given, and a function that makes one",
            where="model" if model is None else "model_init",
            remedy="pass either model or model_init",
        )
    return model if model_init is None else model_init()


def _token_metrics(row: PackedRow, scores: TokenScores) -> dict[str, Term]:
    """Means over completion tokens; prompts and padding, which TRL's mean logits include, are left out."""
    if scores.entropy is None or scores.mean_logit is None or scores.top1 is None:
        return {}
    slots = put(row.target_slot % _SLOTS, scores.entropy.device)
    is_chosen, is_rejected = slots == 0, slots == 1
    num_chosen, num_rejected = is_chosen.sum(), is_rejected.sum()
    return {
        "entropy": ((scores.entropy * (slots < 2)).sum(), num_chosen + num_rejected),
        "logits/chosen": ((scores.mean_logit * is_chosen).sum(), num_chosen),
        "logits/rejected": ((scores.mean_logit * is_rejected).sum(), num_rejected),
        "mean_token_accuracy": ((scores.top1 & is_chosen).sum(), num_chosen),
    }


__all__ = ["CPOTrainer", "ORPOTrainer", "ReferenceFreeTrainer"]
