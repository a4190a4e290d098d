"""transformers' trainer, running a task on packed rows.

What is transformers': data order, optimizer, schedule, callbacks, checkpoints, evaluation schedule, distributed set-up.
What is changed: all examples of an optimizer step are packed together, one backward runs per row, and the loss is a sum
over examples divided by their global number, so that no split of the batch changes the result. How is told in
:mod:`preftune.training.step`; here the two are joined.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any

import datasets
import torch
from accelerate.utils.memory import clear_device_cache
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import EvalPrediction, set_seed
from transformers.trainer_utils import EvalLoopOutput

from preftune.kernels.head import TokenScores
from preftune.packing import PackedRow
from preftune.threads import tell_if_spinning
from preftune.training import card, checks, extra_state, setup, zero
from preftune.training.batch import Batch, Examples, Totals, collate
from preftune.training.checkpoints import CheckpointedTrainer
from preftune.training.config import PackedConfig
from preftune.training.dataloading import TaskFeeding
from preftune.training.engines import check_engine, settle_engine
from preftune.training.generations import Generations
from preftune.training.given_references import explicit_reference
from preftune.training.guards.evidence import Watch
from preftune.training.guards.hooks import make_guards, watch_line
from preftune.training.noise import EmbeddingNoise
from preftune.training.nonfinite_steps import blamed_rows, forget_skip, is_finite, say_skipped, skip_step
from preftune.training.notices import Telling
from preftune.training.plan import TrainingPlan
from preftune.training.planned_rows import sampler_of, visited_rows
from preftune.training.planning import describe
from preftune.training.preference_config import ReferenceConfig
from preftune.training.preflight import check_start, method_settings
from preftune.training.processes import Processes
from preftune.training.reference import Reference
from preftune.training.reference_pass import SyncReference, agreement, make_reference, with_reference
from preftune.training.run_figures import completed, evaluate, line_is_due
from preftune.training.step import Step
from preftune.training.step_setup import Paths, make_step
from preftune.training.task import RowTerms, Task
from preftune.training.trl_interface import Habits, MadeWith
from preftune.training.workers import limit_collectives, remember_processes


class TaskTrainer(Habits, TaskFeeding, CheckpointedTrainer):
    """Runs a task.

    Args:
        task: What is trained.
        model: Name or path, or a model; for this and the others see :class:`~preftune.DPOTrainer`.
        args: Settings.
        **kwargs: For transformers' trainer.

    Attributes:
        task: What is trained, with its objective and its reference.
        step: Runs its rows.
        reports: What became of the rows of each data set.
        verdict: Whether the model is packed, and why not.
        lengths: Token counts of the training data.
    """

    args: PackedConfig
    # transformers declares these as possibly missing, for uses that a trainer with data and model does not have.
    model: nn.Module
    optimizer: Any
    eval_dataset: Any
    #: Runs the rows.
    step_class: type[Step] = Step
    _begins_as_reference = False

    def __init__(
        self,
        task: Task,
        model: Any,
        args: PackedConfig,
        *,
        ref_model: Any = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        quantization_config: Any = None,
        peft_config: Any = None,
        **kwargs: Any,
    ) -> None:
        checks.refuse_overrides(type(self))
        if isinstance(train_dataset, datasets.IterableDataset):
            args = copy.copy(args)  # The order of a stream is entered into it, and not into the caller's.
        check_engine(args, model)
        checks.check_arguments(model, ref_model, data_collator, train_dataset)
        self.task = task
        self.example_columns = task.columns
        set_seed(args.seed)
        model, tokenizer = setup.load(model, processing_class, args, quantization_config)
        model = setup.wrap_peft(model, peft_config, args)
        zero.check_zero_model(args, model)
        task.prepare_model(model, tokenizer)
        if isinstance(args, ReferenceConfig):
            ref_model = explicit_reference(ref_model, model, tokenizer, args)
        if task.disables_dropout:
            setup.disable_dropout(model, ref_model)
        self.reports = {}
        train_dataset = self._prepared_train(train_dataset, tokenizer, args)
        if isinstance(eval_dataset, dict):
            eval_dataset = {name: self._prepared(each, tokenizer, name) for name, each in eval_dataset.items()}
        elif eval_dataset is not None:
            eval_dataset = self._prepared(eval_dataset, tokenizer, "eval")
        super().__init__(
            model=model,
            args=args,
            data_collator=collate,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            **kwargs,
        )
        limit_collectives(self.args)
        remember_processes(self.args)
        settle_engine(self.args, self.accelerator, self.model)
        checks.check_devices(self.args)
        checks.check_optimizer(self)
        for name, each in {"train": self.train_dataset, **self._evaluated()}.items():
            checks.check_token_ids(self.model, each, task.columns, name)
        self._make_step()
        setup.add_tags(self.model, ("preftune", task.name, *getattr(self, "_tag_names", ())))
        self.ref_model = ref_model
        self.made_with = MadeWith(self.model, method_settings(self.args))
        if task.needs_reference and isinstance(args, ReferenceConfig):
            task.reference = self._make_reference(args, ref_model)
        self.generations: Generations | None = None
        if args.generation_steps:
            self.generations = Generations(self, self.log)
            self.add_callback(self.generations)
        if task.reference is not None and task.reference.follows:
            self.add_callback(SyncReference(task.reference))
        task.check_training_data(self.train_dataset)
        self.add_callback(Telling(self))

    def _make_step(self) -> None:
        args, task = self.args, self.task
        if args.device.type == "cpu":
            tell_if_spinning(torch.get_num_threads())
        # What transformers divides the loss of such a model by.
        task.shifts_labels = getattr(self, "_loss_shifts_labels", True)
        self.lengths = task.lengths(self.train_dataset)
        evaluated = map(task.lengths, self._evaluated().values())
        known = [each.longest_sequence for each in (self.lengths, *evaluated) if each is not None]
        self._paths = Paths.of(task, self.model, self.processing_class, args, max(known, default=args.max_length))
        processes = Processes(self.accelerator, args, sharded=self.is_fsdp_enabled or self.is_deepspeed_enabled)
        self.step = make_step(self.step_class, task, self.model, self._paths, self.accelerator, processes)
        # Looked up at every call: a subclass or a script may put another in its place.
        self.step.terms_of = lambda *given: self.row_terms(*given)
        self.verdict = self.step.verdict
        # transformers' own hook would take a row for one sequence.
        alpha, self.neftune_noise_alpha = self.neftune_noise_alpha, None
        self.step.noise = EmbeddingNoise(self.model, alpha) if alpha else None
        guards = make_guards(self)
        if guards is not None:
            self.add_callback(guards)
        self.step.watch = Watch(args.device, on=guards is not None)

    def plan(self) -> TrainingPlan:
        """What :meth:`train` is going to do."""
        return describe(self)

    # ---- data -------------------------------------------------------------------------------------------------------

    def _track_num_input_tokens(self, inputs: Batch) -> None:
        """Count as ``num_tokens`` does; nothing is padded, so that all ways of counting agree."""
        if self.args.include_num_input_tokens_seen != "no":
            count = self.step.processes.sums([float(self.task.num_tokens(inputs.examples))])[0]
            self.state.num_input_tokens_seen += int(count)

    # ---- reference --------------------------------------------------------------------------------------------------

    def _make_reference(self, args: ReferenceConfig, ref_model: Any) -> Reference:
        def forward_of(model: Any) -> Any:
            inner = self.accelerator.unwrap_model(self.accelerator.prepare_model(model, evaluation_mode=True))
            return self._paths.choose(inner, self.accelerator.autocast)[0]

        given = ref_model is not None or args.ref_adapter_name is not None
        #: Whether policy and reference have to agree in the first row.
        self._begins_as_reference = args.first_step_check and not given and self.step.noise is None
        mapped = isinstance(self.train_dataset, datasets.Dataset)
        return make_reference(self.step, args, ref_model, forward_of, mapped=mapped)

    def prepare_reference(self) -> None:
        """Know the reference before the policy moves: score what is missing, or keep what will be run along.

        Called by :meth:`train` and :meth:`evaluate`; harmless to call again.
        """
        reference = self.reference
        if reference is None:
            return
        reference.spread()
        if reference.store is not None:
            state = torch.get_rng_state()
            # Also after training: a longer run after a short one visits examples that are not known yet.
            rows = visited_rows(self.args, len(self.train_dataset), sampler_of(self))  # type: ignore[arg-type]
            self.train_dataset = with_reference(self.step, self.train_dataset, "train", rows)
            held = {name: with_reference(self.step, each, name) for name, each in self._evaluated().items()}
            self.eval_dataset = held if isinstance(self.eval_dataset, dict) else held.get("eval")
            torch.set_rng_state(state)
        # An adapter is small enough to keep beside the store, and lets new data be evaluated later.
        kept = reference.store is None or hasattr(self.step.forward.model, "peft_config")
        if kept and not reference.policy_moved:
            reference.keep_shadow()

    def keep_beginning(self) -> None:
        """Know what is compared with, before the policy moves."""
        self.prepare_reference()
        if self.generations is not None:
            self.generations.keep_reference()

    # ---- training ---------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: Any = None, trial: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Train; see transformers' ``Trainer.train``."""
        # Before a reference pass that may take long.
        check_start(self, trial)
        self.check_resume(resume_from_checkpoint)
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            self.keep_beginning()
        elif self.reference is not None and self.reference.store is not None:
            # While the weights are whole; all else follows when they are sharded, on the device.
            _ = self.reference.weights_key
        try:
            return super().train(resume_from_checkpoint, trial, *args, **kwargs)
        finally:
            if self.reference is not None and self.state.global_step:
                self.reference.policy_moved = True

    def training_step(  # type: ignore[override]
        self, model: nn.Module, inputs: Batch, num_items_in_batch: Any = None
    ) -> Tensor:
        """Forward and backward of all rows of an optimizer step. Returns the loss, detached."""
        model.train()
        if hasattr(self.optimizer, "train") and callable(self.optimizer.train):
            self.optimizer.train()
        if not inputs.sizes:
            return torch.zeros((), device=self.args.device)
        forget_skip(self.accelerator)
        if self._begins_as_reference and not self.state.global_step:
            self.task.tolerance = agreement(self.accelerator, self.model)
        self._begins_as_reference = False
        self.step.with_stats = line_is_due(self.args, self.state)
        loss = self.step.take(model, inputs, self.state.global_step + 1)
        every = self.args.torch_empty_cache_steps
        if every is not None and self.state.global_step % every == 0:
            clear_device_cache()
        # The loop logs the mean over processes of what each returns.
        summed: Tensor = loss * self.step.processes.number
        return summed

    def row_terms(self, row: PackedRow, scores: TokenScores, examples: Examples, totals: Totals) -> RowTerms:
        """Summed loss and metrics of one packed row from its log-probs; a subclass may have others.

        Args:
            row: The row.
            scores: Log-probs of its targets.
            examples: The examples in it.
            totals: Sums over all examples of the step.
        """
        return self.task.row_terms(row, scores, examples, totals)

    def compute_loss(  # type: ignore[override]
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean loss of a batch, with graph; for code that asks the trainer for it. Training itself goes row by row."""
        if return_outputs:
            warnings.warn(
                "return_outputs has no logits to return: preftune never builds them", UserWarning, stacklevel=2
            )
        loss = self.step.mean_loss(model, inputs)
        return (loss, {}) if return_outputs else loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The step's gradient norm, which guards see at every step; a step that is not finite is skipped."""
        norm = super()._get_grad_norm(model, grad_norm)  # type: ignore[no-untyped-call]
        # A loss scaler meets infinities on purpose and skips by itself; DeepSpeed owns its gradients.
        left_alone = self.is_deepspeed_enabled or self.accelerator.scaler is not None or not self.step.batch.sizes
        if left_alone or is_finite(self.step, norm):
            self.num_skipped_in_a_row = 0
        else:
            self.num_skipped_in_a_row += 1
            rows = blamed_rows(self.step, model, self.train_dataset, self.processing_class)
            skip_step(self.step, model)
            say_skipped(self.step, rows, self.num_skipped_in_a_row)
        self.step.watch.add_grad_norm(norm)
        return norm

    def floating_point_ops(self, inputs: Any) -> int:
        """Floating-point operations of a step: six per parameter and computed token."""
        return self.step.flops(inputs) if isinstance(inputs, Batch) else 0

    # ---- evaluation -------------------------------------------------------------------------------------------------

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Evaluate on ``eval_dataset``, raw or tokenised, or on the data given at construction."""
        self.prepare_reference()
        if isinstance(eval_dataset, dict):
            metrics: dict[str, float] = {}
            for name, each in eval_dataset.items():
                metrics.update(self.evaluate(each, ignore_keys, f"{metric_key_prefix}_{name}"))
            return metrics
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = self._evaluable(eval_dataset, metric_key_prefix)
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def predict(self, test_dataset: Any, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test") -> Any:
        """Evaluate on ``test_dataset``, raw or tokenised, with its rewards as predictions where they are wanted."""
        self.prepare_reference()
        return super().predict(self._evaluable(test_dataset, metric_key_prefix), ignore_keys, metric_key_prefix)

    def _evaluable(self, dataset: Any, name: str) -> Any:
        """Prepared examples of raw rows, with what a fixed reference makes of them."""
        own = (self.train_dataset, *self._evaluated().values())
        if not any(dataset is each for each in own):
            dataset = self._prepared(dataset, self.processing_class, name)
        fixed = self.reference is not None and self.reference.store is not None
        return with_reference(self.step, dataset, name) if fixed else dataset

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Loss and metrics over the evaluation data, every example weighing one."""
        if prediction_loss_only is None:
            prediction_loss_only = self.args.prediction_loss_only
        judge = None if prediction_loss_only else self.compute_metrics
        self.model.eval()
        if hasattr(self.optimizer, "eval") and callable(self.optimizer.eval):
            self.optimizer.eval()
        self.callback_handler.eval_dataloader = dataloader

        def after_batch() -> None:
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)

        self.step.watch.begin_heldout(metric_key_prefix)
        metrics, found = evaluate(self.step, self.model, dataloader, after_batch, predict=judge is not None)
        num_samples = len(dataloader.dataset)  # type: ignore[arg-type]
        if judge is not None:
            metrics.update(judge(EvalPrediction(*self.task.judged(found))))
        named = {
            f"{metric_key_prefix}_{k}" if not k.startswith(metric_key_prefix) else k: v for k, v in metrics.items()
        }
        return EvalLoopOutput(predictions=found, label_ids=None, metrics=named, num_samples=num_samples)

    # ---- records ----------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics since the last line to a training line."""
        logs = completed(logs, self.step, self.state.log_history)
        watch_line(self, logs)
        super().log(logs, start_time)

    def create_model_card(  # type: ignore[override]
        self,
        model_name: str | None = None,
        dataset_name: str | Sequence[str] | None = None,
        tags: str | Sequence[str] | None = None,
    ) -> None:
        """Write the model card into the output folder; :meth:`push_to_hub` hands its keywords on to this."""
        if self.is_world_process_zero():
            card.write(str(self.args.output_dir), card.of_run(self, model_name, dataset_name, tags))

    def process_state(self) -> dict[str, Any]:
        """Sums since the last log line, for a checkpoint."""
        return {**super().process_state(), **self.step.state()}

    def load_process_state(self, state: dict[str, Any]) -> None:
        """Go on with the sums of a checkpoint."""
        super().load_process_state(state)
        self.step.load_state(state)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        extra_state.save(self.task, output_dir, writes=self.args.should_save)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            extra_state.load(self.task, checkpoint)
