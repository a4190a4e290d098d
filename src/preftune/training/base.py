"""The thin trainer under all preftune trainers: transformers' loop around packed rows.

What is transformers': data order, optimizer, schedule, callbacks, checkpoints, evaluation schedule, distributed set-up.
What is changed: all examples of an optimizer step are packed together, one backward runs per row, and the loss is a sum
over examples divided by their global number, so that no split of the batch changes the result.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput

from preftune.errors import ModelError, TrainingError
from preftune.kernels.device import free_bytes, put, wide_dtype
from preftune.kernels.head import TokenScores
from preftune.models.forward import RowForward
from preftune.models.gate import Verdict, check_declared, probe
from preftune.models.head import base_model, probe_head
from preftune.packing import PackedRow, Tree, build_row
from preftune.training import card, checks, memory, setup
from preftune.training.batch import Batch, Example
from preftune.training.config import PackedConfig
from preftune.training.everywhere import agree_on_names, in_order
from preftune.training.guards import COMMON, install_guards, watch_line
from preftune.training.metrics import MetricSums, Term
from preftune.training.noise import EmbeddingNoise
from preftune.training.plan import TrainingPlan
from preftune.training.planning import describe
from preftune.training.recovery import RecoveringTrainer
from preftune.training.router import REASON, RouterLoss


@dataclass
class RowTerms:
    """What one row adds to the loss and the metrics.

    Attributes:
        total: Sum of the row's losses, not divided by anything; a scalar with graph.
        weight: How much of the step's denominator the row holds: its pairs, or its trained tokens.
        metrics: ``{name: (sum, weight)}``.
        predictions: Per-example values for ``compute_metrics``, ``(examples, ...)``, or ``None``.
        pairs: What guards look at, see :mod:`preftune.training.guards.evidence`, or ``None``.
        router: Unweighted load-balancing loss of the row, a scalar with graph, or ``None``.
    """

    total: Tensor
    weight: float
    metrics: dict[str, Term]
    predictions: Tensor | None = None
    pairs: Tensor | None = None
    router: Tensor | None = None


class PackedTrainer(RecoveringTrainer):
    """Base of the trainers. Subclasses say what an example's trees are and how a row's scores become a loss."""

    #: Add the load-balancing loss wherever a model has one, not only where its configuration asks for it.
    balances_experts = False

    args: PackedConfig
    # transformers declares these as possibly missing, for uses that a trainer with data and model does not have.
    model: nn.Module
    optimizer: Any
    #: Tags of the model card; the last one is the verb.
    _tag_names: tuple[str, ...] = ("preftune",)
    #: Which of :meth:`example_totals` the loss is divided by.
    denominator = 0
    #: Guards that can watch this training.
    guard_names: tuple[str, ...] = COMMON
    #: Whether the objective needs the log of the sum of squared probabilities at every step.
    needs_log_sum_sq = False

    # ---- what subclasses define -----------------------------------------------------------------------------------

    def example_trees(self, example: Example, number: int) -> tuple[Tree, ...]:
        """Trees of the ``number``-th example of a row; it owns the slots from ``2 * number`` on."""
        raise NotImplementedError

    def example_totals(self, examples: list[Example]) -> list[float]:
        """Numbers to be summed over all examples of a step and all processes; the first is the number of examples."""
        return [float(len(examples))]

    def row_terms(self, row: PackedRow, scores: TokenScores, examples: list[Example], totals: list[float]) -> RowTerms:
        """Summed loss and metrics of one row; ``totals`` are those of the whole step."""
        raise NotImplementedError

    def evaluation_totals(self, dataloader: DataLoader[Any]) -> list[float] | None:
        """Totals of all evaluation data, where they enter an example's loss; ``None`` where a batch's own will do."""
        return None

    def before_rows(self, rows: list[PackedRow], batch: Batch) -> None:
        """Called with the rows of a step before the policy runs on them."""

    # ---- construction ---------------------------------------------------------------------------------------------

    def __init__(self, **kwargs: Any) -> None:
        checks.refuse_overrides(type(self))
        super().__init__(**kwargs)
        if self.args.n_gpu > 1:
            raise TrainingError(
                "one process sees several GPUs",
                value=self.args.n_gpu,
                remedy="start with accelerate launch or torchrun, or set CUDA_VISIBLE_DEVICES to one GPU",
            )
        checks.check_optimizer(self)
        evaluated = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"eval": self.eval_dataset}
        for name, dataset in {"train": self.train_dataset, **evaluated}.items():
            checks.check_token_ids(self.model, dataset, self.example_columns, name)
        self.lengths = self.example_lengths(self.train_dataset)
        self._eval_sums = MetricSums(self.args.device)
        self._train_sums = MetricSums(self.args.device)
        self._num_train_tokens = torch.zeros((), dtype=wide_dtype(self.args.device), device=self.args.device)
        coef = self.args.router_aux_loss_coef
        self.router = RouterLoss.of(self.model, coef, self.balances_experts)
        self._longest = self._longest_sequence()
        checks.check_positions(self.model, self._longest)
        self.forward_policy, self.verdict = self._choose_path(self.model)
        self._measure_memory()
        # transformers' own hook would take a row for one sequence.
        alpha, self.neftune_noise_alpha = self.neftune_noise_alpha, None
        self.noise = EmbeddingNoise(self.model, alpha) if alpha else None
        self.forward_policy.compiled = setup.compiled_layers(self.model, self.args, self.accelerator)
        self.watch = install_guards(self)

    def _choose_path(self, model: nn.Module) -> tuple[RowForward, Verdict]:
        """Packed or padded: what the user asked for, what the gate allows, what the probe shows."""
        pad = getattr(getattr(self.processing_class, "tokenizer", self.processing_class), "pad_token_id", None) or 0
        mode, backend = self.args.packing_mode, self.args.attention_backend
        verdict = check_declared(model, max_length=self._longest)
        if mode == "padded" or (self.router is not None and mode != "packed"):
            reason = REASON if self.router is not None and mode != "padded" else "asked for by packing_mode: padded"
            verdict = replace(verdict, ok=False, reason=reason)
        elif verdict.ok:
            verdict = probe(model, backend=backend, pad_token_id=pad)
        if mode == "packed" and not verdict.ok:
            raise ModelError(verdict.reason, where="packing_mode", value="packed", remedy="use packing_mode: auto")
        return RowForward(model, verdict.ok, backend, probe_head(model), pad, alone=verdict.alone), verdict

    def _longest_sequence(self) -> int | None:
        """Tokens of the longest sequence that is known of."""
        evaluated = self.eval_dataset.values() if isinstance(self.eval_dataset, dict) else [self.eval_dataset]
        known = [self.lengths, *(self.example_lengths(each) for each in evaluated if each is not None)]
        return max((each.longest_sequence for each in known if each is not None), default=self.args.max_length)

    def _measure_memory(self) -> None:
        device = self.args.device
        trainable = sum(p.numel() * p.element_size() for p in self.model.parameters() if p.requires_grad)
        self.bytes_per_token = memory.activation_bytes_per_token(self.forward_policy, self.accelerator.autocast)
        self.max_tokens_per_row = self.args.max_tokens_per_row or memory.row_budget(
            self.bytes_per_token, device, 3 * trainable
        )
        free = free_bytes(device)
        most = None if free is None else max(free - 3 * trainable, free // 10)
        self.checkpoint_above = 0 if self.args.checkpoint_policy == "always" else _tokens(most, self.bytes_per_token)

    def plan(self) -> TrainingPlan:
        """What :meth:`train` is going to do."""
        return describe(self)

    # ---- data -----------------------------------------------------------------------------------------------------

    def _track_num_input_tokens(self, inputs: Batch) -> None:
        """Count as ``num_tokens`` does; nothing is padded, so that all ways of counting agree."""
        if self.args.include_num_input_tokens_seen != "no":
            count = self._sum_over_processes([float(self.num_tokens(inputs.examples))])[0]
            self.state.num_input_tokens_seen += int(count)

    def _plan(self, batch: Batch) -> list[PackedRow]:
        trees = [self.example_trees(example, 0) for example in batch.examples]
        lengths = [sum(tree.num_tokens for tree in each) for each in trees]
        rows = []
        groups = batch.groups() if self.router else self.forward_policy.rows_of(lengths, self.max_tokens_per_row)
        for numbers in groups:
            in_row = [self.example_trees(batch.examples[n], k) for k, n in enumerate(numbers)]
            rows.append(build_row([tree for each in in_row for tree in each], numbers))
        return rows

    # ---- one optimizer step ---------------------------------------------------------------------------------------

    def training_step(  # type: ignore[override]
        self, model: nn.Module, inputs: Batch, num_items_in_batch: Any = None
    ) -> Tensor:
        """Forward and backward of all rows of an optimizer step. Returns the loss, detached."""
        model.train()
        if hasattr(self.optimizer, "train") and callable(self.optimizer.train):
            self.optimizer.train()
        if not len(inputs):
            return torch.zeros((), device=self.args.device)
        totals = self._sum_over_processes(self.example_totals(inputs.examples))

        def run(rows: list[PackedRow]) -> Tensor:
            self.before_rows(rows, inputs)
            return self.run_rows(model, rows, inputs, totals)

        loss = self.run_step(model, inputs, run)
        every = self.args.torch_empty_cache_steps
        if every is not None and self.state.global_step % every == 0:
            clear_device_cache()
        self._num_train_tokens += float(self.num_tokens(inputs.examples))
        # The loop logs the mean over processes of what each returns.
        summed: Tensor = loss * self.args.world_size
        return summed

    def run_rows(self, model: nn.Module, rows: list[PackedRow], batch: Batch, totals: list[float]) -> Tensor:
        """Forward and backward row by row. Returns this process's share of the loss, detached."""
        loss = torch.zeros((), device=self.args.device)
        # Rows that repeat an earlier one only keep sharded processes in step and weigh nothing.
        real = {id(row) for row in rows}
        stats = self._stats_due()
        # One autocast region around all rows keeps the half-precision copies of the weights for the whole step.
        with (
            self.accelerator.autocast(),
            self.forward_policy.active(),
            memory.offloading(self.args.activation_offloading, self.model),
        ):
            for number, row in enumerate(rows):
                padding = id(row) not in real
                real.discard(id(row))
                terms = self._row_terms(model, row, batch, totals, stats and not padding)
                share = terms.total / max(totals[self.denominator], 1.0)
                if terms.router is not None and self.router is not None:
                    share = share + self.router.coef * terms.router / (len(rows) * self.args.world_size)
                if not padding:
                    self._train_sums.add(terms.metrics)
                    self.watch.add_train(terms.pairs)
                    loss += share.detach()
                self.backward_row(model, share * 0 if padding else share, last=number == len(rows) - 1)
        return loss

    def forward_row(self, model: nn.Module, row: PackedRow, with_stats: bool) -> TokenScores:
        """Score a row under the policy, recomputing activations later where they would not fit."""
        return self._forward(model, row, with_stats)[0]

    def _forward(self, model: nn.Module, row: PackedRow, with_stats: bool) -> tuple[TokenScores, Any]:
        recompute = bool(self.args.gradient_checkpointing) and row.num_tokens > self.checkpoint_above
        noise: AbstractContextManager[None] = nullcontext()
        if self.noise is not None and self.model.training:
            noise = self.noise.on(row, packed=self.forward_policy.packed)
        with memory.checkpointing(self.model, recompute), noise:
            return self.forward_policy(
                row,
                wrapped=model,
                with_stats=with_stats,
                with_log_sum_sq=self.needs_log_sum_sq,
                extra=self.router.keywords if self.router else None,
            )

    def _row_terms(self, model: nn.Module, row: PackedRow, batch: Batch, totals: list[float], stats: bool) -> RowTerms:
        scores, output = self._forward(model, row, stats)
        terms = self.row_terms(row, scores, [batch.examples[n] for n in row.examples], totals)
        if self.router is not None:
            terms.router = self.router.term(output)
            terms.metrics["aux_loss"] = (terms.router.detach(), 1.0)
        return terms

    def backward_row(self, model: nn.Module, loss: Tensor, last: bool) -> None:
        """Add a row's gradient; processes exchange gradients once, with the last row."""
        sync: Callable[[], AbstractContextManager[Any]] = nullcontext
        if not last and self.args.world_size > 1:
            sync = partial(self.accelerator.no_sync, model=model)
        self.accelerator.gradient_state._set_sync_gradients(last)
        with sync():
            # Wrappers average gradients over processes, while the loss is already divided by the global count.
            self.accelerator.backward(loss * self.args.world_size)

    def _stats_due(self) -> bool:
        """Whether this step's log line is due, so that entropy, mean logit and top-1 are worth their time."""
        step, every = self.state.global_step + 1, max(int(self.state.logging_steps), 1)
        first = self.args.logging_first_step and step == 1
        return first or step % every == 0 or self.args.logging_strategy == "epoch"

    def num_tokens(self, examples: list[Example]) -> int:
        """Tokens of the examples, prompts counted once per sequence as padded trainers count them."""
        raise NotImplementedError

    # ---- processes ------------------------------------------------------------------------------------------------

    def _reduce(self, tensor: Tensor) -> Tensor:
        if self.args.world_size == 1:
            return tensor
        reduced = self.accelerator.reduce(tensor.clone(), reduction="sum")
        assert isinstance(reduced, Tensor)
        return reduced

    def _sum_over_processes(self, values: list[float]) -> list[float]:
        if self.args.world_size == 1:
            return values
        result: list[float] = self._reduce(put(values, self.args.device, torch.float64)).tolist()
        return result

    def _rows_everywhere(self, rows: int) -> int:
        """Rows that every process has to run: sharded models gather parameters in step."""
        if self.args.world_size == 1 or not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            return rows
        counts = self.accelerator.gather(torch.tensor([rows], device=self.args.device))
        return int(counts.max())

    # ---- evaluation -----------------------------------------------------------------------------------------------

    def evaluation_data(self, dataset: Any, name: str) -> Any:
        """Data that :meth:`evaluate` was given, as the data loader takes them."""
        raise NotImplementedError

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Evaluate on ``eval_dataset``, raw or tokenised, or on the data given at construction."""
        if isinstance(eval_dataset, dict):
            metrics: dict[str, float] = {}
            for name, each in eval_dataset.items():
                metrics.update(self.evaluate(each, ignore_keys, f"{metric_key_prefix}_{name}"))
            return metrics
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = self.evaluation_data(eval_dataset, metric_key_prefix)
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

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
        with_user_metrics = self.compute_metrics is not None and not prediction_loss_only
        self.model.eval()
        if hasattr(self.optimizer, "eval") and callable(self.optimizer.eval):
            self.optimizer.eval()
        self.callback_handler.eval_dataloader = dataloader
        predictions: list[Tensor] = []
        self.watch.begin_heldout(metric_key_prefix)
        whole = self.evaluation_totals(dataloader)
        for batch in dataloader:
            with torch.no_grad():
                found = self._evaluate_batch(batch, whole or self.example_totals(batch.examples))
            if found is not None and with_user_metrics:
                predictions.append(found)
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        agree_on_names(self._eval_sums, self.args.world_size)
        metrics = self._eval_sums.pop(self._reduce)
        metrics["num_tokens"] = self._tokens_trained()
        num_samples = int(self._sum_over_processes([float(len(dataloader.dataset))])[0])  # type: ignore[arg-type]
        stacked: Any = in_order(predictions, self.args.world_size) if with_user_metrics else None
        output = EvalLoopOutput(predictions=stacked, label_ids=None, metrics=metrics, num_samples=num_samples)
        if with_user_metrics:
            metrics.update(self.user_metrics(stacked))
        named = {
            f"{metric_key_prefix}_{k}" if not k.startswith(metric_key_prefix) else k: v for k, v in metrics.items()
        }
        return output._replace(metrics=named)

    def _evaluate_batch(self, batch: Batch, totals: list[float]) -> Tensor | None:
        """Add up a batch's metrics. Returns its predictions in the order of the examples."""
        rows = self._plan(batch)
        self.before_rows(rows, batch)
        found: list[Tensor] = []
        watched: list[Tensor | None] = []
        with self.accelerator.autocast(), self.forward_policy.active():
            for row in rows:
                terms = self._row_terms(self.model, row, batch, totals, stats=True)
                balance = 0.0 if self.router is None else self.router.coef * terms.metrics["aux_loss"][0]
                self._eval_sums.add({**terms.metrics, "loss": (terms.total + balance * terms.weight, terms.weight)})
                watched.append(terms.pairs)
                if terms.predictions is not None:
                    found.append(terms.predictions)
        self.watch.add_heldout(watched, [n for row in rows for n in row.examples], batch.examples)
        if not found:
            return None
        order = torch.tensor([n for row in rows for n in row.examples], device=found[0].device)
        return torch.cat(found)[order.argsort()]

    def user_metrics(self, predictions: Any) -> Mapping[str, float]:
        """What the user's ``compute_metrics`` makes of the predictions."""
        return {}

    # ---- logging --------------------------------------------------------------------------------------------------

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The step's gradient norm, which guards see at every step and not only at those that are logged."""
        norm = super()._get_grad_norm(model, grad_norm)
        self.watch.add_grad_norm(norm)
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics since the last line to a training line."""
        if "loss" in logs and "eval_loss" not in logs:
            logs.update(self._train_sums.pop(self._reduce))
            logs["num_tokens"] = self._tokens_trained()
        elif "train_loss" in logs:
            # The last steps of a run, where no line of their own was due.
            logs = {**logs, **self._train_sums.pop(self._reduce)}
            tokens = self._tokens_trained()
            if all(line.get("num_tokens") != tokens for line in self.state.log_history):
                logs["num_tokens"] = tokens
        watch_line(self, logs)
        super().log(logs, start_time)

    def _tokens_trained(self) -> float:
        return float(self._sum_over_processes([float(self._num_train_tokens)])[0])

    def create_model_card(  # type: ignore[override]
        self,
        model_name: str | None = None,
        dataset_name: str | Sequence[str] | None = None,
        tags: str | Sequence[str] | None = None,
    ) -> None:
        """Write the model card into the output folder; :meth:`push_to_hub` hands its keywords on to this."""
        if self.is_world_process_zero():
            card.write(str(self.args.output_dir), card.of_trainer(self, model_name, dataset_name, tags))

    def process_state(self) -> dict[str, Any]:
        """Sums since the last log line, for a checkpoint."""
        sums = {"metrics": self._train_sums.state(), "num_tokens": self._num_train_tokens.clone()}
        return {**super().process_state(), **sums, "watch": self.watch.state()}

    def load_process_state(self, state: dict[str, Any]) -> None:
        """Go on with the sums of a checkpoint."""
        super().load_process_state(state)
        self._train_sums.load_state(state["metrics"])
        self._num_train_tokens = state["num_tokens"].to(self.args.device)
        self.watch.load_state(state["watch"])

    def floating_point_ops(self, inputs: Any) -> int:
        """Floating-point operations of a step: six per parameter and computed token."""
        examples = inputs.examples if isinstance(inputs, Batch) else []
        if not examples:
            return 0
        if not hasattr(self, "_num_parameters"):
            self._num_parameters = base_model(self.model).num_parameters(exclude_embeddings=True)
        tokens = sum(tree.num_tokens for example in examples for tree in self.example_trees(example, 0))
        return int(6 * tokens * self._num_parameters)

    def compute_loss(  # type: ignore[override]
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean loss of a batch, with graph; for code that asks the trainer for it. Training itself goes row by row."""
        if return_outputs:
            warnings.warn(
                "return_outputs has no logits to return: preftune never builds them", UserWarning, stacklevel=2
            )
        totals = self.example_totals(inputs.examples)
        rows = self._plan(inputs)
        self.before_rows(rows, inputs)
        with self.accelerator.autocast(), self.forward_policy.active():
            losses = [self._row_terms(model, row, inputs, totals, False).total for row in rows]
        loss = torch.stack(losses).sum() / max(totals[self.denominator], 1.0)
        return (loss, {}) if return_outputs else loss


def _tokens(num_bytes: int | None, per_token: float) -> int:
    return 1 << 62 if num_bytes is None or per_token <= 0 else int(num_bytes / per_token)
