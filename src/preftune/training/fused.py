"""Several settings trained at once: one LoRA adapter per configuration, all in the same forward over one frozen base.

Configurations may differ in what the objective and the optimizer read (beta, learning rate, loss, label smoothing ...).
Everything else they share: data, order, initial adapter, schedule. Each ends where it ends when it is trained alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from preftune.errors import ConfigError
from preftune.kernels.device import wide_dtype
from preftune.kernels.head import TokenScores
from preftune.models.adapter_groups import Parts, adapter_parameters, add_copies, grouped
from preftune.objectives import METHODS, NEUTRAL
from preftune.packing import PackedRow, plan_rows
from preftune.training.batch import Batch, Examples, Totals
from preftune.training.metrics import Term
from preftune.training.preference_config import DPOConfig
from preftune.training.sequences import pair_metrics
from preftune.training.step import Step
from preftune.training.task import RowTerms, Scoring
from preftune.training.tasks.pairs import PairTask
from preftune.training.trainers import DPOTrainer

#: Settings that configurations may differ in, beside those that the objective reads.
OPTIMIZER_FIELDS = ("learning_rate", "weight_decay", "max_grad_norm")
_SHARED_KNOBS = {knob.name for spec in METHODS.values() for knob in spec.knobs.values() if not knob.in_function}
OBJECTIVE_FIELDS = (
    *("loss_type", "loss_weights", "beta"),
    *(item.name for item in fields(DPOConfig) if item.name in NEUTRAL and item.name not in _SHARED_KNOBS),
)
FUSABLE = (*OPTIMIZER_FIELDS, *OBJECTIVE_FIELDS)
#: Optimizers that treat every element by itself, so that adapters in one optimizer do not feel each other.
_ELEMENTWISE = ("adamw", "adam", "sgd", "rmsprop", "adagrad", "lion")


class FusedTask(PairTask):
    """Pairs that are in a row once per configuration.

    Args:
        args: Settings that all share.
        settings: Settings of each.

    Attributes:
        loss_sums: Each configuration's losses, summed over the steps, ``(configurations,)``.
    """

    def __init__(self, args: DPOConfig, settings: Sequence[DPOConfig]) -> None:
        super().__init__(args)
        self._objectives = [each.build_objective() for each in settings]
        for objective in self._objectives:
            if not objective.separable or objective.uses_running_delta:
                raise ConfigError("joins the pairs of a step", where="loss_type", value=", ".join(objective.names))
        self.loss_sums = torch.zeros(len(settings), dtype=wide_dtype(args.device), device=args.device)
        self._training = False

    def before_rows(self, rows: Sequence[PackedRow], batch: Batch, scoring: Scoring, *, training: bool) -> None:
        """Run the reference along where its values are not in the data."""
        self._training = training
        super().before_rows(rows, batch, scoring, training=training)

    def row_terms(self, row: PackedRow, scores: TokenScores, examples: Examples, totals: Totals) -> RowTerms:
        """Sum of all configurations' losses; metrics under ``<number>/``."""
        logps = self.pair_logps(row, scores, examples, totals)
        self.check_pairs(logps)
        times = len(self._objectives)
        num_pairs = logps.num_pairs // times
        total, rewards = logps.chosen_logps.new_zeros(()), []
        metrics: dict[str, Term] = {}
        for number, objective in enumerate(self._objectives):
            own = logps.select(slice(number * num_pairs, (number + 1) * num_pairs))
            loss = objective(own).loss.sum()
            # A loss that is not finite must not make the step's sum so; its configuration is found by its gradient.
            total = total + loss.nan_to_num(0.0, 0.0, 0.0)
            if self._training:
                self.loss_sums[number] += loss.detach() / totals[0]
            rewards.append(torch.stack(objective.rewards(own), 1).detach())
            terms = pair_metrics(*_part(row, scores, number, num_pairs), own, rewards[-1])
            terms["loss"] = (loss.detach(), float(num_pairs))
            metrics |= {f"{number}/{name}": term for name, term in terms.items()}
        # Every copy of a pair carries the rewards of all configurations, so that any order of the copies will do.
        predictions = torch.stack(rewards, 1).repeat(times, 1, 1)
        return RowTerms(total, float(num_pairs), metrics, predictions)

    def judged(self, predictions: Any) -> tuple[Any, Any]:
        """Rewards ``(pairs, configurations, 2)``, and the chosen column as label."""
        return super().judged(predictions[:: len(self._objectives)])

    def kept(self) -> Any:
        """The losses before a step."""
        return self.loss_sums.clone()

    def undo(self, kept: Any) -> None:
        """Put the losses back."""
        self.loss_sums = kept.clone()


class FusedStep(Step):
    """Runs every configuration's part of a row under its adapter.

    Attributes:
        names: Adapters, in the order of the configurations.
    """

    names: Sequence[str] = ()
    _parts = Parts()

    def plan(self, batch: Batch) -> list[PackedRow]:
        """Rows that hold their pairs once per configuration, configuration by configuration."""
        times = len(self.names)
        lengths = [times * length for length in self._lengths(batch.examples, self.task.trees)]
        return [
            self._row(batch.examples, numbers * times, self.task.trees)
            for numbers in plan_rows(lengths, self.max_tokens_per_row)
        ]

    @contextmanager
    def _sharing(self) -> Iterator[None]:
        with grouped(self.forward.model, self.names) as self._parts:
            yield

    def run_rows(self, model: nn.Module, rows: list[PackedRow], batch: Batch, totals: list[float]) -> Tensor:
        """Forward and backward row by row."""
        with self._sharing():
            return super().run_rows(model, rows, batch, totals)

    def evaluate(self, model: nn.Module, batch: Batch, totals: list[float]) -> Tensor | None:
        """Add up a batch's metrics. Returns its predictions in the order of the examples."""
        with self._sharing():
            return super().evaluate(model, batch, totals)

    def score(self, model: nn.Module, row: PackedRow, with_stats: bool) -> tuple[TokenScores, Any]:
        """Score a row under the policies."""
        self._parts.num_tokens = row.num_tokens
        return super().score(model, row, with_stats)


class FusedTrainer(DPOTrainer):
    """Trains one LoRA adapter per configuration, all of them in the same forward.

    Args:
        configurations: Settings of each that differ from ``args``; names among :data:`FUSABLE`.
        args: Settings that all share.
        peft_config: The LoRA adapter that each of them trains. Required.
        **kwargs: As for :class:`~preftune.DPOTrainer`.

    Raises:
        ConfigError: Something cannot be shared.
    """

    task: FusedTask
    step: FusedStep
    step_class = FusedStep

    def __init__(
        self,
        *,
        configurations: Sequence[Mapping[str, Any]],
        args: DPOConfig,
        peft_config: Any,
        **kwargs: Any,
    ) -> None:
        self.settings = [_checked(args, each) for each in configurations]
        _refuse(args, peft_config, kwargs)
        super().__init__(args=args, peft_config=peft_config, **kwargs)
        self.names = [str(self.model.active_adapter), *(f"fused{k}" for k in range(1, len(self.settings)))]
        add_copies(self.model, self.names[1:])
        self.step.names = self.names
        if self.step.router is not None or not self.step.forward.packed:
            raise ConfigError("only packed rows can be shared", where="packing_mode", value=self.verdict.reason)
        # Configurations whose loss or gradient was not finite: they are not updated, and the others go on.
        self.lost: set[int] = set()

    def make_task(self, args: Any) -> FusedTask:
        """The pairs of all configurations."""
        return FusedTask(args, self.settings)

    # ---- optimizer --------------------------------------------------------------------------------------------------

    def create_optimizer(self, model: Any = None) -> Any:
        """One optimizer whose groups carry each configuration's learning rate and weight decay."""
        if self.optimizer is None:
            decayed = set(self.get_decay_parameter_names(self.model))
            groups = []
            for name, settings in zip(self.names, self.settings, strict=True):
                own = adapter_parameters(self.model, name)
                for decay in (True, False):
                    groups.append(
                        {
                            "params": [p for key, p in own if (key in decayed) == decay],
                            "lr": settings.learning_rate,
                            "weight_decay": settings.weight_decay if decay else 0.0,
                        }
                    )
            make, options = self.get_optimizer_cls_and_kwargs(self.args)
            self.optimizer = make([group for group in groups if group["params"]], **options)
        return self.optimizer

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """Clip each adapter's gradient by its own norm. Returns the norm of all."""
        norms = []
        for name, settings in zip(self.names, self.settings, strict=True):
            own = [p for _, p in adapter_parameters(self.model, name)]
            limit = settings.max_grad_norm if settings.max_grad_norm > 0 else float("inf")
            norms.append(torch.nn.utils.clip_grad_norm_(own, limit))
        stacked = torch.stack(norms)
        finite = torch.isfinite(stacked) & torch.isfinite(self.task.loss_sums)
        self.lost |= {number for number, good in enumerate(finite.tolist()) if not good}
        for number, norm in enumerate(norms):
            self.step.sums.add({f"{number}/grad_norm": (norm.detach(), 1.0)})
            if number in self.lost:
                for _, parameter in adapter_parameters(self.model, self.names[number]):
                    parameter.grad = None
        return torch.linalg.vector_norm(stacked.where(finite, 0.0))

    def process_state(self) -> dict[str, Any]:
        """Sums of every configuration's losses, beside those of the log lines."""
        return {**super().process_state(), "fused_losses": self.task.loss_sums.clone()}

    def load_process_state(self, state: dict[str, Any]) -> None:
        """Go on with the sums of a checkpoint, or of the step's beginning."""
        super().load_process_state(state)
        self.task.loss_sums = state["fused_losses"].to(self.args.device, wide_dtype(self.args.device))

    # ---- results ----------------------------------------------------------------------------------------------------

    def adapter_state(self, number: int) -> dict[str, Tensor]:
        """Weights of one configuration's adapter, under the names that a PEFT checkpoint gives them."""
        from peft import get_peft_model_state_dict

        return dict(get_peft_model_state_dict(self.model, adapter_name=self.names[number]))

    def mean_losses(self) -> list[float]:
        """Each configuration's loss, averaged over the optimizer steps: its own ``train_loss``."""
        found: list[float] = (self.task.loss_sums / max(self.state.global_step, 1)).tolist()
        return found

    def use(self, number: int) -> None:
        """Make one configuration's adapter the model's active one, for saving, generating or scoring."""
        trainable = [p for name in self.names for _, p in adapter_parameters(self.model, name)]
        self.model.set_adapter(self.names[number])  # type: ignore[operator]
        for parameter in trainable:
            # Choosing an adapter freezes the others; training may go on with all of them.
            parameter.requires_grad_(True)


def _part(row: PackedRow, scores: TokenScores, number: int, num_pairs: int) -> tuple[PackedRow, TokenScores]:
    """The targets of one configuration: parts are in order, and so are the slots of their sequences."""
    first = 2 * number * num_pairs
    own = slice(*np.searchsorted(row.target_slot, [first, first + 2 * num_pairs]).tolist())
    columns = [getattr(scores, item.name) for item in dataclasses.fields(scores)]
    sliced: list[Any] = [None if column is None else column[own] for column in columns]
    return dataclasses.replace(row, target_slot=row.target_slot[own] - first), TokenScores(*sliced)


def _checked(args: DPOConfig, changes: Mapping[str, Any]) -> DPOConfig:
    for name in changes:
        if name not in FUSABLE:
            raise ConfigError(
                f"{name} cannot differ between settings that are trained in one forward",
                where="configurations",
                value=name,
                allowed=", ".join(FUSABLE),
                remedy="train them one after another",
            )
    own = {**{name: getattr(args, name) for name in FUSABLE}, **changes}
    shared = {name: getattr(args, name) for name in ("use_weighting", "ld_alpha", "use_cpu", "report_to")}
    return type(args)(output_dir=args.output_dir, bf16=False, **shared, **own)


def _refuse(args: DPOConfig, peft_config: Any, kwargs: Mapping[str, Any]) -> None:
    optim = str(getattr(args.optim, "value", args.optim)).split("_")[0]
    refused = {
        "peft_config": (peft_config is None, "every configuration trains a LoRA adapter", None),
        "compute_metrics": (kwargs.get("compute_metrics") is not None, "there are several models to measure", None),
        "optimizers": (any(kwargs.get("optimizers") or ()), "each configuration needs its own group", None),
        "optim": (optim not in _ELEMENTWISE, "it does not treat every element by itself", args.optim),
        "sync_ref_model": (args.sync_ref_model, "every configuration would need a reference of its own", True),
        "neftune_noise_alpha": (bool(args.neftune_noise_alpha), "noise would differ", args.neftune_noise_alpha),
        "torch_compile": (args.torch_compile, "adapters change places within a layer", True),
        "load_best_model_at_end": (args.load_best_model_at_end, "there is no one best step", True),
        "world_size": (args.world_size > 1, "several processes train configurations side by side", args.world_size),
    }
    for name, (wrong, why, value) in refused.items():
        if wrong:
            raise ConfigError(f"not with a shared forward: {why}", where=name, value=value, remedy="train one by one")


__all__ = ["FUSABLE", "FusedTrainer"]
