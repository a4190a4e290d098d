"""transformers' trainer, running a task on packed rows.

What is transformers': data order, optimizer, schedule, callbacks, checkpoints, evaluation schedule, distributed set-up.
What is changed: all examples of an optimizer step are packed together, one backward runs per row, and the loss is a sum
over examples divided by their global number, so that no split of the batch changes the result. How is told in
:mod:`preftune.training.step`; here the two are joined.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import datasets
import torch
from accelerate.utils.memory import clear_device_cache
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import EvalPrediction, set_seed
from transformers.trainer_utils import EvalLoopOutput

from preftune.data import DataOptions, PrepareReport
from preftune.errors import ConfigError, TrainingError
from preftune.kernels.head import TokenScores
from preftune.models.head import base_model
from preftune.packing import PackedRow
from preftune.threads import tell_if_spinning
from preftune.training import card, carried, checks, loaders, memory, recovery, setup
from preftune.training.batch import Batch, Example, collate
from preftune.training.blame import blamed_rows
from preftune.training.carried import RunningDelta
from preftune.training.checkpoints import CheckpointedTrainer
from preftune.training.config import PackedConfig
from preftune.training.explicit import explicit_reference
from preftune.training.generations import Generations
from preftune.training.guards.evidence import Watch
from preftune.training.guards.hooks import make_guards, watch_line
from preftune.training.noise import EmbeddingNoise
from preftune.training.plan import TrainingPlan
from preftune.training.planning import describe
from preftune.training.preference_config import ReferenceConfig
from preftune.training.processes import Processes
from preftune.training.reference import Reference
from preftune.training.reference_pass import ReferencePass, SyncReference, make_reference
from preftune.training.router import RouterLoss
from preftune.training.step import Step
from preftune.training.task import RowTerms, Task
from preftune.training.visits import visited_rows
from preftune.training.workers import limit_collectives, limited, worker_errors

logger = logging.getLogger(__name__)

#: Difference of policy and reference in nats per token that rounding can explain, by half-precision or not.
_AGREEMENT = {True: 5e-2, False: 2e-3}


class TaskTrainer(CheckpointedTrainer):
    """Runs a task.

    Args:
        task: What is trained.
        model: Name or path, or a model, PEFT-wrapped or not.
        args: Settings.
        ref_model: Reference model, or its name or path; by default the policy as it is before training.
        data_collator: Not used: rows are packed, not collated. Passing one is refused.
        train_dataset: Training data that the task knows how to read.
        eval_dataset: Held-out data, or a mapping of names to such.
        processing_class: Tokenizer; by default the model's own.
        quantization_config: Quantisation for a model given by name.
        peft_config: Adapter to train instead of the whole model.
        **kwargs: For transformers' trainer.

    Attributes:
        task: What is trained.
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
        checks.refuse_collator(data_collator)
        checks.require_dataset(train_dataset)
        checks.refuse_same(model, ref_model)
        self.task = task
        self.example_columns = task.columns
        set_seed(args.seed)
        model, tokenizer = setup.load(model, processing_class, args, quantization_config)
        model = setup.wrap_peft(model, peft_config, args)
        task.prepare_model(model, tokenizer)
        if isinstance(args, ReferenceConfig):
            ref_model = explicit_reference(ref_model, model, tokenizer, args)
        if task.disables_dropout:
            for each in (model, ref_model):
                setup.disable_dropout(each)
        self.reports: dict[str, PrepareReport] = {}
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
        self._check_run()
        self._make_step()
        setup.add_tags(self.model, ("preftune", task.name))
        self.ref_model = ref_model
        if task.needs_reference and isinstance(args, ReferenceConfig):
            self._make_reference(args, ref_model)
        self.generations: Generations | None = None
        if args.generation_steps:
            self.generations = Generations(self, self.log)
            self.add_callback(self.generations)
        if task.reference is not None and task.reference.follows:
            self.add_callback(SyncReference(task.reference))
        task.check_training_data(self.train_dataset)

    def _check_run(self) -> None:
        """Find out now what would end a training late."""
        if self.args.n_gpu > 1:
            raise TrainingError(
                "one process sees several GPUs",
                value=self.args.n_gpu,
                remedy="start with accelerate launch or torchrun, or set CUDA_VISIBLE_DEVICES to one GPU",
            )
        checks.check_optimizer(self)
        for name, dataset in {"train": self.train_dataset, **self._evaluated()}.items():
            checks.check_token_ids(self.model, dataset, self.example_columns, name)

    def _evaluated(self) -> dict[str, Any]:
        return self.eval_dataset if isinstance(self.eval_dataset, dict) else {"eval": self.eval_dataset}

    def _make_step(self) -> None:
        """Choose how rows are computed, and how long they may be."""
        args, task = self.args, self.task
        if args.device.type == "cpu":
            tell_if_spinning(torch.get_num_threads())
        self._num_parameters = base_model(self.model).num_parameters(exclude_embeddings=True)
        self.lengths = task.lengths(self.train_dataset)
        # What transformers divides the loss of such a model by.
        task.shifts_labels = getattr(self, "_loss_shifts_labels", True)
        self.processes = Processes(self.accelerator, args, sharded=self.is_fsdp_enabled or self.is_deepspeed_enabled)
        router = RouterLoss.of(self.model, args.router_aux_loss_coef, task.balances_experts)
        self._paths = setup.path_choice(args, self.processing_class, self._longest_sequence(), router is not None)
        checks.check_positions(self.model, self._paths.max_length)
        forward, self.verdict = self._paths.of(self.model, self.accelerator.autocast)
        self.step = self.step_class(
            task, forward, self.accelerator, args, self.processes, lambda *given: self.row_terms(*given)
        )
        self.step.router = router
        self._measure_memory()
        # transformers' own hook would take a row for one sequence.
        alpha, self.neftune_noise_alpha = self.neftune_noise_alpha, None
        self.step.noise = EmbeddingNoise(self.model, alpha) if alpha else None
        forward.compiled = setup.compiled_layers(self.model, args, self.accelerator)
        guards = make_guards(self)
        if guards is not None:
            self.add_callback(guards)
        self.step.watch = Watch(args.device, on=guards is not None)
        if router is not None and task.joint is not None:
            raise ConfigError(
                f"{', '.join(task.methods)} joins the pairs of a step, the load-balancing loss divides them",
                where="router_aux_loss_coef",
                value=router.coef,
                remedy="set router_aux_loss_coef: 0",
            )

    def _longest_sequence(self) -> int | None:
        """Tokens of the longest sequence that is known of."""
        evaluated = [self.task.lengths(each) for each in self._evaluated().values() if each is not None]
        known = [each.longest_sequence for each in (self.lengths, *evaluated) if each is not None]
        return max(known, default=self.args.max_length)

    def _measure_memory(self) -> None:
        args, step = self.args, self.step
        reserved = 3 * sum(p.numel() * p.element_size() for p in self.model.parameters() if p.requires_grad)
        self.bytes_per_token = memory.activation_bytes_per_token(step.forward, self.accelerator.autocast)
        step.max_tokens_per_row = args.max_tokens_per_row or memory.row_budget(
            self.bytes_per_token, args.device, reserved
        )
        if args.checkpoint_policy == "always":
            step.checkpoint_above = 0
        else:
            step.checkpoint_above = memory.tokens_that_fit(self.bytes_per_token, args.device, reserved)

    def plan(self) -> TrainingPlan:
        """What :meth:`train` is going to do."""
        return describe(self)

    # ---- what checkpoints and scripts look at -----------------------------------------------------------------------

    @property
    def reference(self) -> Reference | None:
        """What the policy is compared with."""
        return self.task.reference

    @property
    def running_delta(self) -> RunningDelta | None:
        """BCO's reward shift."""
        return self.task.running_delta

    @property
    def max_tokens_per_row(self) -> int:
        """Token budget of a row."""
        return self.step.max_tokens_per_row

    @max_tokens_per_row.setter
    def max_tokens_per_row(self, value: int) -> None:
        self.step.max_tokens_per_row = value

    @property
    def checkpoint_above(self) -> int:
        """Longest row that is run without recomputing activations."""
        return self.step.checkpoint_above

    @checkpoint_above.setter
    def checkpoint_above(self, value: int) -> None:
        self.step.checkpoint_above = value

    # ---- data -------------------------------------------------------------------------------------------------------

    @property
    def _data_options(self) -> DataOptions:
        return self.task.options

    def _prepared(self, dataset: Any, tokenizer: Any, name: str) -> Any:
        prepared, report = self.task.prepare(dataset, tokenizer, name)
        if report is not None:
            self.reports[name] = report
        return prepared

    def _prepared_train(self, dataset: Any, tokenizer: Any, args: PackedConfig) -> Any:
        return setup.prepared_train(dataset, args, lambda rows: self._prepared(rows, tokenizer, "train"))

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            self._signature_columns = list(self.example_columns)  # type: ignore[assignment]

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        return super()._get_train_sampler(loaders.ordered_by(dataset, self.task.lengths, self.args))

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Batches of this process's share of the training data."""
        return limited(super().get_train_dataloader(), self.args.worker_timeout)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """Batches of this process's share of the evaluation data, every example exactly once over all processes."""
        if isinstance(eval_dataset, str):
            eval_dataset = self.eval_dataset[eval_dataset]
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise ValueError("Trainer: evaluation requires an eval_dataset.")
        if hasattr(dataset, "column_names") and hasattr(dataset, "remove_columns"):
            dataset = self._remove_unused_columns(dataset, description="evaluation")
        return loaders.evaluation_loader(dataset, self.args)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader[Any]:
        """Batches of data to predict on, shared out as for evaluation."""
        return self.get_eval_dataloader(test_dataset)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: Any
    ) -> tuple[list[Any], None]:
        """All micro-batches of an optimizer step as one, preceded by empty ones."""
        return loaders.step_batches(epoch_iterator, num_batches), None

    def _track_num_input_tokens(self, inputs: Batch) -> None:
        """Count as ``num_tokens`` does; nothing is padded, so that all ways of counting agree."""
        if self.args.include_num_input_tokens_seen != "no":
            count = self.processes.sums([float(self.task.num_tokens(inputs.examples))])[0]
            self.state.num_input_tokens_seen += int(count)

    # ---- reference --------------------------------------------------------------------------------------------------

    def _make_reference(self, args: ReferenceConfig, ref_model: Any) -> None:
        def forward_of(model: Any) -> Any:
            inner = self.accelerator.unwrap_model(self.accelerator.prepare_model(model, evaluation_mode=True))
            return self._paths.of(inner, self.accelerator.autocast)[0]

        mapped = isinstance(self.train_dataset, datasets.Dataset)
        self.task.reference = make_reference(self.step, args, ref_model, forward_of, mapped=mapped)
        given = ref_model is not None or args.ref_adapter_name is not None
        #: Whether policy and reference have to agree in the first row.
        self._begins_as_reference = args.first_step_check and not given and self.step.noise is None

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
        scoring = ReferencePass(reference, self.step)
        # Also after training: a longer run after a short one visits examples that are not known yet.
        rows = visited_rows(self.args, len(self.train_dataset), self._get_train_sampler)  # type: ignore[arg-type]
        self.train_dataset = scoring.complete(self.train_dataset, "train", rows)
        self.eval_dataset = scoring.complete_each(self.eval_dataset)
        torch.set_rng_state(state)
        if hasattr(self.step.forward.model, "peft_config") and not reference.policy_moved:
            # An adapter is small enough to keep, and lets new data be evaluated later.
            reference.keep_shadow()

    # ---- training ---------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Train; see transformers' ``Trainer.train``.

        Raises:
            SetupError: A data-loader worker hangs or has died.
        """
        # Before a reference pass that may take long.
        self.check_resume(resume_from_checkpoint)
        self.prepare_reference()
        if self.generations is not None:
            self.generations.keep_reference()
        try:
            with worker_errors(self.args):
                return super().train(resume_from_checkpoint, *args, **kwargs)
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
        if not len(inputs):
            return torch.zeros((), device=self.args.device)
        recovery.forget_skip(self.accelerator)
        if self._begins_as_reference and not self.state.global_step:
            half = self.accelerator.mixed_precision != "no" or next(self.model.parameters()).dtype != torch.float32
            self.task.tolerance = _AGREEMENT[half]
        self._begins_as_reference = False
        self.step.with_stats = self._stats_due()
        loss = self.step.take(model, inputs, self.state.global_step + 1)
        every = self.args.torch_empty_cache_steps
        if every is not None and self.state.global_step % every == 0:
            clear_device_cache()
        # The loop logs the mean over processes of what each returns.
        summed: Tensor = loss * self.processes.number
        return summed

    def _stats_due(self) -> bool:
        """Whether this step's log line is due, so that entropy, mean logit and top-1 are worth their time."""
        step, every = self.state.global_step + 1, max(int(self.state.logging_steps), 1)
        first = self.args.logging_first_step and step == 1
        return first or step % every == 0 or self.args.logging_strategy == "epoch"

    def row_terms(
        self, row: PackedRow, scores: TokenScores, examples: Sequence[Example], totals: Sequence[float]
    ) -> RowTerms:
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
        step = self.step
        # A loss scaler meets infinities on purpose and skips by itself; DeepSpeed owns its gradients.
        left_alone = self.is_deepspeed_enabled or self.accelerator.scaler is not None or not len(step.batch)
        # Gradients are the same everywhere by now, losses are not.
        if left_alone or self.processes.all_well(recovery.is_finite(norm, step.loss, self.args.device)):
            self.num_skipped_in_a_row = 0
        else:
            self.num_skipped_in_a_row += 1
            rows = blamed_rows(step, model, self.train_dataset, self.processing_class)
            step.undo()
            recovery.skip_step(model, self.accelerator)
            number, most = self.state.global_step + 1, self.args.max_skipped_steps
            recovery.say_skipped(number, step.loss, rows, self.num_skipped_in_a_row, most)
        step.watch.add_grad_norm(norm)
        return norm

    def floating_point_ops(self, inputs: Any) -> int:
        """Floating-point operations of a step: six per parameter and computed token."""
        examples = inputs.examples if isinstance(inputs, Batch) else []
        tokens = sum(tree.num_tokens for example in examples for tree in self.task.trees(example, 0))
        return int(6 * tokens * self._num_parameters)

    # ---- evaluation -------------------------------------------------------------------------------------------------

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Evaluate on ``eval_dataset``, raw or tokenised, or on the data given at construction.

        Raises:
            SetupError: A data-loader worker hangs or has died.
        """
        self.prepare_reference()
        if isinstance(eval_dataset, dict):
            metrics: dict[str, float] = {}
            for name, each in eval_dataset.items():
                metrics.update(self.evaluate(each, ignore_keys, f"{metric_key_prefix}_{name}"))
            return metrics
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = self._prepared(eval_dataset, self.processing_class, metric_key_prefix)
            if self.reference is not None and self.reference.store is not None:
                eval_dataset = ReferencePass(self.reference, self.step).complete(eval_dataset, metric_key_prefix)
        with worker_errors(self.args):
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Predict; see transformers' ``Trainer.predict``. There are no logits: predictions are rewards, or ``None``.

        Raises:
            SetupError: A data-loader worker hangs or has died.
        """
        with worker_errors(self.args):
            found: Any = super().predict(*args, **kwargs)
        if found.predictions is None:
            # Rewards are kept for whom they are of use, the user's compute_metrics.
            logger.warning("predict returns metrics and no predictions: logits are never built")
        return found

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
        step, predictions = self.step, []
        step.watch.begin_heldout(metric_key_prefix)
        whole = self.task.begin_evaluation(dataloader, step)
        for batch in dataloader:
            found = step.evaluate(self.model, batch, whole or self.task.totals(batch.examples))
            if found is not None and judge is not None:
                predictions.append(found)
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        self.processes.agree_on_names(step.held_out)
        metrics = step.held_out.pop(self.processes.reduce)
        metrics["num_tokens"] = self._tokens_trained()
        num_samples = int(self.processes.sums([float(len(dataloader.dataset))])[0])  # type: ignore[arg-type]
        stacked: Any = None if judge is None else self.processes.in_order(predictions)
        if judge is not None:
            metrics.update(judge(EvalPrediction(*self.task.judged(stacked))))
        named = {
            f"{metric_key_prefix}_{k}" if not k.startswith(metric_key_prefix) else k: v for k, v in metrics.items()
        }
        return EvalLoopOutput(predictions=stacked, label_ids=None, metrics=named, num_samples=num_samples)

    # ---- records ----------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics since the last line to a training line."""
        if "loss" in logs and "eval_loss" not in logs:
            logs.update(self.step.sums.pop(self.processes.reduce))
            logs["num_tokens"] = self._tokens_trained()
        elif "train_loss" in logs:
            # The last steps of a run, where no line of their own was due.
            logs = {**logs, **self.step.sums.pop(self.processes.reduce)}
            tokens = self._tokens_trained()
            if all(line.get("num_tokens") != tokens for line in self.state.log_history):
                logs["num_tokens"] = tokens
        watch_line(self, logs)
        super().log(logs, start_time)

    def _tokens_trained(self) -> float:
        return self.processes.sums([float(self.step.num_tokens)])[0]

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
        if self.args.should_save:
            carried.save(self.task, output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            carried.load(self.task, checkpoint)
