"""DPO and its family: a drop-in for TRL's trainer on packed, prompt-sharing rows."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, set_seed

from preftune.data import PrepareReport, prepare
from preftune.errors import ConfigError, DataError, ModelError, TrainingError
from preftune.kernels.device import put
from preftune.kernels.head import TokenScores
from preftune.models.forward import RowForward
from preftune.objectives import Objective, ObjectiveResult, PairLogps
from preftune.packing import PackedRow, Tree, pair_trees
from preftune.references.store import ReferenceStore
from preftune.training import carried, checks, memory, setup
from preftune.training.base import PackedTrainer, RowTerms
from preftune.training.batch import Batch, Example
from preftune.training.carried import RunningDelta
from preftune.training.config import DPOConfig
from preftune.training.explicit import choose_adapters, explicit_reference, reloaded
from preftune.training.generations import Generations
from preftune.training.guards import GUARD_NAMES
from preftune.training.guards.evidence import of_pairs
from preftune.training.joint import run_jointly
from preftune.training.lengths import ExampleLengths, pair_lengths
from preftune.training.pairs import SyncReference, disagreement, pair_metrics, sequence_sums, wpo_weights
from preftune.training.reference import COLUMNS, Reference
from preftune.training.visits import visited_rows


class DPOTrainer(PackedTrainer):
    """Direct preference optimisation (2305.18290) and the methods of its family.

    Takes the arguments of TRL's trainer of the same name, with the same meaning.

    Args:
        model: Name or path, or a model, PEFT-wrapped or not.
        ref_model: Reference model, or its name or path; by default the policy as it is before training.
        args: Settings.
        data_collator: Not used: rows are packed, not collated. Passing one is refused.
        train_dataset: Preference data in any known format.
        eval_dataset: Held-out preference data, or a mapping of names to such.
        processing_class: Tokenizer; by default the model's own.
        compute_metrics: Receives an ``EvalPrediction`` whose predictions are ``(pairs, 2)`` rewards of the chosen and
            the rejected completion, and whose labels are zeros, the index of the chosen one.
        callbacks: Trainer callbacks.
        optimizers: Optimizer and scheduler to use instead of the configured ones.
        quantization_config: Quantisation for a model given by name.
        peft_config: Adapter to train instead of the whole model.
    """

    args: DPOConfig
    example_columns = (
        "prompt_ids",
        "chosen_ids",
        "rejected_ids",
        "rejected_prompt_ids",
        "margin",
        "weight",
        *COLUMNS,
    )
    _tag_names = ("preftune", "dpo")
    guard_names = GUARD_NAMES
    balances_experts = True
    #: Whether a loss that joins the examples of a step does so by a number that is known before its rows run.
    joins_by_constant = False

    def __init__(
        self,
        model: str | PreTrainedModel | Any,
        ref_model: str | PreTrainedModel | Any = None,
        args: DPOConfig | None = None,
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
        args = args or DPOConfig(setup.default_output_dir(model, "DPO"))
        checks.refuse_collator(data_collator)
        checks.require_dataset(train_dataset)
        if ref_model is model and not isinstance(model, str | None):
            raise ModelError(
                "model and ref_model are the same object, so that they would always agree",
                where="ref_model",
                remedy="leave ref_model out: the initial policy is the reference",
            )
        set_seed(args.seed)
        model, processing_class = setup.load(model, processing_class, args, quantization_config)
        model = setup.wrap_peft(model, peft_config, args)
        choose_adapters(model, args)
        self.objective: Objective = args.build_objective()
        ref_model = explicit_reference(ref_model, model, processing_class, args, self.objective)
        if args.disable_dropout:
            for each in (model, ref_model):
                setup.disable_dropout(each)
        self.reports: dict[str, PrepareReport] = {}
        self._data_options = setup.data_options(
            args, max_prompt_length=args.max_prompt_length, implicit_prompt=args.implicit_prompt
        )
        self.running_delta = RunningDelta() if self.objective.uses_running_delta else None
        self.needs_log_sum_sq = args.use_weighting
        train_dataset = setup.prepared_train(
            train_dataset, args, lambda rows: self._prepared(rows, processing_class, "train")
        )
        eval_dataset = self._prepared_eval(eval_dataset, processing_class)
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        if self.router is not None and not self.objective.separable and not self.joins_by_constant:
            raise ConfigError(
                f"{', '.join(self.objective.names)} joins the pairs of a step, the load-balancing loss divides them",
                where="router_aux_loss_coef",
                value=self.router.coef,
                remedy="set router_aux_loss_coef: 0",
            )
        setup.add_tags(self.model, self._tag_names)
        self.ref_model = ref_model
        # As in TRL, the plain SFT term alone still reports rewards against the reference.
        wanted = self.objective.needs_reference or self.objective.names == ("sft",)
        self.reference = self._make_reference(ref_model) if wanted else None
        self._live: dict[int, tuple[Tensor, Tensor]] = {}
        self.generations = Generations(self) if args.generation_steps else None
        if self.generations is not None:
            self.add_callback(self.generations)
        self._checked_first_step = not args.first_step_check
        if args.sync_ref_model:
            self.add_callback(SyncReference(self))

    # ---- data -------------------------------------------------------------------------------------------------------

    def _prepared(self, dataset: Any, tokenizer: Any, name: str) -> Any:
        stale = [column for column in COLUMNS if column in (getattr(dataset, "column_names", None) or ())]
        if stale:
            # Whose log-probs they are cannot be known; the store finds what is still valid by its content.
            warnings.warn(f"columns {stale} of the data are not used", UserWarning, stacklevel=4)
            dataset = dataset.remove_columns(stale)
        prepared, self.reports[name] = prepare(dataset, tokenizer, self._data_options, name)
        if "margins" in self.objective.requires:
            self._check_margins(prepared, name)
        return prepared

    def _check_margins(self, prepared: Any, name: str) -> None:
        if "margin" not in prepared.column_names:
            raise DataError(
                f"{', '.join(self.objective.names)} needs a score gap for every pair",
                where=f"{name} data set",
                value=prepared.column_names,
                remedy="give the data a `margin` column, or scores for both completions",
            )
        # A row without a gap becomes NaN, which the check names.
        self.objective.check_margins(torch.tensor(prepared.data.table["margin"].to_numpy()))

    def _prepared_eval(self, dataset: Any, tokenizer: Any) -> Any:
        if dataset is None:
            return None
        if isinstance(dataset, dict):
            return {name: self._prepared(each, tokenizer, name) for name, each in dataset.items()}
        return self._prepared(dataset, tokenizer, "eval")

    def example_trees(self, example: Example, number: int) -> tuple[Tree, ...]:
        """A pair's trees."""
        slots = (2 * number, 2 * number + 1)
        return pair_trees(
            example["prompt_ids"],
            example["chosen_ids"],
            example["rejected_ids"],
            example.get("rejected_prompt_ids"),
            slots,
        )

    def example_totals(self, examples: list[Example]) -> list[float]:
        """Number of pairs, and of scored chosen tokens."""
        scored = sum(len(e["chosen_ids"]) - (len(e["prompt_ids"]) == 0) for e in examples)
        return [float(len(examples)), float(scored)]

    def evaluation_totals(self, dataloader: DataLoader[Any]) -> list[float] | None:
        """Numbers of pairs and scored tokens: a mean over tokens must not depend on the batches it is taken in."""
        if not self.objective.averages_tokens:
            return None
        mine = [self.example_totals(batch.examples) for batch in dataloader]
        return self._sum_over_processes([sum(each) for each in zip([0.0, 0.0], *mine, strict=True)])

    def example_lengths(self, dataset: Any) -> ExampleLengths | None:
        """Token counts of tokenised pairs."""
        return pair_lengths(dataset)

    def num_tokens(self, examples: list[Example]) -> int:
        """Tokens of both sequences of every pair."""
        total = 0
        for e in examples:
            other = e.get("rejected_prompt_ids")
            total += len(e["prompt_ids"]) + len(e["prompt_ids"] if other is None else other)
            total += len(e["chosen_ids"]) + len(e["rejected_ids"])
        return total

    # ---- reference --------------------------------------------------------------------------------------------------

    def _make_reference(self, ref_model: Any) -> Reference:
        fixed = self.args.reference_store and not self.args.sync_ref_model and self._is_map_style(self.train_dataset)
        return Reference(
            self.forward_policy,
            self.accelerator.autocast,
            store=ReferenceStore() if fixed else None,
            model=None if ref_model is None else self._reference_forward(ref_model),
            adapter=self.args.ref_adapter_name,
            ld_alpha=self.args.ld_alpha,
            compute={"mixed_precision": str(self.accelerator.mixed_precision)},
            reload=self._reloaded_reference,
            show_progress=not self.args.disable_tqdm,
        )

    def _reference_forward(self, ref_model: Any) -> RowForward:
        inner = self.accelerator.unwrap_model(self.accelerator.prepare_model(ref_model, evaluation_mode=True))
        return self._choose_path(inner)[0]

    def _reloaded_reference(self) -> RowForward | None:
        model = reloaded(self.accelerator.unwrap_model(self.model), self.args)
        return None if model is None else self._reference_forward(model)

    @staticmethod
    def _is_map_style(dataset: Any) -> bool:
        return isinstance(dataset, datasets.Dataset)

    def prepare_reference(self) -> None:
        """Know the reference before the policy moves: score what is missing, or keep what will be run along.

        Called by :meth:`train` and :meth:`evaluate`; harmless to call again.
        """
        reference = self.reference
        if reference is None:
            return
        if reference.store is None:
            if not reference.policy_moved:
                reference.keep_shadow()
            return
        state = torch.get_rng_state()
        # Also after training: a longer run after a short one visits pairs that are not known yet.
        self.train_dataset = self._with_reference(self.train_dataset, visited_rows(self), "train")
        if isinstance(self.eval_dataset, dict):
            self.eval_dataset = {k: self._with_reference(each, None, k) for k, each in self.eval_dataset.items()}
        elif self.eval_dataset is not None:
            self.eval_dataset = self._with_reference(self.eval_dataset, None, "eval")
        torch.set_rng_state(state)
        if self._is_peft() and not reference.policy_moved:
            # An adapter is small enough to keep, and lets new data be evaluated later.
            reference.keep_shadow()

    def _is_peft(self) -> bool:
        return hasattr(self.accelerator.unwrap_model(self.model), "peft_config")

    def _with_reference(self, dataset: Any, rows: list[int] | None, name: str) -> Any:
        assert self.reference is not None
        if not self._is_map_style(dataset):
            self.reference.keep_shadow()
            return dataset
        rows = list(range(len(dataset))) if rows is None else rows
        if set(COLUMNS) <= set(dataset.column_names):
            known = np.isfinite(np.asarray(dataset[COLUMNS[0]], dtype=np.float32))
            if known[rows].all():
                return dataset
            dataset = dataset.remove_columns(list(COLUMNS))
        sums = self.reference.sums(
            dataset,
            rows,
            max_tokens=memory.reference_budget(self.max_tokens_per_row, self.args.device),
            share=(self.args.process_index, self.args.world_size),
            exchange=self._exchange,
            description=f"Reference log-probs ({name})",
        )
        for column, values in zip(COLUMNS, sums.T, strict=True):
            dataset = dataset.add_column(column, values)
        return dataset

    def _exchange(self, values: dict[bytes, Any]) -> dict[bytes, Any]:
        if self.args.world_size == 1:
            return values
        from accelerate.utils import gather_object

        merged: dict[bytes, Any] = {}
        for part in gather_object([values]):
            merged.update(part)
        return merged

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; see transformers' ``Trainer.train``."""
        # Before a reference pass that may take long.
        self.check_resume(*args[:1], **kwargs)
        self.prepare_reference()
        if self.generations is not None:
            self.generations.keep_reference()
        try:
            return super().train(*args, **kwargs)
        finally:
            if self.reference is not None and self.state.global_step:
                self.reference.policy_moved = True

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate; the reference is scored before, on the data given at construction."""
        self.prepare_reference()
        return super().evaluate(*args, **kwargs)

    def evaluation_data(self, dataset: Any, name: str) -> Any:
        """Tokenised pairs, with reference log-probs where they are stored."""
        dataset = self._prepared(dataset, self.processing_class, name)
        if self.reference is None or self.reference.store is None:
            return dataset
        return self._with_reference(dataset, None, name)

    def before_rows(self, rows: list[PackedRow], batch: Batch) -> None:
        """Run the reference along where its values are not in the data."""
        if self.running_delta is not None:
            self.running_delta.begin()
        if self.reference is None or (batch.examples and COLUMNS[0] in batch.examples[0]):
            return
        self._live = {id(row): sequence_sums(row, self.reference.row_logps(row), self.args.ld_alpha) for row in rows}

    # ---- loss -------------------------------------------------------------------------------------------------------

    def _reference_sums(self, row: PackedRow, examples: list[Example], like: Tensor) -> tuple[Any, Any]:
        if self.reference is None:
            return None, None
        if COLUMNS[0] not in examples[0]:
            return self._live[id(row)]
        known = np.array([[e[column] for column in COLUMNS] for e in examples])
        if np.isnan(known).any():
            raise TrainingError(
                "a pair's reference log-probs were not computed before training",
                remedy="set reference_store: false, and report this: the data order was foreseen wrongly",
            )
        values = put(known, like.device, like.dtype)
        return values[:, 0], values[:, 1]

    def pair_logps(
        self, row: PackedRow, scores: TokenScores, examples: list[Example], totals: list[float]
    ) -> PairLogps:
        """Everything the objective may ask for about a row's pairs."""
        device = scores.logps.device
        ld_alpha = self.args.ld_alpha
        chosen, rejected = sequence_sums(row, scores.logps, ld_alpha)
        plain = chosen if ld_alpha is None else sequence_sums(row, scores.logps)[0]
        ref_chosen, ref_rejected = self._reference_sums(row, examples, chosen)

        def column(values: list[float]) -> Tensor:
            return put(values, device, chosen.dtype)

        weights = [e["weight"] for e in examples if "weight" in e]
        margins = [e["margin"] for e in examples] if "margins" in self.objective.requires else []
        return PairLogps(
            chosen_logps=chosen,
            rejected_logps=rejected,
            ref_chosen_logps=ref_chosen,
            ref_rejected_logps=ref_rejected,
            chosen_lengths=column([len(e["chosen_ids"]) for e in examples]),
            rejected_lengths=column([len(e["rejected_ids"]) for e in examples]),
            chosen_sum_logps=plain,
            chosen_scored=column([len(e["chosen_ids"]) - (len(e["prompt_ids"]) == 0) for e in examples]),
            margins=column(margins) if margins else None,
            weights=column(weights) if weights else None,
            wpo_weights=wpo_weights(row, scores) if self.args.use_weighting else None,
            mean_chosen_scored=totals[1] / totals[0],
        )

    def score_row(
        self, model: Any, row: PackedRow, batch: Batch, totals: list[float], with_stats: bool
    ) -> tuple[TokenScores, PairLogps]:
        """Score a row and gather what the objective asks about its pairs."""
        scores = self.forward_row(model, row, with_stats)
        return scores, self.pair_logps(row, scores, [batch.examples[n] for n in row.examples], totals)

    def row_terms(self, row: PackedRow, scores: TokenScores, examples: list[Example], totals: list[float]) -> RowTerms:
        """Objective and TRL's metrics of one row."""
        logps = self.pair_logps(row, scores, examples, totals)
        result = self.losses(logps)
        terms = self._terms(row, scores, logps, result.parts)
        terms.total = result.loss.sum()
        return terms

    def losses(self, logps: PairLogps) -> ObjectiveResult:
        """The objective of some pairs, with the numbers that belong to the whole step."""
        return self.objective(logps, bco_delta=None if self.running_delta is None else self.running_delta.state.delta)

    def training_step(  # type: ignore[override]
        self, model: Any, inputs: Batch, num_items_in_batch: Any = None
    ) -> Tensor:
        """Forward and backward of all rows of an optimizer step, and what follows from their rewards."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.running_delta is not None and len(inputs):
            self.running_delta.finish(self._reduce)
        return loss

    def run_rows(self, model: Any, rows: list[PackedRow], batch: Batch, totals: list[float]) -> Tensor:
        """Row by row, or in two passes where the loss joins the pairs of a step."""
        if self.objective.separable:
            return super().run_rows(model, rows, batch, totals)
        return run_jointly(self, model, rows, batch, totals)

    def note_row(self, row: PackedRow, scores: TokenScores, logps: PairLogps, parts: Any) -> None:
        """Add a row's metrics to the next log line."""
        terms = self._terms(row, scores, logps, parts)
        self._train_sums.add(terms.metrics)
        self.watch.add_train(terms.pairs)

    def _terms(self, row: PackedRow, scores: TokenScores, logps: PairLogps, parts: Any) -> RowTerms:
        if not self._checked_first_step and self.model.training:
            self._check_first_step(logps)
        rewards = torch.stack(self.objective.rewards(logps), 1).detach()
        metrics = pair_metrics(row, scores, logps, rewards)
        if self.running_delta is not None:
            metrics["bco_delta"] = (self.running_delta.state.delta, 1.0)
            self.running_delta.note(row, rewards)
        if parts and len(self.objective.names) > 1:
            metrics |= {f"loss/{name}": (part.detach().sum(), float(logps.num_pairs)) for name, part in parts.items()}
        return RowTerms(rewards.new_zeros(()), float(logps.num_pairs), metrics, rewards, of_pairs(logps, rewards))

    def user_metrics(self, predictions: Any) -> Any:
        """Call ``compute_metrics`` with rewards as predictions and the chosen column as label."""
        from transformers import EvalPrediction

        assert self.compute_metrics is not None
        return self.compute_metrics(EvalPrediction(predictions, np.zeros(len(predictions), dtype=np.int64)))

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        carried.save(self, output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            carried.load(self, checkpoint)

    # ---- first step -------------------------------------------------------------------------------------------------

    def _check_first_step(self, logps: PairLogps) -> None:
        """Before the first update the policy is the reference: every log-ratio is zero and a logistic loss is ln 2."""
        self._checked_first_step = True
        given = self.ref_model is not None or self.args.ref_adapter_name is not None
        if self.state.global_step or self.reference is None or given or self.noise is not None:
            return
        half = self.accelerator.mixed_precision != "no" or next(self.model.parameters()).dtype != torch.float32
        told = disagreement(logps, half)
        if told is not None:
            warnings.warn(told, UserWarning, stacklevel=2)


__all__ = ["DPOTrainer"]
