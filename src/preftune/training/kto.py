"""KTO: learning from single answers with a label, as a drop-in for TRL's trainer on packed rows.

To the machinery an example is a pair: its own completion, and one of another example of the same optimizer step, from
which the KL baseline is estimated. The second is scored first, without graph and for all examples of the step and all
processes, so that neither the token budget nor accumulation changes a result. TRL takes each micro-batch for itself:
with accumulation its completions are exchanged, and its baseline is taken, among fewer examples. In an evaluation the
baseline is that of the whole data set, where TRL takes one per batch.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput

from preftune.data.unpaired import prepare_unpaired
from preftune.kernels.device import put, widened
from preftune.kernels.head import TokenScores
from preftune.objectives import PairLogps, UnpairedLogps, check_kto_weights, kl_baseline_from_sum
from preftune.packing import Branch, PackedRow, Tree, build_row
from preftune.training import memory, setup
from preftune.training.base import PackedTrainer, RowTerms
from preftune.training.batch import Batch, Example
from preftune.training.dpo import DPOTrainer
from preftune.training.guards.evidence import of_answers
from preftune.training.kto_config import KTOConfig
from preftune.training.lengths import ExampleLengths, pair_lengths
from preftune.training.metrics import MetricSums, Term
from preftune.training.reference import COLUMNS


class KTOTrainer(DPOTrainer):
    """Kahneman-Tversky optimisation (2402.01306) and unpaired APO-zero (2408.06266).

    Takes the arguments of TRL's trainer of the same name, with the same meaning.

    Args:
        model: Name or path, or a model, PEFT-wrapped or not.
        ref_model: Reference model, or its name or path; by default the policy as it is before training.
        args: Settings.
        data_collator: Not used: rows are packed, not collated. Passing one is refused.
        train_dataset: Prompts, completions and labels; or preference data in any known format, taken apart.
        eval_dataset: Held-out data, or a mapping of names to such.
        processing_class: Tokenizer; by default the model's own.
        compute_metrics: Receives an ``EvalPrediction`` whose predictions are ``(examples,)`` rewards, and whose labels
            are the examples' labels.
        callbacks: Trainer callbacks.
        optimizers: Optimizer and scheduler to use instead of the configured ones.
        quantization_config: Quantisation for a model given by name.
        peft_config: Adapter to train instead of the whole model.
    """

    args: KTOConfig  # type: ignore[assignment]
    example_columns: tuple[str, ...] = (*DPOTrainer.example_columns, "label")  # type: ignore[assignment]
    _tag_names = ("preftune", "kto")
    joins_by_constant = True

    def __init__(
        self,
        model: str | PreTrainedModel | Any,
        ref_model: str | PreTrainedModel | Any = None,
        args: KTOConfig | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_metrics: Callable[[Any], dict[str, float]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
    ) -> None:
        args = args or KTOConfig(setup.default_output_dir(model, "KTO"))
        self._block = args.examples_per_step if args.build_objective().uses_kl else None
        self._kl: Tensor | None = None
        self._evaluating = False
        super().__init__(
            model=model,
            ref_model=ref_model,
            args=cast(Any, args),
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
        )
        self._train_sums, self._eval_sums = _WithMargins(self.args.device), _WithMargins(self.args.device)
        self._check_weights()

    # ---- data -------------------------------------------------------------------------------------------------------

    def _prepared(self, dataset: Any, tokenizer: Any, name: str) -> Any:
        prepared, self.reports[name] = prepare_unpaired(dataset, tokenizer, self._data_options, name, block=self._block)
        return prepared

    def _check_weights(self) -> None:
        labels = self.train_dataset["label"]  # type: ignore[index]
        desirable = int(sum(labels))
        told = check_kto_weights(
            desirable, len(labels) - desirable, self.args.desirable_weight, self.args.undesirable_weight
        )
        if told is not None:
            warnings.warn(told, UserWarning, stacklevel=3)

    def example_trees(self, example: Example, number: int) -> tuple[Tree, ...]:
        """Prompt and completion."""
        return (Tree(example["prompt_ids"], (Branch(example["chosen_ids"], 2 * number),)),)

    def _exchanged_trees(self, example: Example, number: int) -> tuple[Tree, ...]:
        prompt = example.get("rejected_prompt_ids")
        prompt = example["prompt_ids"] if prompt is None else prompt
        return (Tree(prompt, (Branch(example["rejected_ids"], 2 * number),)),)

    def example_totals(self, examples: list[Example]) -> list[float]:
        """Number of examples."""
        return [float(len(examples))]

    def example_lengths(self, dataset: Any) -> ExampleLengths | None:
        """Token counts of tokenised examples, exchanged completions included where they are scored."""
        pairs = pair_lengths(dataset)
        if pairs is None:
            return None
        sequences = pairs.sequences if self._block is not None else pairs.sequences[:, :1]
        total = sequences.sum(1)
        # Neither sequence shares its prompt with another.
        prompt = pairs.row - pairs.completion
        return ExampleLengths(prompt=prompt, completion=total - prompt, row=total, sequences=sequences)

    def num_tokens(self, examples: list[Example]) -> int:
        """Tokens of prompts and own completions."""
        return sum(len(e["prompt_ids"]) + len(e["chosen_ids"]) for e in examples)

    # ---- baseline ---------------------------------------------------------------------------------------------------

    def before_rows(self, rows: list[PackedRow], batch: Batch) -> None:
        """Take the step's KL baseline, and run the reference along where its values are not in the data."""
        super().before_rows(rows, batch)
        if self._block is not None and not self._evaluating:
            self._kl = self._baseline([batch])

    def _baseline(self, some: Iterable[Batch]) -> Tensor:
        """KL baseline of the exchanged completions of several batches, over all processes."""
        sums = [torch.zeros(2, dtype=torch.float64)]
        for batch in some:
            lengths = [self._exchanged_trees(e, 0)[0].num_tokens for e in batch.examples]
            # Without a graph a row costs a fraction of a training row's memory.
            budget = memory.reference_budget(self.max_tokens_per_row, self.args.device)
            numbered = self.forward_policy.rows_of(lengths, budget)
            numbered += [numbered[-1]] * (self._rows_everywhere(len(numbered)) - len(numbered))
            for place, numbers in enumerate(numbered):
                ratios = self._exchanged_ratios([batch.examples[n] for n in numbers])
                # Rows that repeat an earlier one only keep sharded processes in step.
                if not any(numbers is earlier for earlier in numbered[:place]):
                    sums.append(torch.tensor([float(ratios.sum()), len(numbers)], dtype=torch.float64))
        total, number = self._sum_over_processes(torch.stack(sums).sum(0).tolist())
        return kl_baseline_from_sum(put(total, self.args.device, torch.float64), int(number))

    def _exchanged_ratios(self, examples: list[Example]) -> Tensor:
        """Log-ratios of the exchanged completions of some examples, ``(examples,)``, without graph."""
        trees = [tree for k, e in enumerate(examples) for tree in self._exchanged_trees(e, k)]
        row = build_row(trees, range(len(examples)))
        with torch.no_grad(), self.accelerator.autocast(), self.forward_policy.active():
            policy = _sums(row, self.forward_policy(row)[0].logps)
        if COLUMNS[1] in examples[0]:
            return policy - put([e[COLUMNS[1]] for e in examples], policy.device, policy.dtype)
        assert self.reference is not None
        return policy - _sums(row, self.reference.row_logps(row))

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Loss and metrics over the evaluation data, with the KL baseline of all of them."""
        self.model.eval()
        self._evaluating = True
        try:
            if self._block is not None:
                self._kl = self._baseline(dataloader)
            return super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        finally:
            self._evaluating = False

    # ---- loss -------------------------------------------------------------------------------------------------------

    def run_rows(self, model: Any, rows: list[PackedRow], batch: Batch, totals: list[float]) -> Tensor:
        """Row by row: the baseline, which joins the examples of a step, is a constant by now."""
        return PackedTrainer.run_rows(self, model, rows, batch, totals)

    def row_terms(self, row: PackedRow, scores: TokenScores, examples: list[Example], totals: list[float]) -> RowTerms:
        """Objective and TRL's metrics of one row."""
        policy = _sums(row, scores.logps)
        reference = self._reference_sums(row, examples, policy)[0]
        weights = [e["weight"] for e in examples if "weight" in e]
        desirable = put([e["label"] > 0 for e in examples], policy.device)
        logps = UnpairedLogps(
            logps=policy,
            ref_logps=reference,
            labels=desirable,
            weights=put(weights, policy.device, policy.dtype) if weights else None,
        )
        if not self._checked_first_step and self.model.training:
            self._check_policy_is_reference(logps, examples)
        loss = self.objective(logps, kl=self._kl if self._block is not None else None).loss.sum()
        with torch.no_grad():
            rewards = self.args.beta * logps.logratios
            metrics = self._metrics(logps, rewards) | _token_metrics(row, scores, desirable)
            predictions = torch.stack([rewards, desirable.to(rewards.dtype)], 1)
            lengths = put([len(e["chosen_ids"]) for e in examples], logps.logps.device, logps.logps.dtype)
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

    def _check_policy_is_reference(self, logps: UnpairedLogps, examples: list[Example]) -> None:
        lengths = put([len(e["chosen_ids"]) for e in examples], logps.logps.device, logps.logps.dtype)
        self._check_first_step(
            PairLogps(
                chosen_logps=logps.logps,
                rejected_logps=logps.logps,
                ref_chosen_logps=logps.ref_logps,
                ref_rejected_logps=logps.ref_logps,
                chosen_lengths=lengths,
                rejected_lengths=lengths,
            )
        )

    def user_metrics(self, predictions: Any) -> Any:
        """Call ``compute_metrics`` with rewards as predictions and labels as labels."""
        from transformers import EvalPrediction

        assert self.compute_metrics is not None
        return self.compute_metrics(EvalPrediction(predictions[:, 0], predictions[:, 1] > 0))


class _WithMargins(MetricSums):
    """Adds the margin, which is a difference of two means over different examples."""

    def pop(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Means since the last call, and the margin where both kinds of examples were there."""
        found = super().pop(reduce)
        if "rewards/chosen" in found and "rewards/rejected" in found:
            found["rewards/margins"] = found["rewards/chosen"] - found["rewards/rejected"]
        return found


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


__all__ = ["KTOTrainer"]
