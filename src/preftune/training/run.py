"""What may be known of a run by those that only look on: plan, card, guards, samples."""

from __future__ import annotations

from typing import Any, Protocol

from transformers import TrainerState

from preftune.models.gate import Verdict
from preftune.training.config import PackedConfig
from preftune.training.lengths import ExampleLengths
from preftune.training.step import Step
from preftune.training.task import Task


class Run(Protocol):
    """A training run, as observers see it. The trainer is one; nothing of it is changed through this."""

    @property
    def args(self) -> PackedConfig:
        """Settings."""

    @property
    def task(self) -> Task:
        """What is trained, its objective and its reference included."""

    @property
    def model(self) -> Any:
        """The policy."""

    @property
    def processing_class(self) -> Any:
        """The tokenizer."""

    @property
    def train_dataset(self) -> Any:
        """Prepared training data."""

    @property
    def eval_dataset(self) -> Any:
        """Prepared evaluation data: one set, a mapping of names to sets, or ``None``."""

    @property
    def reports(self) -> dict[str, Any]:
        """What became of the rows of each data set."""

    @property
    def lengths(self) -> ExampleLengths | None:
        """Token counts of the training data; ``None`` where they are unknown."""

    @property
    def verdict(self) -> Verdict:
        """Whether the model is packed, and why not."""

    @property
    def bytes_per_token(self) -> float:
        """Memory that a token of a row takes between forward and backward."""

    @property
    def step(self) -> Step:
        """The policy's forward, token budgets, the processes that train together, and what guards are shown."""

    @property
    def state(self) -> TrainerState:
        """How far the run is."""

    @property
    def callback_handler(self) -> Any:
        """The callbacks."""

    def is_world_process_zero(self) -> bool:
        """Whether this process writes files and speaks."""
