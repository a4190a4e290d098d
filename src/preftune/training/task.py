"""What one way of training is, apart from any trainer: its data, its rows and its loss.

A task is made from settings, knows nothing of optimizers, processes or files, and is all that a new way of training
has to write: :mod:`preftune.training.tasks` lists them. The trainer runs whichever it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from preftune.data import DataOptions, PrepareReport
from preftune.kernels.head import TokenScores
from preftune.objectives import Objective
from preftune.packing import PackedRow, Tree
from preftune.training.batch import Batch, Example, Examples, Totals
from preftune.training.config import PackedConfig
from preftune.training.extra_state import RunningDelta
from preftune.training.guards.settings import COMMON
from preftune.training.lengths import ExampleLengths
from preftune.training.metrics import Term
from preftune.training.reference import Reference
from preftune.training.setup import data_options


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


Trees = Callable[[Example, int], tuple[Tree, ...]]


class Scoring(Protocol):
    """What a task may ask for before its rows run."""

    @property
    def device(self) -> torch.device:
        """Where the model computes."""

    def scored(self, batches: Iterable[Batch], trees: Trees) -> Iterator[tuple[PackedRow, Examples, Tensor, bool]]:
        """Rows of some trees of batches, their examples, the policy's log-probs without graph, whether the row counts.

        Rows that do not count keep sharded processes in step.
        """

    def sum_over_processes(self, values: list[float]) -> list[float]:
        """Each value summed over all processes."""


class Task:
    """Base of the tasks.

    Args:
        args: Settings, of the class that the task's trainer takes.

    Attributes:
        options: How data are prepared.
        objective: The loss, where it is one of the table of methods.
        reference: What the policy is compared with; given by the trainer where ``needs_reference``.
        running_delta: BCO's reward shift, where the method has it.
        ld_alpha: Weight of tokens beyond the shorter completion in sums over sequences; ``None`` for one.
        joint: Whether the loss joins all pairs of a step, and so takes two passes.
        needs_reference: Whether there is a reference.
        needs_log_sum_sq: Whether every step needs the log of the sum of squared probabilities.
        disables_dropout: Whether dropout is switched off in policy and reference.
        shifts_labels: Whether transformers' own loss of the model leaves out the first token of a sequence.
        tolerance: Nats per token that policy and reference may differ by in the next row; ``None`` looks at nothing.
    """

    #: The verb on the command line, and the last tag of the model card.
    name: ClassVar[str]
    #: Class of its settings.
    config_class: ClassVar[type[PackedConfig]]
    #: What the data are, in the card's words.
    trains_on: ClassVar[str] = "preference pairs"
    #: Columns of prepared data that the data loader hands on.
    columns: ClassVar[tuple[str, ...]]
    #: Guards that can watch.
    guards: ClassVar[tuple[str, ...]] = COMMON
    #: Which of :meth:`totals` the loss is divided by.
    denominator: ClassVar[int] = 0
    #: Whether examples can be prepared block by block, without looking at the others.
    streams: ClassVar[bool] = True
    #: Add the load-balancing loss wherever a model has one, not only where its configuration asks for it.
    balances_experts: ClassVar[bool] = False

    objective: Objective | None = None
    reference: Reference | None = None
    running_delta: RunningDelta | None = None
    ld_alpha: float | None = None
    joint = False
    needs_reference = False
    needs_log_sum_sq = False
    disables_dropout = False
    shifts_labels = True
    tolerance: float | None = None

    def __init__(self, args: PackedConfig) -> None:
        self.options: DataOptions = data_options(args)

    @property
    def methods(self) -> tuple[str, ...]:
        """Names of the losses."""
        return () if self.objective is None else self.objective.names

    # ---- data -----------------------------------------------------------------------------------------------------

    def prepare_model(self, model: Any, tokenizer: Any) -> None:
        """Change model and tokenizer where the settings ask for it, before the data are prepared."""

    def prepare(self, dataset: Any, tokenizer: Any, name: str) -> tuple[Any, PrepareReport | None]:
        """Tokenised examples, and what became of the rows."""
        raise NotImplementedError

    def check_training_data(self, dataset: Any) -> None:
        """Say what is wrong with prepared training data as a whole."""

    def lengths(self, dataset: Any) -> ExampleLengths | None:
        """Token counts of prepared data; ``None`` where they are unknown."""
        raise NotImplementedError

    def num_tokens(self, examples: Examples) -> int:
        """Tokens of the examples, prompts counted once per sequence as padded trainers count them."""
        raise NotImplementedError

    # ---- rows -----------------------------------------------------------------------------------------------------

    def trees(self, example: Example, number: int) -> tuple[Tree, ...]:
        """Trees of the ``number``-th example of a row, with slots of its own."""
        raise NotImplementedError

    def totals(self, examples: Examples) -> list[float]:
        """Numbers to be summed over all examples of a step and all processes; the first is the number of examples."""
        return [float(len(examples))]

    def before_rows(self, rows: Sequence[PackedRow], batch: Batch, scoring: Scoring, *, training: bool) -> None:
        """Called with the rows of a step, or of a batch of an evaluation, before the policy runs on them."""

    def begin_evaluation(self, batches: Iterable[Batch], scoring: Scoring) -> list[float] | None:
        """Totals of all evaluation data, where they enter an example's loss; ``None`` where a batch's own will do."""
        return None

    def row_terms(self, row: PackedRow, scores: TokenScores, examples: Examples, totals: Totals) -> RowTerms:
        """Summed loss and metrics of one row; ``totals`` are those of the whole step."""
        raise NotImplementedError

    # ---- what follows ---------------------------------------------------------------------------------------------

    def finish_step(self, reduce: Callable[[Tensor], Tensor]) -> None:
        """Move on what a step changes in the task; ``reduce`` sums a tensor over all processes."""

    def kept(self) -> Any:
        """What a step changes in the task, to be put back by :meth:`undo` where the step is run again or skipped."""
        return None

    def undo(self, kept: Any) -> None:
        """Put back what :meth:`kept` returned."""

    def derived(self, metrics: dict[str, float]) -> dict[str, float]:
        """Metrics of a log line with those that are made of others."""
        return metrics

    def judged(self, predictions: Any) -> tuple[Any, Any]:
        """Predictions and labels for the user's ``compute_metrics``."""
        raise NotImplementedError


def weights_of(examples: Sequence[Mapping[str, Any]]) -> list[float]:
    """The examples' own weights, where the data have any."""
    return [e["weight"] for e in examples if "weight" in e]
