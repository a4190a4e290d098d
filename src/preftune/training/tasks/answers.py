"""KTO: learning from single answers with a label.

An example is its own completion, and one of another example of the same optimizer step, from which the KL baseline is
estimated. The second is scored first, without graph and for all examples of the step and all processes, so that neither
the token budget nor accumulation changes a result. TRL takes each micro-batch for itself: with accumulation its
completions are exchanged, and its baseline is taken, among fewer examples. In an evaluation the baseline is that of the
whole data set, where TRL takes one per batch.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from preftune.data import PrepareReport
from preftune.data.unpaired import prepare_unpaired
from preftune.kernels.device import put, widened
from preftune.kernels.head import TokenScores
from preftune.objectives import UnpairedLogps, check_kto_weights, kl_baseline_from_sum
from preftune.packing import Branch, PackedRow, Tree
from preftune.training.batch import Batch, Example, Examples, Totals
from preftune.training.guards.evidence import of_answers
from preftune.training.lengths import ExampleLengths, pair_lengths
from preftune.training.metrics import Term
from preftune.training.preference_config import KTOConfig
from preftune.training.reference import COLUMNS
from preftune.training.sequences import num_scored
from preftune.training.task import RowTerms, Scoring, weights_of
from preftune.training.tasks.preference import PreferenceTask


class AnswerTask(PreferenceTask):
    """Single answers, desirable or not.

    Args:
        args: Settings.
    """

    name = "kto"
    config_class = KTOConfig
    trains_on = "labelled answers"
    columns = (
        "prompt_ids",
        "chosen_ids",
        "rejected_ids",
        "rejected_prompt_ids",
        "chosen_mask",
        "rejected_mask",
        "weight",
        "label",
        *COLUMNS,
    )
    # Completions are exchanged among the examples of a step, whose number the rows that are left out change.
    streams = False
    balances_experts = True

    def __init__(self, args: KTOConfig) -> None:
        super().__init__(args)
        self._weights = (args.desirable_weight, args.undesirable_weight)
        self._beta = args.beta
        #: Examples among which completions are exchanged, or ``None`` for a method without a baseline.
        self._block = args.examples_per_step if self.objective.uses_kl else None
        self._kl: Tensor | None = None

    # ---- data -------------------------------------------------------------------------------------------------------

    def prepare(self, dataset: Any, tokenizer: Any, name: str) -> tuple[Any, PrepareReport]:
        """Tokenised answers, each with the one that it is exchanged for."""
        return prepare_unpaired(dataset, tokenizer, self.options, name, block=self._block)

    def check_training_data(self, dataset: Any) -> None:
        """Say so where the weights do not make up for the shares of the labels."""
        labels = dataset["label"]
        desirable = int(sum(labels))
        told = check_kto_weights(desirable, len(labels) - desirable, *self._weights)
        if told is not None:
            warnings.warn(told, UserWarning, stacklevel=4)

    def lengths(self, dataset: Any) -> ExampleLengths | None:
        """Token counts of tokenised examples, exchanged completions included where they are scored."""
        pairs = pair_lengths(dataset)
        if pairs is None:
            return None
        sequences = pairs.sequences if self._block is not None else pairs.sequences[:, :1]
        total = sequences.sum(1)
        # Neither sequence shares its prompt with another.
        prompt = pairs.row - pairs.completion
        return ExampleLengths(prompt=prompt, completion=total - prompt, row=total, sequences=sequences)

    def num_tokens(self, examples: Examples) -> int:
        """Tokens of prompts and own completions."""
        return sum(len(e["prompt_ids"]) + len(e["chosen_ids"]) for e in examples)

    # ---- baseline ---------------------------------------------------------------------------------------------------

    def before_rows(self, rows: Sequence[PackedRow], batch: Batch, scoring: Scoring, *, training: bool) -> None:
        """Run the reference along where its values are not in the data, and take the step's KL baseline."""
        super().before_rows(rows, batch, scoring, training=training)
        if training and self._block is not None:
            self._kl = self._baseline([batch], scoring)

    def begin_evaluation(self, batches: Iterable[Batch], scoring: Scoring) -> list[float] | None:
        """Take the KL baseline of all evaluation data."""
        if self._block is not None:
            self._kl = self._baseline(batches, scoring)
        return None

    def _baseline(self, some: Iterable[Batch], scoring: Scoring) -> Tensor:
        """KL baseline of the exchanged completions of several batches, over all processes."""
        sums = [torch.zeros(2, dtype=torch.float64)]
        for row, examples, logps, counts in scoring.scored(some, _exchanged_trees):
            ratios = self._exchanged_ratios(row, logps, examples)
            if counts:
                sums.append(torch.tensor([float(ratios.sum()), len(ratios)], dtype=torch.float64))
        total, number = scoring.sum_over_processes(torch.stack(sums).sum(0).tolist())
        return kl_baseline_from_sum(put(total, scoring.device, torch.float64), int(number))

    def _exchanged_ratios(self, row: PackedRow, logps: Tensor, examples: Examples) -> Tensor:
        """Log-ratios of the exchanged completions of some examples, ``(examples,)``, without graph."""
        policy = _sums(row, logps)
        if COLUMNS[1] in examples[0]:
            return policy - put([e[COLUMNS[1]] for e in examples], policy.device, policy.dtype)
        assert self.reference is not None
        return policy - _sums(row, self.reference.row_logps(row))

    # ---- loss -------------------------------------------------------------------------------------------------------

    def trees(self, example: Example, number: int) -> tuple[Tree, ...]:
        """Prompt and completion."""
        return (Tree(example["prompt_ids"], (Branch(example["chosen_ids"], 2 * number, example.get("chosen_mask")),)),)

    def row_terms(self, row: PackedRow, scores: TokenScores, examples: Examples, totals: Totals) -> RowTerms:
        """Objective and TRL's metrics of one row; the baseline, which joins the examples of a step, is a constant."""
        policy = _sums(row, scores.logps)
        weights = weights_of(examples)
        desirable = put([e["label"] > 0 for e in examples], policy.device)
        logps = UnpairedLogps(
            logps=policy,
            ref_logps=self.reference_sums(row, examples, policy)[0],
            labels=desirable,
            weights=put(weights, policy.device, policy.dtype) if weights else None,
        )
        lengths = put([num_scored(e, "chosen")[0] for e in examples], policy.device, policy.dtype)
        self.check_agreement(logps.logratios, lengths)
        loss = self.objective(logps, kl=self._kl if self._block is not None else None).loss.sum()
        with torch.no_grad():
            rewards = self._beta * logps.logratios
            metrics = self._metrics(logps, rewards) | _token_metrics(row, scores, desirable)
            predictions = torch.stack([rewards, desirable.to(rewards.dtype)], 1)
            watched = of_answers(logps.logratios, rewards, desirable, lengths)
        return RowTerms(loss, float(len(examples)), metrics, predictions, watched)

    def _metrics(self, logps: UnpairedLogps, rewards: Tensor) -> dict[str, Term]:
        terms: dict[str, Term] = {}
        for name, chosen in (("chosen", logps.labels), ("rejected", ~logps.labels)):
            number = chosen.sum()
            terms[f"rewards/{name}"] = ((rewards * chosen).sum(), number)
            terms[f"logps/{name}"] = ((logps.logps.detach() * chosen).sum(), number)
        if self._kl is not None:
            terms["kl"] = (self._kl * logps.num_examples, float(logps.num_examples))
        return terms

    def derived(self, metrics: dict[str, float]) -> dict[str, float]:
        """The margin, a difference of two means over different examples, where both kinds were there."""
        if "rewards/chosen" in metrics and "rewards/rejected" in metrics:
            metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
        return metrics

    def judged(self, predictions: Any) -> tuple[Any, Any]:
        """Rewards as predictions and labels as labels."""
        return predictions[:, 0], predictions[:, 1] > 0


def _exchanged_trees(example: Example, number: int) -> tuple[Tree, ...]:
    prompt = example.get("rejected_prompt_ids")
    prompt = example["prompt_ids"] if prompt is None else prompt
    return (Tree(prompt, (Branch(example["rejected_ids"], 2 * number, example.get("rejected_mask")),)),)


def _sums(row: PackedRow, logps: Tensor) -> Tensor:
    """Per-example sums ``(examples,)``, in fp64: log-ratios are small differences of large sums."""
    logps = widened(logps)
    slots = put(row.target_slot // 2, logps.device)
    return logps.new_zeros(len(row.examples)).index_add(0, slots, logps)


def _token_metrics(row: PackedRow, scores: TokenScores, desirable: Tensor) -> dict[str, Term]:
    if scores.entropy is None or scores.mean_logit is None:
        return {}
    chosen = desirable[put(row.target_slot // 2, desirable.device)]
    return {
        "entropy": (scores.entropy.sum(), float(len(row.target_slot))),
        "logits/chosen": ((scores.mean_logit * chosen).sum(), chosen.sum()),
        "logits/rejected": ((scores.mean_logit * ~chosen).sum(), (~chosen).sum()),
    }
