"""What may be known of a run by those that only look on: plan, card, guards, samples."""

from __future__ import annotations

from typing import Any, Protocol

from transformers import TrainerState

from preftune.training.config import PackedConfig
from preftune.training.lengths import ExampleLengths
from preftune.training.step import Step
from preftune.training.task import Task


class Run(Protocol):
    """A training run, as observers see it. The trainer is one; nothing of it is changed through this.

    Attributes:
        args: Settings.
        task: What is trained, with its objective and its reference.
        step: The policy's forward, token budgets, the processes that train together, and what guards are shown.
        state: How far the run is.
        model: The policy.
        processing_class: The tokenizer.
        train_dataset: Prepared training data.
        eval_dataset: Prepared evaluation data: one set, a mapping of names to sets, or ``None``.
        reports: What became of the rows of each data set.
        lengths: Token counts of the training data; ``None`` where they are unknown.
        callback_handler: The callbacks.
    """

    args: PackedConfig
    task: Task
    step: Step
    state: TrainerState
    model: Any
    processing_class: Any
    train_dataset: Any
    eval_dataset: Any
    reports: dict[str, Any]
    lengths: ExampleLengths | None
    callback_handler: Any

    def is_world_process_zero(self) -> bool:
        """Whether this process writes files and speaks."""
