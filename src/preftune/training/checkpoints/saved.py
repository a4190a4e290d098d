"""What the parts of a checkpoint know of a trainer, and what a trainer may add to one."""

from __future__ import annotations

import time
from typing import Any

from transformers import Trainer

from preftune.models.gate import Verdict
from preftune.training.checkpoints.output import Output
from preftune.training.config import PackedConfig


class SavedTrainer(Trainer):
    """A trainer whose progress is kept in checkpoints.

    A subclass with state of its own that training changes returns it from :meth:`extra_state`, the same on every
    process, or from :meth:`process_state`, and takes it back in :meth:`load_extra_state` or :meth:`load_process_state`.
    """

    args: PackedConfig
    model: Any
    output: Output
    example_columns: tuple[str, ...]
    verdict: Verdict
    max_tokens_per_row: int
    checkpoint_above: int
    _total_loss_scalar: float

    def __init__(self, **kwargs: Any) -> None:
        #: Optimizer steps in a row that were skipped because of non-finite values.
        self.num_skipped_in_a_row = 0
        self.seconds_before = 0.0
        self._clock = time.monotonic()
        super().__init__(**kwargs)

    def begin(self) -> None:
        """Put the running sums and the subclass's state back; called when the loop has reset its own."""
        self._clock = time.monotonic()

    def seconds_trained(self) -> float:
        """Seconds spent training, those before the checkpoint included."""
        return self.seconds_before + time.monotonic() - self._clock

    def extra_state(self) -> dict[str, Any]:
        """Further state that training changes: numbers, text, tensors, nested in mappings and lists."""
        return {}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`extra_state` returned; called when the first step is about to begin."""

    def process_state(self) -> dict[str, Any]:
        """State of this process alone, such as sums since the last log line; tensors and numbers."""
        return {}

    def load_process_state(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`process_state` returned."""
